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
"""Labelled pictures for image classification: from folders, the datasets library, or a saved data set."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk

from .augmentation import derive_seed, random_numbers_from
from .images import image_name, image_problem, open_image


logger = logging.getLogger(__name__)

# The first that exists is read.
SPLIT_FOLDERS = {"train": ["train"], "validation": ["validation", "valid", "val", "test"]}
CLASS_FOLDERS = "train/CLASS/*.jpg and val/CLASS/*.jpg, a folder for each class"
METADATA_FILES = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}


def load_pictures(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    layout: str = CLASS_FOLDERS,
) -> tuple[DatasetDict, dict[str, list[str]]]:
    """
    Loads the splits `train` and `validation` of a data set, or the one that there is.

    Args:
        dataset_name: A folder with `train` and `validation`, `valid`, `val` or `test` folders in it, or with the class
            folders themselves; a folder written by `save_to_disk`; or a data set's name on the Hub.
        dataset_config_name: Configuration of a data set of the Hub.
        train_dir, validation_dir: Folders with one folder of pictures for each class, instead of `dataset_name`.
        layout: What an error says that a folder would hold.

    Returns:
        The splits, and for each split of a picture folder a line for every file that is no picture by its name.
    """
    if dataset_name is not None and (train_dir is not None or validation_dir is not None):
        raise ValueError(f"Pass either --dataset_name ({dataset_name}) or --train_dir and --validation_dir, not both.")
    if dataset_name is None:
        folders = {"train": train_dir, "validation": validation_dir}
        folders = {split: Path(folder) for split, folder in folders.items() if folder is not None}
        if not folders:
            raise ValueError("Pass --dataset_name, --train_dir or --validation_dir: there are no pictures to read.")
        return read_picture_folders(folders)
    folder = Path(dataset_name)
    if not folder.is_dir():
        return _name_splits(_load_from_hub(dataset_name, dataset_config_name, layout)), {}
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _name_splits(load_from_disk(dataset_name)), {}
    return read_picture_folders(_find_split_folders(folder))


def _load_from_hub(name: str, config_name: str | None, layout: str) -> DatasetDict:
    try:
        return load_dataset(name, config_name)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"--dataset_name {name}: no such folder here, and from the Hub: {error}\nA folder would hold {layout}."
        ) from error


def _name_splits(splits: DatasetDict | Dataset) -> DatasetDict:
    if isinstance(splits, Dataset):
        return DatasetDict(train=splits)
    named = {}
    for split, names in SPLIT_FOLDERS.items():
        found = [name for name in names if name in splits]
        named |= {split: splits[found[0]]} if found else {}
    if not named:
        raise ValueError(f"There is no training or validation split; the data set has {', '.join(splits)}.")
    return DatasetDict(named)


def _find_split_folders(folder: Path) -> dict[str, Path]:
    present = {path.name: path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    # A class may be called "test" or "valid": among class folders that is no split.
    split_names = {name for names in SPLIT_FOLDERS.values() for name in names}
    if "train" not in present and not present.keys() <= split_names:
        return {"train": folder}
    folders = {}
    for split, names in SPLIT_FOLDERS.items():
        found = [present[name] for name in names if name in present]
        folders |= {split: found[0]} if found else {}
    others = present.keys() - {path.name for path in folders.values()}
    if others:
        logger.warning(f"Not read in {folder}: {', '.join(sorted(others))}.")
    return folders or {"train": folder}


def read_picture_folders(folders: dict[str, Path]) -> tuple[DatasetDict, dict[str, list[str]]]:
    """
    Reads folders of class folders, one for each split, as the datasets library's "imagefolder" does.

    That loader silently leaves out what has no picture's name, so that is returned too, a line for each file. Hidden
    files are no data. An empty folder is an error.
    """
    files = {split: _files_in(folder) for split, folder in folders.items()}
    patterns = {split: _patterns(folder) for split, folder in folders.items()}
    try:
        splits = load_dataset("imagefolder", data_files=patterns, drop_labels=False)
    except ValueError as error:
        raise ValueError(f"There are no pictures in {', '.join(map(str, folders.values()))}: {error}") from error
    unread = {split: [] for split in folders}
    for split, folder in folders.items():
        read = {Path(value["path"]) for value in splits[split].cast_column("image", Image(decode=False))["image"]}
        has_metadata = any(path.name in METADATA_FILES for path in files[split])
        for path in files[split]:
            if path not in read and path.name not in METADATA_FILES:
                unread[split].append(f"{path}: not a picture by its name")
        if not has_metadata:
            _check_class_folders(folder, read)
    return splits, unread


def _patterns(folder: Path) -> list[str]:
    """For a folder's own files, and one for each folder in it, since "**" follows no links to folders."""
    entries = [path for path in sorted(folder.resolve().iterdir()) if not path.name.startswith(".")]
    # Names are no patterns themselves.
    files = [glob.escape(str(folder.resolve())) + "/*"] if any(path.is_file() for path in entries) else []
    return files + [glob.escape(str(path)) + "/**" for path in entries if path.is_dir()]


