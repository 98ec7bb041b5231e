# Copyright 2026 The clusterformer-hf team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Masks as COCO stores them: run lengths down the columns, compressed to a few bytes, and polygons.

pycocotools takes a polygon of two points for a box, and fills masks whose runs end early with what was in memory:
everything that comes from a file is checked here first.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass
class ByteStrings:
    """
    n byte strings in two arrays: as Python objects those of COCO would take gigabytes, once in every data worker.

    Attributes:
        content (total,) uint8, and offsets (n + 1,) int64: string i is content[offsets[i] : offsets[i + 1]].
    """

    content: np.ndarray
    offsets: np.ndarray

    @classmethod
    def pack(cls, strings: Iterable[bytes]) -> "ByteStrings":
        strings = list(strings)
        return cls(np.frombuffer(b"".join(strings), np.uint8), np.cumsum([0, *map(len, strings)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> bytes:
        return self.content[self.offsets[number] : self.offsets[number + 1]].tobytes()

    def select(self, numbers: Iterable[int]) -> "ByteStrings":
        return self.pack(self[number] for number in numbers)


def encode_masks(masks: np.ndarray) -> list[bytes]:
    """Compressed run lengths of masks (n, height, width), bool or 0 and 1."""
    from pycocotools import mask as coco_mask  # of the extra "train"

    # pycocotools wants (height, width, n), the first axis fastest in memory.
    masks = np.ascontiguousarray(np.asarray(masks, np.uint8).transpose(0, 2, 1)).transpose(2, 1, 0)
    return [rle["counts"] for rle in coco_mask.encode(masks)]


def decode_masks(counts: Iterable[bytes], height: int, width: int) -> np.ndarray:
    """Masks (n, height, width), bool, from compressed run lengths that fit this size."""
    from pycocotools import mask as coco_mask

    rles = [{"size": [height, width], "counts": value} for value in counts]
    if not rles:
        return np.zeros((0, height, width), bool)
    return coco_mask.decode(rles).transpose(2, 0, 1).astype(bool)


def mask_areas(counts: Iterable[bytes], height: int, width: int) -> np.ndarray:
    """Pixels (n,) int64 in each mask."""
    from pycocotools import mask as coco_mask

    rles = [{"size": [height, width], "counts": value} for value in counts]
    return np.asarray(coco_mask.area(rles), np.int64) if rles else np.zeros(0, np.int64)


def mask_boxes(counts: Iterable[bytes], height: int, width: int) -> np.ndarray:
    """Boxes (n, 4) float64 around masks, x, y, width, height."""
    from pycocotools import mask as coco_mask

    rles = [{"size": [height, width], "counts": value} for value in counts]
    return np.asarray(coco_mask.toBbox(rles), np.float64) if rles else np.zeros((0, 4))


def encode_segmentation(segmentation: list | dict | None, height: int, width: int) -> bytes:
    """
    Compressed run lengths of a COCO annotation's `segmentation`.

    Args:
        segmentation: Polygons, lists of x and y in pixels, of which the union is taken; or a dict of `size`, height and
            width, and `counts`: run lengths as a list, or compressed to a string.
        height, width: The picture's.

    Raises:
        `ValueError`: saying what is wrong, to be put behind the annotation's name.
    """
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict):
        counts = _checked_counts(segmentation, height, width)
        if isinstance(counts, bytes):
            return counts
        return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"has no mask: `segmentation` is {segmentation!r}")
    for polygon in segmentation:
        _check_polygon(polygon)
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))["counts"]


def _check_polygon(polygon):
    if not isinstance(polygon, list) or not all(isinstance(value, int | float) for value in polygon):
        raise ValueError("has a polygon that is no list of numbers")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"has a polygon of {len(polygon)} numbers, not x and y of at least three corners")
    if not all(map(math.isfinite, polygon)):
        raise ValueError("has a polygon whose numbers are not finite")


def _checked_counts(rle: dict, height: int, width: int) -> bytes | list[int]:
    """The counts if they fill a mask of this size."""
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width]:
        raise ValueError(f"has a mask of size {size}, height and width, in a picture of {[height, width]}")
    counts = counts.encode() if isinstance(counts, str) else counts
    runs = run_lengths(counts) if isinstance(counts, bytes) else counts
    if not isinstance(runs, list) or not all(isinstance(run, int) for run in runs):
        raise ValueError("has a mask whose `counts` are neither whole numbers nor a string of them")
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(f"has a mask whose runs cover {sum(runs)} of {height * width} pixels")
    return counts


def run_lengths(counts: bytes) -> list[int]:
    """
    The lengths of runs of 0, 1, 0, ... down the columns.

    Each number is written in groups of five bits, the lowest first, as characters from "0" up, in which 32 says that
    the number goes on; its last group's 16 is the sign. From the fourth on they are differences to the last but one.
    """
    runs, value, shift = [], 0, 0
    for character in counts:
        group = character - 48
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    return runs
