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
"""Reading, checking and augmenting pictures."""

import io
import os
import shutil
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ConvNextImageProcessor, ViTImageProcessor
from transformers.image_utils import load_image

from clusterformer_hf.data.augmentation import (
    AugmentationArguments,
    ClassificationCollator,
    EvalTransform,
    TrainTransform,
    processed_size,
    random_numbers_from,
)
from clusterformer_hf.data.classification import (
    ImageClassificationDataset,
    check_labels,
    drop_corrupt,
    load_pictures,
    match_classes,
    pick_columns,
    split_off_validation,
)
from clusterformer_hf.data.images import image_problem, open_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def colours(height=6, width=9) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(pixels: np.ndarray) -> bytes:
    """A 16-bit PNG; Pillow writes none in colour."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_8_bit_modes_are_read_as_pipeline_reads_them(mode, tmp_path):
    path = str(tmp_path / f"picture.{'tif' if mode in ('CMYK', 'YCbCr') else 'png'}")
    image = colours().convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(100)
    image.save(path)
    assert Image.open(path).mode == mode
    ours = open_image(path)
    assert ours.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(load_image(path)))


def test_transparent_palette(tmp_path):
    path = str(tmp_path / "picture.png")
    colours().convert("P").save(path, transparency=bytes([0, 128]))
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(load_image(path)))


@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "rgb", "rgba"])
def test_16_bits_are_scaled_and_not_clipped(kind):
    pixels = np.linspace(0, 65535, 48, dtype=np.uint16).reshape(6, 8)
    file = io.BytesIO()
    if kind == "pgm":
        file.write(b"P5 8 6 65535\n" + pixels.astype(">u2").tobytes())
    elif kind == "tif":
        Image.fromarray(pixels).save(file, format="TIFF")
    else:
        file.write(png(np.stack([pixels] * {"png": 1, "rgb": 3, "rgba": 4}[kind], axis=-1)))
    image = open_image(file.getvalue())
    assert image.mode == "RGB"
    for channel in range(3):
        np.testing.assert_array_equal(np.asarray(image)[..., channel], pixels // 256)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    """Stored turned or mirrored, each picture comes out upright."""
    upright = colours()
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # Image.Transpose
    stored = upright
    for transpose in undo.get(orientation, []):
        stored = stored.transpose(Image.Transpose(transpose))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture.png"
    stored.save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(upright))


def test_sources(tmp_path):
    path = tmp_path / "picture.png"
    colours().save(path)
    content = path.read_bytes()
    sources = [path, str(path), content, {"path": str(path), "bytes": None}, {"path": "x.png", "bytes": content}]
    for source in [*sources, Image.open(path)]:
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(colours()))


def write_bad_pictures(folder) -> dict[str, str]:
    """One file of every bad kind, and a word of the reason that must be given for it."""
    colours(60, 60).save(folder / "whole.jpg")
    jpeg = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.png").write_text("no picture")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(folder / "floats.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(folder / "wide.tif")
    return {"cut.jpg": "truncated", "empty.png": "not a picture", "words.png": "not a picture"} | {
        "floats.tif": "floating-point",
        "wide.tif": "70000",
    }


def test_unreadable_pictures_say_file_and_reason(tmp_path):
    for name, reason in write_bad_pictures(tmp_path).items():
        assert reason in image_problem(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
            open_image(tmp_path / name)
    assert "No such file" in image_problem(tmp_path / "missing.png")
    assert "no picture" in image_problem(None)


def write_folder(root, classes=("cat", "dog"), splits=("train", "val"), count=4):
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.full((8, 8, 3), 40 * number + index, np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def read(root, skip_corrupt=False, **kwargs):
    splits, unread = load_pictures(str(root), **kwargs)
    return drop_corrupt(pick_columns(splits, None, None), unread, skip_corrupt)


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "test"])
def test_folder_with_splits(validation, tmp_path):
    root = write_folder(tmp_path / "pictures [1]", classes=("test", "train", "valid"), splits=("train", validation))
    splits, skipped = read(root)
    assert skipped == [] and sorted(splits) == ["train", "validation"]
    for rows in splits.values():
        assert rows.features["label"].names == ["test", "train", "valid"]
        assert sorted(rows["label"][:]) == [0] * 4 + [1] * 4 + [2] * 4


def test_class_folders_alone_are_split_by_seed(tmp_path):
    root = write_folder(tmp_path, classes=("cat", "dog", "val"), splits=("pictures",), count=10) / "pictures"
    splits, _ = read(root)
    assert splits["train"].features["label"].names == ["cat", "dog", "val"]
    parts = [split_off_validation(splits, 0.3, seed) for seed in (1, 1, 2)]
    paths = [sorted(value["path"] for value in part["validation"]["image"]) for part in parts]
    assert paths[0] == paths[1] != paths[2]
    assert sorted(parts[0]["validation"]["label"][:]) == [0] * 3 + [1] * 3 + [2] * 3
    with pytest.raises(ValueError, match="--train_val_split 0.01 of 30 pictures"):
        split_off_validation(splits, 0.01, 0)


def test_separate_folders(tmp_path):
    root = write_folder(tmp_path)
    splits, _ = load_pictures(train_dir=str(root / "train"), validation_dir=str(root / "val"))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 8, "validation": 8}
    with pytest.raises(ValueError, match="not both"):
        load_pictures(str(root), train_dir=str(root / "train"))
    with pytest.raises(ValueError, match="no pictures to read"):
        load_pictures()
    with pytest.raises(ValueError, match="nowhere is no folder"):
        load_pictures(train_dir=str(root / "nowhere"))


def test_linked_class_folders(tmp_path):
    """A choice of classes by links, each under the link's name."""
    root = write_folder(tmp_path)
    (tmp_path / "links").mkdir()
    for name in ("kitten", "puppy"):
        os.symlink(root / "train" / {"kitten": "cat", "puppy": "dog"}[name], tmp_path / "links" / name)
    splits, skipped = read(tmp_path / "links")
    assert splits["train"].features["label"].names == ["kitten", "puppy"] and len(splits["train"]) == 8
    assert skipped == []


