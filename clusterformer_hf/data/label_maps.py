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
Label maps for semantic segmentation: for each picture an image whose pixels are class ids, from folders or the datasets
library. 255 is for pixels of no class, which neither training nor evaluation counts.
"""

import csv
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from .detection_data import check_names, listed
from .images import image_name, load_image, open_image


logger = logging.getLogger(__name__)

IGNORE_INDEX = 255
# The first that exists is read.
SPLITS = {"train": ["train", "training"], "validation": ["validation", "valid", "val", "test"]}
# The last is a table that ADE20K comes with.
CLASS_NAME_FILES = ["id2label.json", "annotations/semantic_labels.json", "objectInfo150.txt"]
LABEL_COLUMNS = ["label", "labels", "annotation", "annotations", "mask", "label_map"]


@dataclass
class SemanticData:
    """
    n pictures with label maps of N classes.

    Attributes:
        source: The folders or the data set, for messages.
        pictures: Rows of `image` and `label_map`, both undecoded.
        image_ids (n,) int64: The rows of the data set that was read.
        class_names: The N names.
        reduce_labels: Whether the maps hold ids from 1 up and 0 for pixels of no class, as ADE20K's do. Classes are
            then counted from 0 and 0 becomes 255.
        colours: Where label maps are in colour, the class of each (R, G, B).
    """

    source: str
    pictures: Dataset
    image_ids: np.ndarray
    class_names: list[str]
    reduce_labels: bool = False
    colours: dict[tuple[int, int, int], int] | None = None

    def __post_init__(self):
        if not 1 <= len(self.class_names) <= IGNORE_INDEX:
            raise ValueError(
                f"{self.source}: label maps have 1 to {IGNORE_INDEX} classes, as {IGNORE_INDEX} is for pixels of none; "
                f"got {len(self.class_names)}."
            )
        check_names(self.source, self.class_names)

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def categories(self) -> dict[int, str]:
        return dict(enumerate(self.class_names))

    @property
    def category_ids(self) -> list[int]:
        return list(self.categories)

    def config_fields(self) -> dict:
        """Fields of a model's config that name these classes."""
        return {"id2label": self.categories, "label2id": {name: label for label, name in self.categories.items()}}

    def open(self, row: int) -> tuple[Image.Image, np.ndarray]:
        """
        A picture, upright RGB, and its label map (height, width), uint8, in [0, N) or 255.

        Raises:
            `ValueError`: if one of them cannot be read, their sizes differ, or an id is no class; names the label map.
        """
        picture = self.pictures[row]
        image, name = open_image(picture["image"]), image_name(picture["label_map"], row)
        labels = open_label_map(picture["label_map"], self.colours)
        if labels.shape != (image.height, image.width):
            raise ValueError(
                f"{name} is {labels.shape[1]} x {labels.shape[0]} pixels, but its picture "
                f"{image_name(picture['image'], row)} {image.width} x {image.height}."
            )
        first = int(self.reduce_labels)
        ignored = (labels == IGNORE_INDEX) | (labels < first)
        wrong = np.unique(labels[~ignored & (labels >= len(self.class_names) + first)])
        if len(wrong):
            last, void = len(self.class_names) + first - 1, "0 or 255" if self.reduce_labels else "255"
            raise ValueError(
                f"{name} has the ids {listed(wrong.tolist())}; they must be {first} to {last} for classes, {void} "
                "for pixels of none."
            )
        return image, np.where(ignored, IGNORE_INDEX, labels - first).astype(np.uint8)

    def select(self, rows: Iterable[int]) -> "SemanticData":
        """The pictures of these rows with their label maps."""
        rows = list(rows)
        return replace(self, pictures=self.pictures.select(rows), image_ids=self.image_ids[rows])


