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
"""Boxes for object detection from files in COCO's format."""

import json
from pathlib import Path

from datasets import Dataset, Features, Image

from .detection_data import DetectionData, assemble, check_ids, listed, upright_size


# The first that is found is read.
SPLIT_PREFIXES = {"train": ["train"], "validation": ["val", "test"]}
# Types of values that entries are found by; an error's words for them.
KINDS = {
    "file_name": (str, "text"),
    "image_id": (int | float, "a number"),
    "category_id": (int | float, "a number"),
    "segments_info": (list, "a list"),
}


def find_coco_splits(folder: str | Path) -> dict[str, tuple[Path, Path]]:
    """
    The picture folder and annotation file of `train` and `validation`, or of the one that there is.

    Looked for are `annotations/instances_NAME.json` with the pictures in `NAME` or `images/NAME`, and
    `NAME/_annotations.coco.json` beside the pictures. NAME begins with `train`; with `val` or else `test`.
    """
    folder = Path(folder)
    found = {}
    for file in sorted(folder.glob("annotations/instances_*.json")):
        name = file.stem.removeprefix("instances_")
        images_dir = next((path for path in (folder / name, folder / "images" / name) if path.is_dir()), None)
        found[name] = (images_dir, file)
    found |= {file.parent.name: (file.parent, file) for file in sorted(folder.glob("*/_annotations.coco.json"))}
    splits = {}
    for split, prefixes in SPLIT_PREFIXES.items():
        names = [name for prefix in prefixes for name in sorted(found) if name.startswith(prefix)]
        splits |= {split: found[names[0]]} if names else {}
    for images_dir, file in splits.values():
        if images_dir is None:
            name = file.stem.removeprefix("instances_")
            raise ValueError(f"{file} is there, but its pictures are neither in {folder / name} nor in images/{name}.")
    if not splits:
        raise ValueError(f"There is no annotations/instances_train.json nor train/_annotations.coco.json in {folder}.")
    return splits


def read_coco(images_dir: str | Path, annotations_file: str | Path) -> DetectionData:
    """
    Reads a file in COCO's format. Pictures without boxes are kept; sizes that the file lacks are read from them.

    Args:
        images_dir: Folder that the `file_name` of each picture is relative to.
        annotations_file: JSON with `images`, `annotations` and `categories`.

    Raises:
        `ValueError`: if something is missing, twice there, unknown or no number; names the file, the field and the ids.
    """
    file, images_dir = Path(annotations_file), Path(images_dir)
    content = read_json(file)
    images = read_entries(file, content, "images", ("file_name",))
    annotations = read_entries(file, content, "annotations", ("image_id", "category_id"))
    categories = read_entries(file, content, "categories", ("name",))

    paths, sizes = find_pictures(file, images, images_dir)
    pictures = Dataset.from_dict({"image": [str(path) for path in paths]}, Features({"image": Image(decode=False)}))
    return assemble(
        str(file),
        pictures,
        [image["id"] for image in images],
        sizes,
        {category["id"]: str(category["name"]) for category in categories},
        annotations,
    )


def find_pictures(file: Path, images: list[dict], images_dir: Path) -> tuple[list[Path], list[tuple[int, int]]]:
    """Paths and sizes, height and width, of COCO's `images`. Raises `ValueError` if there are files missing."""
    paths = [images_dir / image["file_name"] for image in images]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{file}: {len(missing)} pictures of `images` are missing: {listed(missing)}.")
    sizes = [
        (image["height"], image["width"]) if image.get("height") and image.get("width") else upright_size(path)
        for image, path in zip(images, paths)
    ]
    return paths, sizes


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object with `images`, `annotations` and `categories`.")
    return content


def read_entries(file: Path, content: dict, field: str, required: tuple[str, ...]) -> list[dict]:
    """
    The list `content[field]`, in which each entry has an id of its own and the required keys.

    Raises:
        `ValueError`: if there is no such list, or an entry is of another kind; names the file, the field and the entry.
    """
    entries = content.get(field)
    if not isinstance(entries, list):
        raise ValueError(f"{file} has no list `{field}`.")
    if field == "annotations" and any("segments_info" in entry for entry in entries[:1] if isinstance(entry, dict)):
        raise ValueError(f"{file}: `annotations` are panoptic segments; boxes are in a file of instances.")
    check_entries(file, f"`{field}`", entries, ("id", *required))
    check_ids(str(file), field, [entry["id"] for entry in entries])
    return entries


def check_entries(file: Path, field: str, entries: list, required: tuple[str, ...]):
    """Raises `ValueError` unless all entries are objects with the required keys, whose values are of the right kind."""
    _refuse(file, f"{field} must be objects", [not isinstance(entry, dict) for entry in entries])
    for key in required:
        _refuse(file, f"no `{key}` in {field}", [entry.get(key) is None for entry in entries])
        kind, words = KINDS.get(key, (object, ""))
        _refuse(file, f"`{key}` in {field} must be {words}", [not isinstance(entry[key], kind) for entry in entries])


def _refuse(file: Path, problem: str, is_wrong: list[bool]):
    if any(is_wrong):
        wrong = [number for number, value in enumerate(is_wrong) if value]
        raise ValueError(f"{file}: {problem}, entries {listed(wrong)}, counted from 0.")
