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
Panoptic segments in COCO's format: a PNG for each picture, whose colour R + 256 G + 65536 B is the id of a pixel's
segment, and a JSON file that says what the segments are. Id 0 is void: pixels of no segment.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from .coco import SPLIT_PREFIXES, check_entries, find_pictures, read_entries, read_json
from .coco_masks import InstanceData
from .detection_data import DetectionData, assemble, check_ids, check_names, listed, open_picture
from .images import image_name, load_image
from .rle import ByteStrings, encode_masks, mask_areas, mask_boxes


MAX_SEGMENT_ID = 2**24 - 1


@dataclass
class PanopticData:
    """
    n pictures with m segments of N classes.

    Attributes:
        source: The file, for messages.
        pictures: Rows of `image` and `segments`, the PNG, both undecoded.
        image_ids (n,) int64, and sizes (n, 2) int64: height and width in pixels.
        categories: The name of each class by its original id, in the order of the ids.
        is_thing (N,) bool: Whether a class has instances; each picture has at most one segment of the others.
        offsets (n + 1,) int64: The segments of picture i are rows offsets[i] to offsets[i + 1] of what follows.
        segment_ids (m,) int64, classes (m,) int64 in [0, N), crowds (m,) bool.
    """

    source: str
    pictures: Dataset
    image_ids: np.ndarray
    sizes: np.ndarray
    categories: dict[int, str]
    is_thing: np.ndarray
    offsets: np.ndarray
    segment_ids: np.ndarray
    classes: np.ndarray
    crowds: np.ndarray

    __len__ = DetectionData.__len__
    category_ids = DetectionData.category_ids
    class_names = DetectionData.class_names
    config_fields = DetectionData.config_fields

    def open(self, row: int) -> tuple[Image.Image, np.ndarray, np.ndarray, np.ndarray]:
        """
        A picture and its segments, crowds included.

        Returns:
            The picture, upright RGB; a map (height, width) int32, 0 for void and i + 1 for segment i; and the segments'
            classes (k,) int64 and crowds (k,) bool.

        Raises:
            `ValueError`: if picture or PNG cannot be read, have another size than the file says, or the PNG has other
            segments than the file; names the PNG, the image and the ids.
        """
        image, span = open_picture(self, row), slice(self.offsets[row], self.offsets[row + 1])
        name = image_name(self.pictures[row]["segments"], row)
        segments = open_segments(self.pictures[row]["segments"])
        if segments.shape != (image.height, image.width):
            raise ValueError(
                f"{name} is {segments.shape[1]} x {segments.shape[0]} pixels, but its picture "
                f"{image.width} x {image.height}."
            )
        try:
            numbers = _number_segments(segments, self.segment_ids[span])
        except ValueError as error:
            raise ValueError(f"{name}, image {self.image_ids[row]} of {self.source}: {error}") from error
        return image, numbers, self.classes[span], self.crowds[span]

    def select(self, rows: Iterable[int]) -> "PanopticData":
        """The pictures of these rows with their segments."""
        rows = np.asarray(list(rows), np.int64)
        spans = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows]
        kept = np.concatenate([np.zeros(0, np.int64), *spans])
        return replace(
            self,
            pictures=self.pictures.select(rows),
            image_ids=self.image_ids[rows],
            sizes=self.sizes[rows],
            offsets=np.cumsum([0, *map(len, spans)]),
            **{name: getattr(self, name)[kept] for name in ("segment_ids", "classes", "crowds")},
        )

    def instances(self) -> InstanceData:
        """The segments of things as instances, for mask AP. Reads every PNG."""
        annotations, counts = [], []
        for row, (image_id, (height, width)) in enumerate(zip(self.image_ids.tolist(), self.sizes.tolist())):
            _, segments, classes, crowds = self.open(row)
            things = np.flatnonzero(self.is_thing[classes])
            encoded = encode_masks(segments == things[:, None, None] + 1)
            boxes, areas = mask_boxes(encoded, height, width), mask_areas(encoded, height, width)
            counts += encoded
            annotations += [
                {
                    "id": len(annotations) + number,
                    "image_id": image_id,
                    "category_id": self.category_ids[classes[thing]],
                    "bbox": box,
                    "area": area,
                    "iscrowd": crowds[thing],
                }
                for number, (thing, box, area) in enumerate(zip(things, boxes.tolist(), areas.tolist()), start=1)
            ]
        categories = {
            category_id: name for (category_id, name), thing in zip(self.categories.items(), self.is_thing) if thing
        }
        boxes = assemble(
            self.source,
            self.pictures.select_columns("image"),
            self.image_ids.tolist(),
            self.sizes.tolist(),
            categories,
            annotations,
        )
        return InstanceData(**vars(boxes), masks=ByteStrings.pack(counts))