def test_folder_with_metadata(tmp_path):
    """The datasets library's way of naming labels in a table."""
    root = tmp_path / "train"
    root.mkdir()
    for index in range(4):
        colours().save(root / f"{index}.png")
    (root / "notes.txt").write_text("no picture")
    (root / "metadata.csv").write_text("file_name,label\n0.png,b\n1.png,a\n2.png,b\n3.png,a\n")
    splits, skipped = read(tmp_path, skip_corrupt=True)
    assert splits["train"].features["label"].names == ["a", "b"] and splits["train"]["label"][:] == [1, 0, 1, 0]
    assert skipped == [f"{root / 'notes.txt'}: not a picture by its name"]


def test_all_bad_files_of_a_folder_are_listed(tmp_path):
    root = write_folder(tmp_path)
    reasons = write_bad_pictures(root / "train" / "dog")
    (root / "val" / "cat" / "notes.txt").write_text("no picture")
    (root / "val" / "cat" / ".hidden").write_text("no data")
    reasons["notes.txt"] = "not a picture by its name"
    with pytest.raises(ValueError, match="6 files cannot be read as pictures") as error:
        read(root)
    for name, reason in reasons.items():
        folder = "val/cat" if name == "notes.txt" else "train/dog"
        assert any(f"{root}/{folder}/{name}: " in line and reason in line for line in str(error.value).split("\n"))

    splits, skipped = read(root, skip_corrupt=True)
    assert len(skipped) == 6 and {split: len(rows) for split, rows in splits.items()} == {"train": 8, "validation": 8}
    assert not any("hidden" in line for line in skipped)


def test_bad_folders(tmp_path):
    root = write_folder(tmp_path)
    strays = [root / "train" / "cat" / "deep" / "1.png", root / "train" / "stray.png"]
    strays[0].parent.mkdir()
    for path in strays:
        colours().save(path)
    with pytest.raises(ValueError, match=f"Not directly in a class folder of .*train: {strays[0]}, {strays[1]}"):
        read(root)
    shutil.rmtree(strays[0].parent)
    strays[1].unlink()
    (root / "train" / "notes.txt").write_text("no picture")
    (tmp_path / "text" / "cat").mkdir(parents=True)
    shutil.copy(root / "train" / "notes.txt", tmp_path / "text" / "cat")
    with pytest.raises(ValueError, match="There are no pictures in .*text"):
        load_pictures(str(tmp_path / "text"))
    assert read(root, skip_corrupt=True)[1] == [f"{root}/train/notes.txt: not a picture by its name"]
    (root / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match="bird is empty"):
        read(root)
    (root / "train" / "bird" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="There is no picture in .*train of bird"):
        read(root, skip_corrupt=True)
    (root / "train" / "bird" / "1.png").write_text("no picture")
    with pytest.raises(ValueError, match="No picture of bird in the train split can be read"):
        read(root, skip_corrupt=True)


