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
"""Boxes for object detection from the datasets library: pictures with a column `objects`, as they are on the Hub."""

from datasets import ClassLabel, Dataset, DatasetDict, Image

from .detection_data import DetectionData, assemble, check_ids, upright_size


CATEGORY_FIELDS = ("category", "category_id", "label")


def read_objects(splits: DatasetDict, source: str) -> dict[str, DetectionData]:
    """
    Reads all splits, which share their classes.

    Columns: `image`; `objects`, lists or records of `bbox` (x, y, width, height in pixels), `category` (or
    `category_id` or `label`: classes, whole numbers or words) and, where known, `id`, `area` and `iscrowd`; and, where
    known, `image_id`, `width` and `height`.

    Args:
        splits: The data set.
        source: Its name, for messages.

    Raises:
        `ValueError`: if something is missing, twice there, unknown or no number; names the split, the field and ids.
    """
    features = next(iter(splits.values())).features
    missing = [column for column in ("image", "objects") if column not in features]
    if missing:
        raise ValueError(f"{source} has no column {', '.join(missing)}; it has {', '.join(features)}.")
    fields = _inner(features["objects"])
    found = [name for name in CATEGORY_FIELDS if name in fields]
    if "bbox" not in fields or not found:
        raise ValueError(f"`objects` of {source} must have `bbox` and `category`; it has {', '.join(fields)}.")
    objects = {split: _read_records(rows, f"{source}, split {split}") for split, rows in splits.items()}
    for records in objects.values():
        for record in (record for picture in records for record in picture):
            record["category_id"] = record.get(found[0])
    categories = _number_categories(source, _inner(fields[found[0]]), objects)
    return {
        split: _read_split(rows, f"{source}, split {split}", objects[split], categories)
        for split, rows in splits.items()
    }


def _inner(feature):
    """What a list is of."""
    return getattr(feature, "feature", feature)


def _image_ids(rows: Dataset) -> list:
    return rows["image_id"][:] if "image_id" in rows.features else list(range(len(rows)))


def _read_records(rows: Dataset, source: str) -> list[list[dict]]:
    """For each picture one dict for each object, from columns or from records."""
    return [
        [dict(record) for record in (_join(source, image_id, objects) if isinstance(objects, dict) else objects or [])]
        for image_id, objects in zip(_image_ids(rows), rows["objects"][:])
    ]


def _join(source: str, image_id: int, columns: dict[str, list | None]) -> list[dict]:
    """Records from lists, of which None is a column that is not there."""
    columns = {name: values for name, values in columns.items() if values is not None}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{source}: lists in `objects` of image {image_id} differ in length: {lengths}.")
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _number_categories(source: str, feature, objects: dict[str, list[list[dict]]]) -> dict[int, str]:
    """The names of the classes by id; words become the numbers of their alphabetical order, in `objects` too."""
    if isinstance(feature, ClassLabel):
        return dict(enumerate(feature.names))
    records = [record for split in objects.values() for picture in split for record in picture]
    values = {record["category_id"] for record in records} - {None}
    if all(isinstance(value, int) for value in values):
        return {value: str(value) for value in values}
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"Categories of {source} must be classes, whole numbers or words, got {feature}.")
    number_of = {name: number for number, name in enumerate(sorted(values))}
    for record in records:
        record["category_id"] = number_of.get(record["category_id"])
    return {number: name for name, number in number_of.items()}


def _read_split(rows: Dataset, source: str, objects: list[list[dict]], categories: dict[int, str]) -> DetectionData:
    image_ids = _image_ids(rows)
    check_ids(source, "image_id", image_ids)
    annotations = []
    for image_id, records in zip(image_ids, objects):
        # Where objects have no ids, numbers from 1 name them in messages.
        ids = [record.get("id", len(annotations) + number) for number, record in enumerate(records, start=1)]
        check_ids(source, f"objects, image {image_id}", ids)
        annotations += [record | {"id": id_, "image_id": image_id} for id_, record in zip(ids, records)]
    pictures = rows.select_columns("image").cast_column("image", Image(decode=False))
    return assemble(source, pictures, image_ids, _sizes(rows, pictures), categories, annotations)


def _sizes(rows: Dataset, pictures: Dataset) -> list[tuple[int, int]]:
    """Heights and widths, from the columns where these are complete, else from the pictures' headers."""
    if "height" in rows.features and "width" in rows.features:
        sizes = list(zip(rows["height"][:], rows["width"][:]))
        if all(height and width for height, width in sizes):
            return sizes
    return [upright_size(picture["image"]) for picture in pictures]
