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
Pictures in shards, files that hold many of them: TAR archives as WebDataset has them, or Parquet. Disks and networks
read them much faster than single files.

    python -m clusterformer_hf.data.shards --dataset_name my_pictures --output my_shards

writes `my_shards/train-00000.tar` and so on, `validation-00000.tar` and `id2label.json` from a folder of class folders.
In an archive, `NAME.jpg`, a picture of any format, and `NAME.cls`, the class as a number, make a sample. The order is
random, so that pictures of one class do not come together.
"""

import io
import json
import logging
import posixpath
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Image, IterableDataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError
from transformers import HfArgumentParser

from .classification import (
    SPLIT_FOLDERS,
    check_labels,
    drop_corrupt,
    load_pictures,
    pick_columns,
    split_off_validation,
)
from .folders import require_new
from .label_maps import read_class_names


logger = logging.getLogger(__name__)

# How the datasets library calls what reads a file with this ending.
READERS = {".tar": "webdataset", ".parquet": "parquet"}
LABEL_FILE = "id2label.json"


@dataclass
class PictureShards:
    """
    Labelled pictures of one split, in shards. Only [`PictureShards.read`] opens pictures.

    Args:
        paths: The shards, local or `hf://` and others that fsspec opens.
        sizes: Number of pictures in each.
        class_names: The names of the classes 0, 1, 2 and so on.
        image_column, label_column: See [`find_columns`].
    """

    paths: list[str]
    sizes: list[int]
    class_names: list[str]
    image_column: str | None = None
    label_column: str | None = None

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self, shard: int, start: int, stop: int):
        """
        The pictures `start` to `stop` of a shard, undecoded: (a name, what [`open_image`] takes, the class).

        Raises:
            `ValueError`: for a sample that has no picture or no class of `class_names`; names it.
        """
        rows = open_shard(self.paths[shard]).skip(start).take(stop - start)
        image_column, label_column = find_columns(rows, self.image_column, self.label_column)
        # `iter`, since in a loader's worker a plain loop would give the only shard to the first worker alone.
        for number, batch in enumerate(rows.iter(batch_size=1), start):
            row = {column: values[0] for column, values in batch.items()}
            name = f"{self.paths[shard]}: {row.get('__key__', number)}"
            label = row[label_column]
            if isinstance(label, str) and label in self.class_names:
                label = self.class_names.index(label)
            if row[image_column] is None or not isinstance(label, int) or not 0 <= label < len(self.class_names):
                raise ValueError(
                    f"{name} has {'no' if row[image_column] is None else 'a'} picture and the class {label!r}, which "
                    f"should be in [0, {len(self.class_names)})."
                )
            yield name, row[image_column], label


def open_shard(path: str) -> IterableDataset:
    """A shard through the datasets library, pictures undecoded."""
    rows = load_dataset(READERS[_ending(path)], data_files=[path], split="train", streaming=True)
    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


def find_columns(
    rows: Dataset | IterableDataset, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """
    The column of pictures and that of classes, where they are not named: the only ones.

    Raises:
        `ValueError`: if there is not one of each, or none of that name.
    """
    columns = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    images = columns if image_column is None else [name for name in columns if name == image_column]
    names = ("cls", "label", "labels") if label_column is None else (label_column,)
    labels = [name for name in names if name in rows.features]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"Samples of shards need one picture ({image_column or 'any name'}) and one class ({' or '.join(names)}), "
            f"got {', '.join(rows.features)}. Others are chosen by --image_column_name and --label_column_name."
        )
    return images[0], labels[0]


def find_shards(
    name: str, config_name: str | None = None, image_column: str | None = None, label_column: str | None = None
) -> dict[str, PictureShards]:
    """
    The splits `train` and `validation` of a folder of shards or of a data set on the Hub, or the one that there is.

    Files are told apart by their names, `train-00000.tar`, `validation-00000.parquet`, as the datasets library does.

    Args:
        name, config_name: The folder, or the data set and its configuration.
        image_column, label_column: See [`find_columns`].

    Raises:
        `ValueError`: if there are no shards, or nothing names the classes; says what is expected.
    """
    expected = (
        f"Expected are shards, {name}/train-00000.tar or .parquet and so on, validation-00000.tar, and {LABEL_FILE}. "
        "python -m clusterformer_hf.data.shards writes them."
    )
    try:
        files = load_dataset_builder(name, config_name).config.data_files or {}
    except (FileNotFoundError, ConnectionError, DatasetNotFoundError, ValueError) as error:
        raise ValueError(f"There are no shards in {name}: {error}\n{expected}") from error
    splits = {}
    for split, names in SPLIT_FOLDERS.items():
        found = next((list(map(str, files[each])) for each in names if each in files), [])
        if found and any(_ending(path) not in READERS for path in found):
            raise ValueError(f"{found[0]} is no shard. {expected}")
        if found:
            class_names = _class_names(name, found[0], image_column, label_column)
            sizes = [count_samples(path) for path in found]
            splits[split] = PictureShards(found, sizes, class_names, image_column, label_column)
    if not splits:
        raise ValueError(f"There are no shards in {name}. {expected}")
    return splits


def _ending(path: str) -> str:
    return posixpath.splitext(path)[1]


def _class_names(name: str, path: str, *columns: str | None) -> list[str]:
    if Path(name, LABEL_FILE).is_file():
        return read_class_names(Path(name, LABEL_FILE))
    rows = open_shard(path)
    feature = rows.features[find_columns(rows, *columns)[1]]
    if not isinstance(feature, ClassLabel):
        raise ValueError(f'Nothing names the classes of {path}: write {name}/{LABEL_FILE}, {{"0": "cat", "1": "dog"}}.')
    return feature.names


def count_samples(path: str) -> int:
    """Number of samples in a shard. Reads an archive's headers, or what Parquet says of itself."""
    with fsspec.open(path, "rb") as file:
        if _ending(path) == ".parquet":
            return pyarrow.parquet.ParquetFile(file).metadata.num_rows
        number, last = 0, None
        with tarfile.open(fileobj=file) as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                key = (folder, base.split(".")[0])
                if member.isfile() and base and not base.startswith("."):
                    number += key != last
                    last = key
        return number