def test_saved_datasets(tmp_path):
    rows = Dataset.from_dict({"photo": [colours()] * 4, "kind": ["b", "a", "b", "a"]})
    rows = rows.cast_column("photo", datasets.Image())
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    for name, expected in (("one", ["train"]), ("two", ["train", "validation"])):
        splits, _ = load_pictures(str(tmp_path / name))
        assert list(splits) == expected
        picked = pick_columns(splits, None, "kind")["train"]
        assert picked.column_names == ["image", "label"] and picked.features["label"].names == ["a", "b"]
        np.testing.assert_array_equal(np.asarray(open_image(picked[0]["image"])), np.asarray(colours()))
    with pytest.raises(ValueError, match="--label_column_name: which column is it.* photo, kind"):
        pick_columns(splits, None, None)
    with pytest.raises(ValueError, match="--image_column_name: 'picture' is none of the columns"):
        pick_columns(splits, "picture", "kind")


def test_corrupt_rows_without_a_path(tmp_path):
    file = io.BytesIO()
    colours().save(file, format="PNG")
    content = [{"bytes": content, "path": None} for content in (file.getvalue(), b"junk", file.getvalue())]
    rows = Dataset.from_dict({"image": content, "label": [0, 0, 1]}).cast_column("image", datasets.Image())
    splits = pick_columns(DatasetDict(train=rows), None, None)
    kept, skipped = drop_corrupt(splits, {}, skip_corrupt=True, num_proc=2)
    assert len(skipped) == 1 and skipped[0].startswith("row 1: not a picture") and kept["train"]["label"][:] == [0, 1]


def test_unknown_dataset_name():
    with pytest.raises(
        ValueError, match="--dataset_name nobody/nothing: no such folder here, and from the Hub: .*reach"
    ):
        load_pictures("nobody/nothing")


def labelled(labels, feature) -> Dataset:
    features = Features({"image": datasets.Image(decode=False), "label": feature})
    return Dataset.from_dict(
        {"image": [{"path": f"{i}.png", "bytes": b""} for i in range(len(labels))], "label": labels}, features
    )


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 1, -1], r"Label -1 of 2.png in the train split is not in \[0, 2\)"),
        ([0, 1, None], r"Label None of 2.png in the train split is not in \[0, 2\)"),
        ([0, 0, 0], "The train split has no picture of 1 of 2 classes: dog"),
        ([], "The train split holds no picture"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labelled(labels, ClassLabel(names=["cat", "dog"])), "train", need_all_classes=True)


@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 2, 2], [-1, 0, 1]])
def test_numbers_as_labels_start_at_0(labels):
    with pytest.raises(ValueError, match="without gaps, got"):
        pick_columns(DatasetDict(train=labelled(labels, Value("int64"))), None, None)


def test_labels_of_other_kinds():
    numbers = pick_columns(DatasetDict(train=labelled([1, 0, 2], Value("int64"))), None, None)["train"]
    assert numbers.features["label"].names == ["0", "1", "2"] and numbers["label"][:] == [1, 0, 2]
    with pytest.raises(ValueError, match="must be classes, words or whole numbers, got Value"):
        pick_columns(DatasetDict(train=labelled([0.5, 1.0], Value("float32"))), None, None)


def test_match_classes():
    assert match_classes(["b", "a"], {"a": 0, "b": 1, "c": 2}) == [1, 0]
    assert match_classes(["b", "a"], {"LABEL_0": 0, "LABEL_1": 1}) == [0, 1]
    assert match_classes(["0", "1"], {"cat": 0, "dog": 1}) == [0, 1]
    with pytest.raises(ValueError, match="does not know the classes bird; it knows cat, dog"):
        match_classes(["bird", "cat"], {"cat": 0, "dog": 1})
    with pytest.raises(ValueError, match="does not know the classes 0, 1, 2"):
        match_classes(["0", "1", "2"], {"cat": 0, "dog": 1})