def warn_of_unused_ids(splits: dict[str, SemanticData]):
    """
    Says so where label maps are read as counting from 1 and no picture has the last class: they may count from 0, and
    each class would be taken for the one before it. Opens label maps until the class is found.
    """
    data = next(iter(splits.values()))
    last = len(data.class_names)
    maps = ((each, label_map) for each in splits.values() for label_map in each.pictures["label_map"])
    if data.reduce_labels and not any((open_label_map(one, each.colours) == last).any() for each, one in maps):
        logger.warning(
            f"No label map of {', '.join(each.source for each in splits.values())} has the id {last}, "
            f"{data.class_names[-1]!r}. Ids are read as 1 to {last}, 0 for no class; if they count from 0, pass "
            "--reduce_labels false."
        )


def open_label_map(source, colours: dict[tuple[int, int, int], int] | None = None) -> np.ndarray:
    """
    The ids (height, width), int64, of a label map in grey or with a palette, whose indices are the ids.

    Args:
        source: As for `open_image`.
        colours: The class of each (R, G, B), for a label map in colour.

    Raises:
        `ValueError`: if it cannot be read, or is in colour without `colours` or with others; names the file.
    """
    try:
        image = ImageOps.exif_transpose(load_image(source))
    except Exception as error:  # Pillow's readers raise any kind on damaged files
        raise ValueError(f"{image_name(source)}: {error}") from error
    if image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.int64)
    if image.mode not in ("RGB", "RGBA") or colours is None:
        raise ValueError(
            f"{image_name(source)} must be grey or have a palette, its values the class ids, got mode {image.mode}. A "
            "label map in colour needs the class of each colour."
        )
    pixels = np.asarray(image)[..., :3].astype(np.int64) @ np.array([65536, 256, 1])
    present, positions = np.unique(pixels, return_inverse=True)
    names = [(code // 65536, code // 256 % 256, code % 256) for code in present.tolist()]
    unknown = [name for name in names if name not in colours]
    if unknown:
        raise ValueError(f"{image_name(source)} has colours of no class: {listed(unknown)}.")
    return np.array([colours[name] for name in names], np.int64)[positions].reshape(pixels.shape)


def find_label_map_splits(folder: str | Path) -> dict[str, tuple[Path, Path]]:
    """
    The folders of pictures and of label maps of `train` and `validation`, or of the one that there is.

    Looked for are `images/NAME` with `annotations/NAME` or `labels/NAME`, as ADE20K has them, and `NAME` with
    `semantic_NAME`. NAME is `train` or `training`; `validation`, `valid`, `val` or `test`.
    """
    folder, splits = Path(folder), {}
    for split, names in SPLITS.items():
        pairs = [
            pair
            for name in names
            for pair in (
                (folder / "images" / name, folder / "annotations" / name),
                (folder / "images" / name, folder / "labels" / name),
                (folder / name, folder / f"semantic_{name}"),
            )
        ]
        found = [pair for pair in pairs if pair[0].is_dir() and pair[1].is_dir()]
        splits |= {split: found[0]} if found else {}
    if not splits:
        raise ValueError(
            f"There are no pictures with label maps in {folder}: neither images/training and annotations/training nor "
            "train and semantic_train."
        )
    return splits


def read_class_names(source: str | Path, reduce_labels: bool = False) -> list[str]:
    """
    Class names from a JSON file, `{"0": "wall", "1": "building", ...}`, from a table with the columns `Idx`, counted
    from 1, and `Name`, separated by tabs, or from the file that a data set's folder has.

    Args:
        source: The file or the folder.
        reduce_labels: See [`SemanticData`]. A table is for label maps that count from 1 as it does.

    Raises:
        `ValueError`: if there is no such file, its ids are not 0, 1, 2 and so on, or it is a table and label maps are
            said to count from 0; names the file.
    """
    file = Path(source)
    if file.is_dir():
        found = [file / name for name in CLASS_NAME_FILES if (file / name).is_file()]
        if not found:
            raise ValueError(f"Nothing names the classes: there is no {' nor '.join(CLASS_NAME_FILES)} in {source}.")
        file = found[0]
    if file.suffix == ".txt" and not reduce_labels:
        raise ValueError(
            f"{file} counts classes from 1, so label maps do too, with 0 for pixels of no class: pass --reduce_labels. "
            "Names for label maps that count from 0 are given as id2label.json."
        )
    try:
        names = _names_of_table(file) if file.suffix == ".txt" else json.loads(file.read_text(encoding="utf-8"))
        names = {int(label): str(name) for label, name in names.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f'{file} must be JSON like {{"0": "wall", "1": "building"}}: {error}') from error
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{file}: ids must be 0, 1, 2 and so on, got {listed(sorted(names))}.")
    return [names[label] for label in range(len(names))]


def _names_of_table(file: Path) -> dict[int, str]:
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t")
        if not {"Idx", "Name"} <= set(rows.fieldnames or ()):
            raise ValueError("a table needs the columns Idx and Name")
        return {int(row["Idx"]) - 1: row["Name"] for row in rows}


def read_label_maps(images_dir: str | Path, labels_dir: str | Path, class_names: list[str], **options) -> SemanticData:
    """
    Pairs pictures with the label maps of the same name, in the same sub-folder; the ending may differ.

    Args:
        images_dir, labels_dir: Folders of pictures and of label maps.
        class_names, options: See [`SemanticData`].

    Raises:
        `ValueError`: if there are none, or one of a pair is missing; names the files.
    """
    images, maps = _files_by_name(Path(images_dir)), _files_by_name(Path(labels_dir))
    for name, there, missing, what in (
        ("pictures", images, maps, "label map"),
        ("label maps", maps, images, "picture"),
    ):
        alone = [there[key] for key in sorted(there.keys() - missing.keys())]
        if alone:
            raise ValueError(f"{len(alone)} {name} have no {what} of the same name: {listed(alone)}.")
    names, undecoded = sorted(images), ImageFeature(decode=False)
    pictures = Dataset.from_dict(
        {"image": [str(images[name]) for name in names], "label_map": [str(maps[name]) for name in names]},
        Features({"image": undecoded, "label_map": undecoded}),
    )
    return SemanticData(f"{images_dir} with {labels_dir}", pictures, np.arange(len(names)), class_names, **options)


def _files_by_name(folder: Path) -> dict[str, Path]:
    """The pictures of a folder and its sub-folders by their path in it without the ending."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    endings, files, others = Image.registered_extensions(), {}, []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix.lower() not in endings:
            others.append(path)
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise ValueError(f"{files[name]} and {path} have the same name.")
        files[name] = path
    if others:
        logger.warning(f"Not pictures by their names, and not read: {listed(others)}.")
    if not files:
        raise ValueError(f"There are no pictures in {folder}.")
    return files


def pick_label_maps(
    splits: DatasetDict,
    source: str,
    class_names: list[str],
    image_column: str = "image",
    label_column: str | None = None,
    **options,
) -> dict[str, SemanticData]:
    """
    Label maps from the datasets library.

    Args:
        splits: The data set.
        source: Its name, for messages.
        image_column, label_column: Columns of pictures; that of the label maps is found if it has a usual name.
        class_names, options: See [`SemanticData`].
    """
    features = next(iter(splits.values())).features
    if label_column is None:
        label_column = next((name for name in LABEL_COLUMNS if name in features), None)
    for column in (image_column, label_column):
        if not isinstance(features.get(column), ImageFeature):
            raise ValueError(f"{source} has no column {column!r} of images; it has {', '.join(features)}.")
    data = {}
    for split, rows in splits.items():
        rows = rows.select_columns([image_column, label_column])
        rows = rows.rename_columns({image_column: "image", label_column: "label_map"})
        for column in ("image", "label_map"):
            rows = rows.cast_column(column, ImageFeature(decode=False))
        data[split] = SemanticData(f"{source}, split {split}", rows, np.arange(len(rows)), class_names, **options)
    return data
