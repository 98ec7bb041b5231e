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
Pictures with boxes, whatever they were read from, with checks that say which annotation is wrong.

Boxes are x, y, width, height in pixels of the upright picture and stay as they were read for evaluation, as do crowds.
Training targets are cut to the picture; boxes without area and crowds are no targets. Category ids may be any whole
numbers: classes are counted from 0 in the order of the ids, and the ids are kept for results files.
"""

import io
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import PIL.Image
from datasets import Dataset

from .images import image_name, open_image


logger = logging.getLogger(__name__)

MAX_LISTED = 20
EXIF_ORIENTATION = 0x0112


@dataclass
class DetectionData:
    """
    n pictures with m boxes of N classes.

    Attributes:
        source: The file or data set, for messages.
        pictures: Rows of `image`, undecoded.
        image_ids (n,) int64, and sizes (n, 2) int64: height and width in pixels.
        categories: The name of each class by its original id, in the order of the ids.
        offsets (n + 1,) int64: The boxes of picture i are rows offsets[i] to offsets[i + 1] of what follows.
        boxes (m, 4) float64: x, y, width, height in pixels, as they were read.
        classes (m,) int64 in [0, N), areas (m,) float64 in square pixels, crowds (m,) bool.
    """

    source: str
    pictures: Dataset
    image_ids: np.ndarray
    sizes: np.ndarray
    categories: dict[int, str]
    offsets: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def category_ids(self) -> list[int]:
        """The original id of each class."""
        return list(self.categories)

    @property
    def class_names(self) -> list[str]:
        return list(self.categories.values())

    def config_fields(self) -> dict:
        """Fields of a model's config that name these classes and keep their original ids."""
        id2label = dict(enumerate(self.class_names))
        label2id = {name: label for label, name in id2label.items()}
        return {"id2label": id2label, "label2id": label2id, "original_category_ids": self.category_ids}

    def open(self, row: int) -> tuple[PIL.Image.Image, np.ndarray, np.ndarray]:
        """A picture, upright RGB, and its [`targets`]. Raises `ValueError` if the picture cannot be used."""
        return open_picture(self, row), *self.targets(row)

    def targets(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (k, 4) float64, x, y, x, y inside the picture, and classes (k,) that a model learns from a picture."""
        span = slice(self.offsets[row], self.offsets[row + 1])
        corners = _clamped_corners(self.boxes[span], self.sizes[row])
        kept = _has_area(corners) & ~self.crowds[span]
        return corners[kept], self.classes[span][kept]

    def select(self, rows: Iterable[int]) -> "DetectionData":
        """The pictures of these rows with their boxes."""
        rows = np.asarray(list(rows), np.int64)
        spans = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows]
        kept = np.concatenate([np.zeros(0, np.int64), *spans])
        return replace(
            self,
            pictures=self.pictures.select(rows),
            image_ids=self.image_ids[rows],
            sizes=self.sizes[rows],
            offsets=np.cumsum([0, *map(len, spans)]),
            **{name: getattr(self, name)[kept] for name in ("boxes", "classes", "areas", "crowds")},
        )

    def ground_truth(self) -> dict:
        """All boxes in COCO's format, with the original image and category ids."""
        image_ids = np.repeat(self.image_ids, np.diff(self.offsets)).tolist()
        category_ids = np.array(self.category_ids, np.int64)[self.classes].tolist()
        columns = (image_ids, category_ids, self.boxes.tolist(), self.areas.tolist(), self.crowds.astype(int).tolist())
        names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        return {
            "images": [
                {"id": image_id, "height": height, "width": width}
                for image_id, (height, width) in zip(self.image_ids.tolist(), self.sizes.tolist())
            ],
            # Ids from 1: pycocotools takes an annotation with id 0 for one that no box matches.
            "annotations": [dict(zip(names, values)) for values in zip(range(1, len(self.boxes) + 1), *columns)],
            "categories": [{"id": category_id, "name": name} for category_id, name in self.categories.items()],
        }

    def box_counts(self) -> dict[str, int]:
        """Targets that are `clamped`, because they reach outside their picture, and `dropped`, having no area in it."""
        sizes = np.repeat(self.sizes, np.diff(self.offsets), axis=0)
        corners, clamped = _corners(self.boxes), _clamped_corners(self.boxes, sizes)
        dropped = ~_has_area(clamped) & ~self.crowds
        # Corners are sums, which may exceed a border by a rounding error of float32.
        outside = (np.abs(corners - clamped) > 1e-3).any(axis=1) & ~dropped & ~self.crowds
        return {"clamped": int(outside.sum()), "dropped": int(dropped.sum())}


def open_picture(data: DetectionData, row: int) -> PIL.Image.Image:
    """A picture, upright RGB. Raises `ValueError` if it is not of the size that its boxes were drawn at."""
    source = data.pictures[row]["image"]
    image = open_image(source)
    height, width = data.sizes[row]
    if image.size != (width, height):
        raise ValueError(
            f"{image_name(source, row)} is {image.width} x {image.height} pixels when upright, but {width} x {height} "
            f"in {data.source}: its boxes belong to another form of it."
        )
    return image


def _corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _clamped_corners(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Corners of boxes (m, 4) cut to pictures of sizes (2,) or (m, 2), height and width."""
    return np.clip(_corners(boxes), 0, sizes[..., [1, 0, 1, 0]])


def _has_area(corners: np.ndarray) -> np.ndarray:
    return (corners[:, 2:] > corners[:, :2]).all(axis=1)


def assemble(
    source: str,
    pictures: Dataset,
    image_ids: list[int],
    sizes: list[tuple[int, int]],
    categories: dict[int, str],
    annotations: list[dict],
) -> DetectionData:
    """
    Checks the annotations, sorts them by picture and warns of boxes that need repair.

    Args:
        source, pictures, image_ids, sizes, categories: See [`DetectionData`]; the categories in any order.
        annotations: With `id`, `image_id`, `category_id`, `bbox` and, where known, `area` and `iscrowd`.
    """
    _check_annotations(source, set(image_ids), categories, annotations)
    categories = dict(sorted(categories.items()))
    check_names(source, categories.values())

    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    class_of = {category_id: label for label, category_id in enumerate(categories)}
    rows = np.array([row_of[annotation["image_id"]] for annotation in annotations], np.int64)
    order = np.argsort(rows, kind="stable")
    boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4)
    areas = [annotation.get("area") for annotation in annotations]
    areas = [box[2] * box[3] if area is None else area for area, box in zip(areas, boxes)]
    data = DetectionData(
        source=source,
        pictures=pictures,
        image_ids=np.array(image_ids, np.int64),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        categories=categories,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(image_ids)))]),
        boxes=boxes[order],
        classes=np.array([class_of[annotation["category_id"]] for annotation in annotations], np.int64)[order],
        areas=np.array(areas, np.float64)[order],
        crowds=np.array([bool(annotation.get("iscrowd")) for annotation in annotations], bool)[order],
    )
    counts = data.box_counts()
    if any(counts.values()):
        logger.warning(
            f"{source}: {counts['clamped']} boxes reach outside their picture and are cut to it, {counts['dropped']} "
            "have no area in it and are left out of training."
        )
    return data


def _check_annotations(source: str, image_ids: set, categories: dict, annotations: list[dict]):
    """Raises `ValueError` with the ids of the annotations that have a problem, the first kind of problem found."""
    known = {"image_id": image_ids, "category_id": categories}
    for key, values in known.items():
        unknown = [annotation for annotation in annotations if annotation[key] not in values]
        if unknown:
            names = listed(f"{annotation['id']} ({annotation[key]})" for annotation in unknown)
            raise ValueError(f"{source}: annotations whose `{key}` is unknown: {names}.")
    problems = {
        "without a `bbox` (a mask alone does not do)": lambda box: box is None,
        "whose `bbox` is not four numbers": lambda box: not _is_four_numbers(box),
        "whose `bbox` is not finite": lambda box: not all(map(math.isfinite, box)),
    }
    for problem, has_problem in problems.items():
        found = [annotation["id"] for annotation in annotations if has_problem(annotation.get("bbox"))]
        if found:
            raise ValueError(f"{source}: annotations {problem}: {listed(found)}.")


def _is_four_numbers(box) -> bool:
    return isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(side, int | float) for side in box)


def check_ids(source: str, field: str, ids: list):
    """Raises `ValueError` unless the ids are whole numbers and no two are the same."""
    wrong = [value for value in ids if not isinstance(value, int)]
    if wrong:
        raise ValueError(f"{source}: ids of `{field}` must be whole numbers, got {listed(map(repr, wrong))}.")
    twice = [value for value, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{source}: ids in `{field}` that are there more than once: {listed(twice)}.")


def check_names(source: str, names: Iterable[str]):
    """Raises `ValueError` if two classes have the same name, by which models tell them apart."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{source}: `categories` of the same name: {listed(twice)}.")


def listed(values: Iterable) -> str:
    """The first values, and how many more there are."""
    values = list(values)
    more = f" and {len(values) - MAX_LISTED} more" if len(values) > MAX_LISTED else ""
    return ", ".join(map(str, values[:MAX_LISTED])) + more


def upright_size(source: str | os.PathLike | dict) -> tuple[int, int]:
    """
    Height and width of a picture as `open_image` returns it, read from its header.

    Args:
        source: A path, or a `{"path", "bytes"}` dict (the datasets library's undecoded `Image`).
    """
    file = source
    if isinstance(source, dict):
        file = source["path"] if source["bytes"] is None else io.BytesIO(source["bytes"])
    try:
        with PIL.Image.open(file) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    except Exception as error:  # Pillow's readers raise any kind on damaged files
        raise ValueError(f"{image_name(source)}: the size cannot be read: {error}") from error
    return (width, height) if turned else (height, width)