def _check_class_folders(folder: Path, pictures: set[Path]) -> None:
    misplaced = [str(path) for path in sorted(pictures) if len(path.relative_to(folder.resolve()).parts) != 2]
    if misplaced:
        raise ValueError(f"Not directly in a class folder of {folder}: {', '.join(misplaced)}.")
    classes = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    without = sorted(classes - {path.parent.name for path in pictures})
    if without:
        raise ValueError(f"There is no picture in {folder} of {', '.join(without)}.")


def _files_in(folder: Path) -> list[Path]:
    """All files of a folder but hidden ones; raises `ValueError` if it or one of its folders is empty."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    found = []
    for parent, folders, names in os.walk(folder.resolve(), followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        if not folders and not names:
            raise ValueError(f"{parent} is empty.")
        found += [Path(parent, name) for name in names]
    return found


def pick_columns(splits: DatasetDict, image_column: str | None, label_column: str | None) -> DatasetDict:
    """
    Keeps the columns `image` (undecoded) and `label` (`ClassLabel`).

    A column that is not named is found: `image` or the only column of pictures, `label` or the only column of classes.
    Labels may be classes, words or numbers from 0 up; raises `ValueError` for anything else.
    """
    features = next(iter(splits.values())).features
    image_column = _find_column("image_column_name", image_column, ["image", "img"], features, Image)
    label_column = _find_column("label_column_name", label_column, ["label", "labels"], features, ClassLabel)
    splits = splits.select_columns([image_column, label_column])
    splits = splits.rename_columns({image_column: "image", label_column: "label"})
    splits = splits.cast_column("image", Image(decode=False))
    if not isinstance(features[label_column], ClassLabel):
        splits = splits.cast_column("label", ClassLabel(names=_class_names(splits, features[label_column])))
    return splits


def _find_column(flag: str, name: str | None, usual: list[str], features: Features, kind: type) -> str:
    if name is None:
        of_kind = [column for column, feature in features.items() if isinstance(feature, kind)]
        candidates = [column for column in usual if column in features] + (of_kind if len(of_kind) == 1 else [])
        name = candidates[0] if candidates else None
    if name not in features:
        reason = "which column is it?" if name is None else f"{name!r} is none of the columns."
        raise ValueError(f"--{flag}: {reason} The data set has {', '.join(features)}.")
    return name


def _class_names(splits: DatasetDict, feature) -> list[str]:
    values = np.unique(np.concatenate([np.array(rows["label"][:]) for rows in splits.values()]))
    if values.dtype.kind == "U":
        return values.tolist()
    if values.dtype.kind not in "iu":
        raise ValueError(f"Labels must be classes, words or whole numbers, got {feature}.")
    if values[0] < 0 or ("train" in splits and values[-1] != len(values) - 1):
        raise ValueError(f"Labels that are numbers must be 0, 1, 2 and so on without gaps, got {values.tolist()}.")
    return [str(label) for label in range(values[-1] + 1)]


def check_labels(rows: Dataset, split: str, need_all_classes: bool) -> None:
    """Raises `ValueError` if there is no picture, a label outside its classes or, if asked for, a class without one."""
    names = rows.features["label"].names
    labels = rows["label"][:]
    if not labels:
        raise ValueError(f"The {split} split holds no picture.")
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < len(names):
            raise ValueError(
                f"Label {label} of {image_name(rows[row]['image'], row)} in the {split} split is not in "
                f"[0, {len(names)})."
            )
    present = set(labels)
    missing = [name for label, name in enumerate(names) if label not in present]
    if missing:
        message = f"The {split} split has no picture of {len(missing)} of {len(names)} classes: {', '.join(missing)}."
        if need_all_classes:
            raise ValueError(message)
        logger.warning(message)


def split_off_validation(splits: DatasetDict, fraction: float, seed: int) -> DatasetDict:
    """Takes a share of every class of the training split for a validation split."""
    rows = splits["train"]
    try:
        parts = rows.train_test_split(test_size=fraction, seed=seed, stratify_by_column="label")
    except ValueError as error:
        raise ValueError(f"--train_val_split {fraction} of {len(rows)} pictures: {error}") from error
    return DatasetDict(train=parts["train"], validation=parts["test"])


def corrupt_rows(rows: Dataset, num_proc: int | None = None) -> dict[int, str]:
    """Reads every picture, and returns the rows of those that cannot be read with their file and the reason."""
    problems = rows.map(
        lambda image: {"problem": image_problem(image)},
        input_columns="image",
        remove_columns=rows.column_names,
        features=Features({"problem": Value("string")}),
        num_proc=num_proc,
        desc="Checking the pictures",
    )["problem"]
    found = {row: problem for row, problem in enumerate(problems) if problem is not None}
    return {row: f"{image_name(rows[row]['image'], row)}: {problem}" for row, problem in found.items()}


def drop_corrupt(
    splits: DatasetDict, unread: dict[str, list[str]], skip_corrupt: bool, num_proc: int | None = None
) -> tuple[DatasetDict, list[str]]:
    """
    Leaves out the pictures that cannot be read, or raises `ValueError` if these are not to be skipped.

    Returns the splits without them, and one line for every file left out, `unread` included.
    """
    corrupt = {split: corrupt_rows(rows, num_proc) for split, rows in splits.items()}
    problems = [problem for split in splits for problem in [*unread.get(split, []), *corrupt[split].values()]]
    if not problems:
        return splits, []
    listing = "\n".join(f"  {problem}" for problem in problems)
    if not skip_corrupt:
        raise ValueError(
            f"{len(problems)} files cannot be read as pictures:\n{listing}\n"
            "Repair or remove them, or go on without them with --skip_corrupt."
        )
    logger.warning(f"Going on without {len(problems)} files that cannot be read as pictures:\n{listing}")
    for split, rows in splits.items():
        kept = rows.select([row for row in range(len(rows)) if row not in corrupt[split]])
        lost = Counter(rows["label"][:]).keys() - Counter(kept["label"][:]).keys()
        if lost:
            names = rows.features["label"].int2str(sorted(lost))
            raise ValueError(f"No picture of {', '.join(names)} in the {split} split can be read:\n{listing}")
        splits[split] = kept
    return splits, problems


def match_classes(names: list[str], label2id: dict[str, int]) -> list[int]:
    """
    The ids that a model knows the classes of a data set by.

    A model that has numbers or no names for its classes takes those of the data set in their order. Raises `ValueError`
    for classes that the model does not know.
    """
    unknown = [name for name in names if name not in label2id]
    if not unknown:
        return [label2id[name] for name in names]
    unnamed = all(name == f"LABEL_{label}" for name, label in label2id.items())
    numbered = names == [str(label) for label in range(len(names))]
    if (unnamed and len(names) == len(label2id)) or (numbered and len(names) <= len(label2id)):
        logger.warning("The model's classes have other names than the data set's; they are matched by their order.")
        return list(range(len(names)))
    raise ValueError(f"The model does not know the classes {', '.join(unknown)}; it knows {', '.join(label2id)}.")


class ImageClassificationDataset(torch.utils.data.Dataset):
    """
    Rows of `image` and `label` as examples: `pixel_values` (3, height, width), float32, and `labels`, a class id.

    With a `seed` the transform's random numbers depend on (seed, epoch, row) alone, and examples hold their own `seed`
    and the picture's `name` too. Trainer's epochs are told by `set_epoch`.
    """

    def __init__(self, rows: Dataset, transform: Callable, class_ids: list[int], seed: int | None = None):
        self.rows, self.transform, self.class_ids, self.seed = rows, transform, class_ids, seed
        # Shared with data workers that live longer than an epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int):
        self.epoch.fill_(epoch)

    def __getitem__(self, row: int) -> dict:
        values = self.rows[row]
        image, label = open_image(values["image"]), self.class_ids[values["label"]]
        if self.seed is None:
            return {"pixel_values": self.transform(image), "labels": label}
        seed = derive_seed(self.seed, self.epoch.item(), row)
        with random_numbers_from(seed):
            pixel_values = self.transform(image)
        return {"pixel_values": pixel_values, "labels": label, "seed": seed, "name": image_name(values["image"], row)}