def load_whole(shards: PictureShards) -> Dataset:
    """All pictures of a split as rows of `image` and `label`, for evaluation: they go through the library's cache."""
    rows = load_dataset(READERS[_ending(shards.paths[0])], data_files=shards.paths, split="train")
    image_column, label_column = find_columns(rows, shards.image_column, shards.label_column)
    rows = rows.select_columns([image_column, label_column])
    rows = rows.rename_columns({image_column: "image", label_column: "label"}).cast_column("image", Image(decode=False))
    return rows.cast_column("label", ClassLabel(names=shards.class_names))


def write_shards(rows: Dataset, output: Path, split: str, shard_size: int, seed: int = 0):
    """Writes `output/SPLIT-00000.tar` and so on from rows of `image` (undecoded) and `label`, in random order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    for shard, start in enumerate(range(0, len(rows), shard_size)):
        path = output / f"{split}-{shard:05}.tar"
        with tarfile.open(path, "w") as archive:
            for row in order[start : start + shard_size].tolist():
                value = rows[row]
                content = value["image"]["bytes"] or Path(value["image"]["path"]).read_bytes()
                # One name for all formats: samples of an archive must have the same fields, and readers tell a
                # picture's format by its bytes.
                _add(archive, f"{row:08}.jpg", content)
                _add(archive, f"{row:08}.cls", str(value["label"]).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@dataclass
class Arguments:
    """Which pictures become shards."""

    dataset_name: str = field(
        metadata={"help": "A folder of class folders, one of `save_to_disk`, or a name on the Hub."}
    )
    output: str = field(metadata={"help": "Folder to write; it must be empty or not exist yet."})
    shard_size: int = field(default=1000, metadata={"help": "Pictures in a shard; at least as many shards as workers."})
    train_val_split: float = field(default=0.0, metadata={"help": "Share for validation where there is no such split."})
    skip_corrupt: bool = field(default=False, metadata={"help": "Leave out files that cannot be read as pictures."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that check the pictures."})
    seed: int = field(default=0, metadata={"help": "Of the order."})


def main(args: list[str] | None = None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args)
    output = Path(args.output)
    require_new(output)
    splits, unread = load_pictures(args.dataset_name)
    splits = pick_columns(splits, None, None)
    for split, rows in splits.items():
        check_labels(rows, split, need_all_classes=split == "train")
    if "validation" not in splits and args.train_val_split:
        splits = split_off_validation(splits, args.train_val_split, args.seed)
    splits, _ = drop_corrupt(splits, unread, args.skip_corrupt, args.num_proc)
    output.mkdir(parents=True, exist_ok=True)
    names = dict(enumerate(next(iter(splits.values())).features["label"].names))
    (output / LABEL_FILE).write_text(json.dumps(names, indent=1), encoding="utf-8")
    for split, rows in splits.items():
        write_shards(rows, output, split, args.shard_size, args.seed)
        print(f"{len(rows):,} pictures are in {output}/{split}-*.tar.")


if __name__ == "__main__":
    main()
