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
"""Instance masks from files in COCO's format."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from .coco import find_pictures, read_entries, read_json
from .detection_data import DetectionData, assemble, listed, open_picture
from .rle import ByteStrings, decode_masks, encode_segmentation, mask_areas, mask_boxes


logger = logging.getLogger(__name__)


@dataclass
class InstanceData(DetectionData):
    """
    [`DetectionData`] with a mask for each of the m boxes. Masks may overlap, as COCO's do.

    Attributes:
        masks: m compressed run lengths, of the size of their picture.
    """

    masks: ByteStrings

    def open(self, row: int) -> tuple[Image.Image, np.ndarray, np.ndarray, np.ndarray]:
        """
        A picture and all that is annotated in it, crowds included.

        Returns:
            The picture, upright RGB; masks (n, height, width) bool; classes (n,) int64; crowds (n,) bool.

        Raises:
            `ValueError`: if the picture cannot be read or has another size than its masks; names the file.
        """
        image, span = open_picture(self, row), slice(self.offsets[row], self.offsets[row + 1])
        return image, decode_masks(self._counts(row), image.height, image.width), self.classes[span], self.crowds[span]

    def _counts(self, row: int) -> list[bytes]:
        return [self.masks[number] for number in range(self.offsets[row], self.offsets[row + 1])]

    def select(self, rows: Iterable[int]) -> "InstanceData":
        """The pictures of these rows with their boxes and masks."""
        rows = list(rows)
        selected = super().select(rows)
        selected.masks = ByteStrings.pack(counts for row in rows for counts in self._counts(row))
        return selected

    def annotations(self, row: int) -> list[dict]:
        """All boxes and masks of a picture in COCO's format, with the original ids of image and category."""
        image_id, size, category_ids = int(self.image_ids[row]), self.sizes[row].tolist(), self.category_ids
        return [
            {
                "id": number + 1,  # pycocotools takes an annotation with id 0 for one that nothing matches
                "image_id": image_id,
                "category_id": category_ids[self.classes[number]],
                "bbox": self.boxes[number].tolist(),
                "area": float(self.areas[number]),
                "iscrowd": int(self.crowds[number]),
                "segmentation": {"size": size, "counts": self.masks[number]},
            }
            for number in range(self.offsets[row], self.offsets[row + 1])
        ]

    def ground_truth(self) -> dict:
        """All boxes and masks in COCO's format, with the original image and category ids."""
        return super().ground_truth() | {
            "annotations": [annotation for row in range(len(self)) for annotation in self.annotations(row)]
        }


def read_coco_masks(
    images_dir: str | Path, annotations_file: str | Path, skip_corrupt: bool = False
) -> tuple[InstanceData, list[str]]:
    """
    Reads a file of instances in COCO's format. Pictures without any are kept; sizes that the file lacks are read from
    the pictures, boxes and areas that it lacks from the masks.

    Args:
        images_dir: Folder that the `file_name` of each picture is relative to.
        annotations_file: JSON with `images`, `annotations` and `categories`.
        skip_corrupt: Whether to leave out annotations whose `segmentation` is no mask.

    Returns:
        The data, and a line for each annotation left out.

    Raises:
        `ValueError`: if something is missing, twice there, unknown or no mask; names the file, the field and the ids.
    """
    file, content = Path(annotations_file), read_json(Path(annotations_file))
    images = read_entries(file, content, "images", ("file_name",))
    annotations = read_entries(file, content, "annotations", ("image_id", "category_id"))
    categories = read_entries(file, content, "categories", ("name",))
    paths, sizes = find_pictures(file, images, Path(images_dir))

    row_of = {image["id"]: row for row, image in enumerate(images)}
    unknown = [
        f"{annotation['id']} ({annotation['image_id']})"
        for annotation in annotations
        if annotation["image_id"] not in row_of
    ]
    if unknown:
        raise ValueError(f"{file}: annotations whose `image_id` is unknown: {listed(unknown)}.")
    annotations = sorted(annotations, key=lambda annotation: row_of[annotation["image_id"]])
    counts, problems = {}, []
    for annotation in annotations:
        try:
            size = sizes[row_of[annotation["image_id"]]]
            counts[annotation["id"]] = encode_segmentation(annotation.get("segmentation"), *size)
        except ValueError as problem:
            problems.append(f"{file}: annotation {annotation['id']} of image {annotation['image_id']} {problem}")
    _report(problems, skip_corrupt)

    annotations = [annotation for annotation in annotations if annotation["id"] in counts]
    for annotation in annotations:
        _complete(annotation, counts[annotation["id"]], *sizes[row_of[annotation["image_id"]]])
    boxes = assemble(
        str(file),
        Dataset.from_dict({"image": list(map(str, paths))}, Features({"image": ImageFeature(decode=False)})),
        [image["id"] for image in images],
        sizes,
        {category["id"]: str(category["name"]) for category in categories},
        annotations,
    )
    masks = ByteStrings.pack(counts[annotation["id"]] for annotation in annotations)
    return InstanceData(**vars(boxes), masks=masks), problems


def _report(problems: list[str], skip_corrupt: bool):
    if not problems:
        return
    listing = "\n".join(f"  {problem}" for problem in problems)
    if not skip_corrupt:
        raise ValueError(
            f"{len(problems)} annotations have no usable mask:\n{listing}\n"
            "Repair or remove them, or go on without them with --skip_corrupt."
        )
    logger.warning(f"Going on without {len(problems)} annotations that have no usable mask:\n{listing}")


def _complete(annotation: dict, counts: bytes, height: int, width: int):
    """Adds the box and the area where the file has none."""
    if annotation.get("bbox") is None:
        annotation["bbox"] = mask_boxes([counts], height, width)[0].tolist()
    if annotation.get("area") is None:
        annotation["area"] = int(mask_areas([counts], height, width)[0])