def _number_segments(segments: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """The map with i + 1 in place of `segment_ids[i]`, int32; 0 stays."""
    present, positions = np.unique(segments, return_inverse=True)
    in_png, in_file = set(present.tolist()) - {0}, set(segment_ids.tolist())
    if in_png - in_file:
        raise ValueError(f"segments in the PNG but not in `segments_info`: {listed(sorted(in_png - in_file))}.")
    if in_file - in_png:
        raise ValueError(f"segments in `segments_info` but not in the PNG: {listed(sorted(in_file - in_png))}.")
    number_of = {0: 0} | {segment_id: number for number, segment_id in enumerate(segment_ids.tolist(), start=1)}
    numbers = np.array([number_of[segment_id] for segment_id in present.tolist()], np.int32)
    return numbers[positions].reshape(segments.shape)


def find_panoptic_splits(folder: str | Path) -> dict[str, tuple[Path, Path, Path]]:
    """
    The folders of pictures and of PNGs and the JSON file of `train` and `validation`, or of the one that there is.

    Looked for are `annotations/panoptic_NAME.json`, the PNGs in `panoptic_NAME` or `annotations/panoptic_NAME`, and the
    pictures in `NAME` or `images/NAME`. NAME begins with `train`; with `val` or else `test`.
    """
    folder, splits = Path(folder), {}
    files = {file.stem.removeprefix("panoptic_"): file for file in folder.glob("annotations/panoptic_*.json")}
    for split, prefixes in SPLIT_PREFIXES.items():
        names = [name for prefix in prefixes for name in sorted(files) if name.startswith(prefix)]
        splits |= {split: _find_parts(folder, names[0], files[names[0]])} if names else {}
    if not splits:
        raise ValueError(f"There is no annotations/panoptic_train.json nor panoptic_val.json in {folder}.")
    return splits


def _find_parts(folder: Path, name: str, file: Path) -> tuple[Path, Path, Path]:
    """The folders of a file's pictures and PNGs, and the file."""
    candidates = {
        "pictures": [folder / name, folder / "images" / name],
        "PNGs": [folder / file.stem, file.with_suffix("")],
    }
    for what, paths in candidates.items():
        if not any(path.is_dir() for path in paths):
            raise ValueError(f"{file} is there, but its {what} are neither in {paths[0]} nor in {paths[1]}.")
    return *(next(path for path in paths if path.is_dir()) for paths in candidates.values()), file


def read_panoptic(images_dir: str | Path, segments_dir: str | Path, annotations_file: str | Path) -> PanopticData:
    """
    Reads a panoptic file in COCO's format. PNGs are read later, by [`PanopticData.open`].

    Args:
        images_dir, segments_dir: Folders that the `file_name` of each picture, and of each PNG, is relative to.
        annotations_file: JSON with `images`, `annotations`, each with `segments_info`, and `categories`.

    Raises:
        `ValueError`: if something is missing, twice there, unknown or no number; names the file, the field and the ids.
    """
    file, content = Path(annotations_file), read_json(Path(annotations_file))
    images = read_entries(file, content, "images", ("file_name",))
    categories = sorted(
        read_entries(file, content, "categories", ("name", "isthing")), key=lambda category: category["id"]
    )
    check_names(str(file), [str(category["name"]) for category in categories])
    paths, sizes = find_pictures(file, images, Path(images_dir))
    annotation_of = _annotations_by_image(file, content.get("annotations"), {image["id"] for image in images})
    annotations = [annotation_of[image["id"]] for image in images]
    pngs = [Path(segments_dir) / annotation["file_name"] for annotation in annotations]
    missing = [path for path in pngs if not path.is_file()]
    if missing:
        raise ValueError(f"{file}: {len(missing)} PNGs of `annotations` are missing: {listed(missing)}.")

    class_of = {category["id"]: label for label, category in enumerate(categories)}
    for annotation in annotations:
        _check_segments(file, annotation, class_of)
    segments = [segment for annotation in annotations for segment in annotation["segments_info"]]
    undecoded = ImageFeature(decode=False)
    return PanopticData(
        source=str(file),
        pictures=Dataset.from_dict(
            {"image": list(map(str, paths)), "segments": list(map(str, pngs))},
            Features({"image": undecoded, "segments": undecoded}),
        ),
        image_ids=np.array([image["id"] for image in images], np.int64),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        categories={category["id"]: str(category["name"]) for category in categories},
        is_thing=np.array([bool(category["isthing"]) for category in categories], bool),
        offsets=np.cumsum([0, *(len(annotation["segments_info"]) for annotation in annotations)]),
        segment_ids=np.array([segment["id"] for segment in segments], np.int64),
        classes=np.array([class_of[segment["category_id"]] for segment in segments], np.int64),
        crowds=np.array([bool(segment.get("iscrowd")) for segment in segments], bool),
    )


def _annotations_by_image(file: Path, annotations: list, image_ids: set) -> dict[int, dict]:
    """The one annotation of each picture, which has all it needs."""
    if not isinstance(annotations, list):
        raise ValueError(f"{file} has no list `annotations`.")
    check_entries(file, "`annotations`", annotations, ("image_id", "file_name", "segments_info"))
    annotated = [annotation["image_id"] for annotation in annotations]
    check_ids(str(file), "annotations, image_id", annotated)
    unknown, missing = set(annotated) - image_ids, image_ids - set(annotated)
    if unknown:
        raise ValueError(f"{file}: annotations whose `image_id` is unknown: {listed(sorted(unknown))}.")
    if missing:
        raise ValueError(f"{file}: images without an entry in `annotations`: {listed(sorted(missing))}.")
    return dict(zip(annotated, annotations))


def _check_segments(file: Path, annotation: dict, class_of: dict[int, int]):
    segments, field = annotation["segments_info"], f"`segments_info` of image {annotation['image_id']}"
    source = f"{file}, {field}"
    check_entries(file, field, segments, ("id", "category_id"))
    check_ids(source, "segments_info", [segment["id"] for segment in segments])
    outside = [segment["id"] for segment in segments if not 1 <= segment["id"] <= MAX_SEGMENT_ID]
    if outside:
        raise ValueError(f"{source}: ids must be in [1, {MAX_SEGMENT_ID}], got {listed(outside)}.")
    unknown = [
        f"{segment['id']} ({segment['category_id']})" for segment in segments if segment["category_id"] not in class_of
    ]
    if unknown:
        raise ValueError(f"{source}: segments whose `category_id` is unknown: {listed(unknown)}.")


def segment_colours(segments: np.ndarray) -> np.ndarray:
    """Segment ids (height, width) in [0, 2^24) as colours (height, width, 3), uint8."""
    segments = np.asarray(segments, np.int64)
    return np.stack([segments % 256, segments // 256 % 256, segments // 65536], axis=-1).astype(np.uint8)


def open_segments(source) -> np.ndarray:
    """Segment ids (height, width), int32, of a panoptic PNG; `source` as for `open_image`."""
    try:
        image = load_image(source)
    except Exception as error:  # Pillow's readers raise any kind on damaged files
        raise ValueError(f"{image_name(source)}: {error}") from error
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(f"{image_name(source)}: segment ids are colours, R + 256 G + 65536 B, got mode {image.mode}.")
    return np.asarray(image)[..., :3].astype(np.int32) @ np.array([1, 256, 65536], np.int32)