ALL_ON = AugmentationArguments(randaugment_magnitude=9, random_erasing=0.5, mixup_alpha=0.4, cutmix_alpha=1.0)


def training_set(root) -> ImageClassificationDataset:
    rows = read(write_folder(root, splits=("train",), count=8))[0]["train"]
    transform = TrainTransform(ViTImageProcessor(size={"height": 8, "width": 8}), ALL_ON)
    return ImageClassificationDataset(rows, transform, [0, 1], seed=7)


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_batches_depend_on_seed_and_epoch_alone(workers, tmp_path):
    """Not on workers, on what was drawn before, or on the random numbers outside, which stay as they are."""
    dataset, collator = training_set(tmp_path), ClassificationCollator(2, ALL_ON)
    expected = {}
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected[epoch] = [collator([dataset[row] for row in rows]) for rows in ((0, 9, 4, 12), (3, 1, 10, 14))]
    assert not torch.equal(expected[0][0]["pixel_values"], expected[1][0]["pixel_values"])

    loader = DataLoader(dataset, batch_sampler=[[0, 9, 4, 12], [3, 1, 10, 14]], collate_fn=collator, **workers)
    for epoch in (1, 0, 1):
        dataset.set_epoch(epoch)
        torch.manual_seed(epoch + 100)
        batches = iter(loader)
        state = torch.get_rng_state()
        for batch, wanted in zip(batches, expected[epoch], strict=True):
            for key in ("pixel_values", "labels"):
                assert torch.equal(batch[key], wanted[key])
        assert torch.equal(torch.get_rng_state(), state)


def test_mixing(tmp_path):
    dataset, collator = training_set(tmp_path), ClassificationCollator(2, ALL_ON)
    batch = collator([dataset[row] for row in (0, 9, 4, 12)])
    assert batch["labels"].shape == (4, 2) and batch["labels"].dtype == torch.float32
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(4))
    assert ((batch["labels"] > 0) & (batch["labels"] < 1)).any()
    dataset.seed = None
    plain = collator([dataset[row] for row in (0, 9)])
    assert plain["labels"].tolist() == [0, 1] and sorted(plain) == ["labels", "pixel_values"]


def test_collator_names_pictures_with_nan():
    examples = [{"pixel_values": torch.zeros(3, 4, 4), "labels": 0, "seed": 1, "name": name} for name in "abc"]
    assert "not_finite" not in ClassificationCollator(2, ALL_ON)(examples)
    examples[1]["pixel_values"] = torch.full((3, 4, 4), torch.nan)
    assert ClassificationCollator(2, ALL_ON)(examples)["not_finite"] == ["b"]


def test_random_numbers_from():
    draws = []
    for key in ((1, 2), (1, 2), (2, 1), (1,), (1, 3)):
        with random_numbers_from(*key):
            draws.append(torch.rand(()).item())
    assert draws[0] == draws[1] and len(set(draws)) == 4


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 32, "width": 48}, image_mean=[0.1, 0.2, 0.3]),
        ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
        ConvNextImageProcessor(size={"shortest_edge": 384}),
    ],
)
def test_training_pictures_have_the_size_and_normalisation_of_evaluation(processor):
    """With all augmentation off, a picture of the right size is the image processor's."""
    height, width = processed_size(processor)
    off = AugmentationArguments(crop_scale=1.0, horizontal_flip=0.0)
    assert EvalTransform(processor)(colours(100, 70)).shape == (3, height, width)
    assert TrainTransform(processor, ALL_ON)(colours(100, 70)).shape == (3, height, width)
    view = TrainTransform(processor, off)
    view.augment.transforms[0].ratio = (width / height, width / height)
    image = colours(height, width)
    expected = processor(image, do_resize=False, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(view(image), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name, value", [("crop_scale", 1.5), ("mixup_alpha", -1.0), ("randaugment_magnitude", 31)])
def test_augmentation_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"--{name} must be in .*, got {value}"):
        AugmentationArguments(**{name: value})
