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
"""Reading, checking and augmenting masks for semantic, instance and panoptic segmentation."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from transformers import HfArgumentParser, Mask2FormerImageProcessor, SegformerImageProcessor

from clusterformer_hf import ClusterFormerConfig
from clusterformer_hf.data.checks import drop_unusable
from clusterformer_hf.data.coco import find_coco_splits
from clusterformer_hf.data.coco_masks import read_coco_masks
from clusterformer_hf.data.coco_panoptic import (
    PanopticData,
    find_panoptic_splits,
    open_segments,
    read_panoptic,
    segment_colours,
)
from clusterformer_hf.data.detection import match_categories
from clusterformer_hf.data.digit_scenes import write_digit_scenes
from clusterformer_hf.data.label_maps import (
    SemanticData,
    find_label_map_splits,
    open_label_map,
    pick_label_maps,
    read_class_names,
    read_label_maps,
    warn_of_unused_ids,
)
from clusterformer_hf.data.rle import ByteStrings, decode_masks, encode_masks, encode_segmentation, run_lengths
from clusterformer_hf.data.segmentation import (
    SegmentationCollator,
    SemanticDataset,
    UniversalDataset,
)
from clusterformer_hf.data.segmentation_augmentation import (
    RandomCrop,
    ScaleJitter,
    SegmentationAugmentationArguments,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
)
from scripts.run_semantic_segmentation import DataArguments, find_class_names


SEMANTIC_PROCESSOR = SegformerImageProcessor(size={"height": 32, "width": 48})
PROCESSOR = Mask2FormerImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
PLAIN = {"min_scale": 1.0, "max_scale": 1.0, "horizontal_flip": 0.0, "photometric_distort": 0.0}
NAMES = ["wall", "sky", "tree"]
THINGS = [{"id": 90, "name": "zebra"}, {"id": 3, "name": "car"}, {"id": 7, "name": "train"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def colours(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ids(height: int, width: int, high: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(1).integers(low, high, (height, width), dtype=np.uint8)


# Label maps


def write_pair(
    folder, name: str, labels, height: int = 20, width: int = 30, layout=("images/train", "annotations/train")
):
    """A picture `name`.jpg and its label map `name`.png."""
    image, label_map = (folder / part / name for part in layout)
    for path in (image, label_map):
        path.parent.mkdir(parents=True, exist_ok=True)
    colours(height, width).save(f"{image}.jpg")
    (labels if isinstance(labels, Image.Image) else Image.fromarray(labels)).save(f"{label_map}.png")
    return f"{label_map}.png"


def read_train(folder, names=NAMES, **options) -> SemanticData:
    return read_label_maps(folder / "images/train", folder / "annotations/train", names, **options)


@pytest.mark.parametrize(
    "layout",
    [
        {
            "train": ("images/training", "annotations/training"),
            "validation": ("images/validation", "annotations/validation"),
        },
        {"train": ("images/train", "labels/train"), "validation": ("images/val", "labels/val")},
        {"train": ("train", "semantic_train"), "validation": ("test", "semantic_test")},
    ],
    ids=["ADE20K", "labels", "digit scenes"],
)
def test_layouts(layout, tmp_path):
    for number, (split, parts) in enumerate(layout.items()):
        write_pair(tmp_path, f"sub/{split}", np.full((20, 30), number, np.uint8), layout=parts)
    found = find_label_map_splits(tmp_path)
    assert found == {split: tuple(tmp_path / part for part in parts) for split, parts in layout.items()}
    for number, (split, folders) in enumerate(found.items()):
        data = read_label_maps(*folders, NAMES)
        image, labels = data.open(0)
        assert len(data) == 1 and image.size == (30, 20) and (labels == number).all()
        assert data.pictures[0]["image"]["path"].endswith(f"sub/{split}.jpg")


def test_folders_without_label_maps(tmp_path):
    with pytest.raises(ValueError, match="no pictures with label maps in .*neither images/training"):
        find_label_map_splits(tmp_path)
    with pytest.raises(ValueError, match="images/train is no folder"):
        read_train(tmp_path)
    (tmp_path / "images/train").mkdir(parents=True)
    with pytest.raises(ValueError, match="no pictures in .*images/train"):
        read_train(tmp_path)


def test_label_maps_of_every_kind(tmp_path):
    """Grey, 16 bits, palette indices, two values and colours: the same ids."""
    labels = ids(20, 30, 3)
    palette = Image.fromarray(labels, "P")
    palette.putpalette([9, 9, 9, 0, 200, 0, 1, 2, 3])
    for name, image in {"grey": labels, "deep": labels.astype(np.uint16), "palette": palette}.items():
        assert (open_label_map(write_pair(tmp_path, name, image)) == labels).all()
    two = Image.fromarray(labels == 1)
    assert two.mode == "1" and (open_label_map(write_pair(tmp_path, "two", two)) == (labels == 1)).all()
    table = {(0, 0, 0): 0, (255, 0, 10): 1, (0, 7, 255): 2}
    coloured = np.array(list(table), np.uint8)[labels]
    assert (open_label_map(write_pair(tmp_path, "colour", coloured), table) == labels).all()


def test_colours_without_a_class(tmp_path):
    path = write_pair(tmp_path, "a", np.full((20, 30, 3), 8, np.uint8))
    with pytest.raises(
        ValueError, match="a.png must be grey or have a palette.*mode RGB.*needs the class of each colour"
    ):
        open_label_map(path)
    with pytest.raises(ValueError, match=r"a.png has colours of no class: \(8, 8, 8\)"):
        open_label_map(path, {(0, 0, 0): 0})


def test_reduce_labels(tmp_path):
    """As in ADE20K: 0 is no class, 1 is the first one, 255 stays. Equal to what the image processor does."""
    labels = ids(20, 30, 4)
    labels[0] = 255
    write_pair(tmp_path, "a", labels)
    _, found = read_train(tmp_path, reduce_labels=True).open(0)
    assert found[labels == 0].tolist() == [255] * (labels == 0).sum()
    assert (found[0] == 255).all() and sorted(set(found.ravel().tolist())) == [0, 1, 2, 255]
    processor = SegformerImageProcessor(do_resize=False, do_reduce_labels=True)
    expected = processor(colours(20, 30), segmentation_maps=labels)["labels"][0]
    assert (found == np.asarray(expected)).all()


def test_label_maps_that_may_count_from_0(tmp_path, caplog):
    """All ids are allowed, but the last class is in no picture: each one may be taken for the one before it."""
    write_pair(tmp_path, "a", np.minimum(ids(20, 30, 4), 2))
    warn_of_unused_ids({"train": read_train(tmp_path)})
    assert not caplog.text
    warn_of_unused_ids({"train": read_train(tmp_path, reduce_labels=True)})
    assert "No label map of" in caplog.text and "has the id 3" in caplog.text and "--reduce_labels false" in caplog.text
    caplog.clear()
    without = read_train(tmp_path, reduce_labels=True)
    write_pair(tmp_path, "b", ids(20, 30, 4))
    warn_of_unused_ids({"train": read_train(tmp_path, reduce_labels=True), "validation": without})
    assert not caplog.text


def test_a_data_set_that_is_written_anew_is_checked_anew(tmp_path):
    columns = {"image": str(tmp_path / "images/train/a.jpg"), "label": str(tmp_path / "annotations/train/a.png")}
    features = datasets.Features({name: datasets.Image() for name in columns})
    for label, number in ((1, 0), (77, 1), (1, 0)):
        write_pair(tmp_path, "a", np.full((20, 30), label, np.uint8))
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        rows = {name: [path] for name, path in columns.items()}
        datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
        splits = datasets.DatasetDict(train=datasets.load_from_disk(tmp_path / "saved"))
        _, problems = drop_unusable(pick_label_maps(splits, "saved", NAMES)["train"], skip_corrupt=True)
        assert len(problems) == number


@pytest.mark.parametrize(
    "labels, reduce_labels, message",
    [
        (3, False, r"a.png has the ids 3; they must be 0 to 2 for classes, 255 for pixels of none"),
        (254, False, "has the ids 254"),
        (300, False, "has the ids 300"),
        (4, True, r"has the ids 4; they must be 1 to 3 for classes, 0 or 255 for pixels of none"),
        (256, True, "has the ids 256"),
    ],
)
def test_ids_of_no_class(labels, reduce_labels, message, tmp_path):
    label_map = np.full((20, 30), 1, np.uint16)
    label_map[3, 4] = labels
    write_pair(tmp_path, "a", label_map)
    with pytest.raises(ValueError, match=message):
        read_train(tmp_path, reduce_labels=reduce_labels).open(0)


def test_more_classes_than_label_maps_can_have(tmp_path):
    write_pair(tmp_path, "a", ids(20, 30, 3))
    with pytest.raises(ValueError, match="1 to 255 classes, as 255 is for pixels of none; got 256"):
        read_train(tmp_path, [str(number) for number in range(256)])


def test_classes_of_the_same_name(tmp_path):
    write_pair(tmp_path, "a", ids(20, 30, 3))
    with pytest.raises(ValueError, match="annotations/train: `categories` of the same name: wall"):
        read_train(tmp_path, ["wall", "sky", "wall"])


def test_pictures_and_label_maps_that_do_not_pair(tmp_path):
    write_pair(tmp_path, "a", ids(20, 30, 3))
    colours(9, 9).save(tmp_path / "images/train/b.png")
    with pytest.raises(ValueError, match="1 pictures have no label map of the same name: .*b.png"):
        read_train(tmp_path)
    (tmp_path / "images/train/b.png").unlink()
    Image.fromarray(ids(9, 9, 3)).save(tmp_path / "annotations/train/c.png")
    with pytest.raises(ValueError, match="1 label maps have no picture of the same name: .*c.png"):
        read_train(tmp_path)
    (tmp_path / "annotations/train/c.png").unlink()
    colours(9, 9).save(tmp_path / "images/train/a.png")
    with pytest.raises(ValueError, match="a.jpg and .*a.png have the same name|a.png and .*a.jpg have the same name"):
        read_train(tmp_path)


def test_other_files_are_named(tmp_path, caplog):
    write_pair(tmp_path, "a", ids(20, 30, 3))
    (tmp_path / "images/train/notes.txt").write_text("x")
    (tmp_path / "images/train/.hidden.png").write_text("x")
    assert len(read_train(tmp_path)) == 1
    assert "notes.txt" in caplog.text and "hidden" not in caplog.text


def test_label_map_of_another_size(tmp_path):
    write_pair(tmp_path, "a", ids(30, 20, 3))
    with pytest.raises(ValueError, match=r"a.png is 20 x 30 pixels, but its picture .*a.jpg 30 x 20"):
        read_train(tmp_path).open(0)


def test_unusable_pictures_are_named_or_left_out(tmp_path):
    write_pair(tmp_path, "good", ids(20, 30, 3))
    write_pair(tmp_path, "small", ids(10, 30, 3))
    write_pair(tmp_path, "wrong", ids(20, 30, 9, 8))
    write_pair(tmp_path, "z", ids(20, 30, 3))
    (tmp_path / "images/train/z.jpg").write_bytes(b"no picture")
    data = read_train(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"3 pictures of .*train cannot be used:\n.*small.png is(.|\n)*ids 8;(.|\n)*z.jpg: not a picture",
    ):
        drop_unusable(data, skip_corrupt=False)
    rest, problems = drop_unusable(data, skip_corrupt=True)
    assert len(problems) == 3 and rest.image_ids.tolist() == [0] and len(rest) == len(rest.pictures) == 1
    assert drop_unusable(rest, skip_corrupt=False) == (rest, [])


def test_class_names(tmp_path):
    (tmp_path / "id2label.json").write_text('{"1": "sky", "0": "wall"}')
    assert read_class_names(tmp_path) == read_class_names(tmp_path / "id2label.json") == ["wall", "sky"]
    (tmp_path / "id2label.json").write_text('{"1": "sky"}')
    with pytest.raises(ValueError, match="id2label.json: ids must be 0, 1, 2 and so on, got 1"):
        read_class_names(tmp_path)
    for text in ("[1]", "{", '{"a": "b"}'):
        (tmp_path / "id2label.json").write_text(text)
        with pytest.raises(ValueError, match="id2label.json must be JSON like"):
            read_class_names(tmp_path)
    (tmp_path / "id2label.json").unlink()
    with pytest.raises(ValueError, match="Nothing names the classes: there is no id2label.json"):
        read_class_names(tmp_path)
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.2\twall\n2\t0.1\tbuilding, edifice\n")
    assert read_class_names(tmp_path, reduce_labels=True) == ["wall", "building, edifice"]
    with pytest.raises(ValueError, match="objectInfo150.txt counts classes from 1.* pass --reduce_labels"):
        find_class_names(DataArguments(dataset_name=str(tmp_path)), None)


def test_label_maps_of_the_datasets_library():
    labels = [ids(20, 30, 3), np.full((9, 8), 2, np.uint8)]
    rows = {"image": [colours(20, 30), colours(9, 8)], "annotation": [Image.fromarray(one) for one in labels]}
    rows = Dataset.from_dict(rows | {"scene": ["a", "b"]}).cast_column("image", ImageFeature())
    rows = rows.cast_column("annotation", ImageFeature())
    data = pick_label_maps(DatasetDict(train=rows), "scenes", NAMES)["train"]
    assert all((data.open(row)[1] == labels[row]).all() for row in range(2))
    assert data.select([1]).image_ids.tolist() == [1]
    with pytest.raises(ValueError, match="scenes has no column 'scene' of images; it has image, annotation, scene"):
        pick_label_maps(DatasetDict(train=rows), "scenes", NAMES, label_column="scene")
    with pytest.raises(ValueError, match="scenes has no column None of images"):
        pick_label_maps(DatasetDict(train=rows.remove_columns("annotation")), "scenes", NAMES)


# Run lengths


def test_run_lengths_and_masks(tmp_path):
    """All forms of a mask give the same bytes; the runs are those of the mask, column by column."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        height, width = generator.integers(1, 30, 2).tolist()
        masks = generator.random((3, height, width)) < generator.random()
        for mask, counts in zip(masks, encode_masks(masks)):
            runs = run_lengths(counts)
            columns = np.concatenate([np.full(run, number % 2) for number, run in enumerate(runs)])
            assert (columns.reshape(width, height).T == mask).all()
            for value in (counts.decode(), runs):
                assert encode_segmentation({"size": [height, width], "counts": value}, height, width) == counts
        assert (decode_masks(encode_masks(masks), height, width) == masks).all()
    assert decode_masks([], 4, 5).shape == (0, 4, 5) and encode_masks(np.zeros((0, 4, 5))) == []


def test_byte_strings():
    strings = ByteStrings.pack([b"abc", b"", b"de"])
    assert [strings[number] for number in range(len(strings))] == [b"abc", b"", b"de"]
    assert [strings.select([2, 0])[number] for number in range(2)] == [b"de", b"abc"]


BAD_MASKS = {
    "none": (None, "has no mask: `segmentation` is None"),
    "no polygons": ([], r"has no mask: `segmentation` is \[\]"),
    "empty polygon": ([[]], "has a polygon of 0 numbers, not x and y of at least three corners"),
    "box": ([[0, 0, 10, 10]], "has a polygon of 4 numbers"),  # pycocotools takes it for one
    "odd": ([[0, 0, 10, 10, 5, 3, 1]], "has a polygon of 7 numbers"),
    "words": ([["a"] * 6], "has a polygon that is no list of numbers"),
    "flat": ([0, 0, 10, 10, 5, 3], "has a polygon that is no list of numbers"),
    "not finite": ([[0, 0, 10, float("nan"), 5, 3]], "has a polygon whose numbers are not finite"),
    "size": (
        {"size": [20, 30], "counts": [600]},
        r"has a mask of size \[20, 30\], height and width, in a picture of \[30, 20\]",
    ),
    "short": ({"size": [30, 20], "counts": [100, 400]}, "has a mask whose runs cover 500 of 600 pixels"),
    "negative": ({"size": [30, 20], "counts": [700, -100]}, "has a mask whose runs cover 600 of 600"),
    "no counts": ({"size": [30, 20], "counts": ""}, "has a mask whose runs cover 0 of 600 pixels"),
    "garbage": ({"size": [30, 20], "counts": "zzz\u00e9"}, "has a mask whose runs cover"),
    "floats": ({"size": [30, 20], "counts": [0.5, 599.5]}, "has a mask whose `counts` are neither"),
    "missing": ({"size": [30, 20]}, "has a mask whose `counts` are neither"),
}


@pytest.mark.parametrize("segmentation, message", BAD_MASKS.values(), ids=BAD_MASKS)
def test_masks_that_are_none(segmentation, message):
    with pytest.raises(ValueError, match=message):
        encode_segmentation(segmentation, 30, 20)


# Instances


def instance(id_: int, image_id: int, category_id: int, segmentation, **fields) -> dict:
    return {"id": id_, "image_id": image_id, "category_id": category_id, "segmentation": segmentation, **fields}


def instances_content() -> dict:
    """Three pictures, the second without instances, ids in no order; all forms of masks, overlapping; a crowd."""
    mask = np.zeros((32, 32), np.uint8)
    mask[4:9, 2:20] = 1
    compressed = {"size": [32, 32], "counts": encode_masks(mask[None])[0].decode()}
    return {
        "images": [
            {"id": 42, "file_name": "a.png", "height": 40, "width": 60},
            {"id": 5, "file_name": "b.png", "height": 50, "width": 30},
            {"id": 17, "file_name": "c.png"},
        ],
        "annotations": [
            instance(10, 17, 90, compressed),
            instance(2, 42, 3, [[5, 6, 25, 6, 25, 16, 5, 16]], bbox=[5, 6, 20, 10], area=200, iscrowd=0),
            instance(3, 42, 7, [[0, 0, 30, 0, 0, 30], [50, 30, 60, 30, 60, 40, 50, 40]], area=555),
            instance(4, 42, 7, [[3.1, 3.1, 3.2, 3.1, 3.2, 3.2]], bbox=[3, 3, 0.1, 0.1]),  # covers no pixel
            instance(6, 42, 3, {"size": [40, 60], "counts": [0, 400, 2000]}, bbox=[0, 0, 10, 40], iscrowd=1),
        ],
        "categories": [dict(category) for category in THINGS],
    }


def write_instances(folder, content):
    folder.mkdir(exist_ok=True)
    for name, (height, width) in {"a.png": (40, 60), "b.png": (50, 30), "c.png": (32, 32)}.items():
        colours(height, width).save(folder / name)
    (folder / "masks.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder, folder / "masks.json"


@pytest.fixture
def instances(tmp_path):
    return read_coco_masks(*write_instances(tmp_path, instances_content()))[0]


def test_masks_are_those_of_pycocotools(instances, tmp_path):
    content = instances_content()
    content["images"][2] |= {"height": 32, "width": 32}  # which pycocotools does not look up
    (tmp_path / "whole.json").write_text(json.dumps(content))
    coco = COCO(tmp_path / "whole.json")
    for row, order in enumerate([[2, 3, 4, 6], [], [10]]):
        _, masks, classes, crowds = instances.open(row)
        assert len(masks) == len(order)
        for mask, label, crowd, annotation in zip(masks, classes, crowds, coco.loadAnns(order)):
            assert (mask == coco.annToMask(annotation)).all()
            assert instances.category_ids[label] == annotation["category_id"]
            assert crowd == (annotation.get("iscrowd", 0) == 1)


def test_ground_truth_keeps_crowds_and_ids_and_completes_the_rest(instances):
    truth = instances.ground_truth()
    assert [one["id"] for one in truth["annotations"]] == [1, 2, 3, 4, 5]
    assert [one["image_id"] for one in truth["annotations"]] == [42, 42, 42, 42, 17]
    assert [one["category_id"] for one in truth["annotations"]] == [3, 7, 7, 3, 90]
    assert [one["iscrowd"] for one in truth["annotations"]] == [0, 0, 0, 1, 0]
    # Areas and boxes as they were, or else of the mask: 5 x 18 pixels.
    assert [one["area"] for one in truth["annotations"]] == [200, 555, 0, 400, 90]
    assert truth["annotations"][4]["bbox"] == [2, 4, 18, 5]
    assert truth["annotations"][4]["segmentation"]["size"] == [32, 32]


def test_crowds_and_empty_masks_are_no_targets(instances):
    examples = UniversalDataset(instances, SegmentationEvalTransform(PROCESSOR), [5, 0, 2])
    labels = [examples[row]["labels"] for row in range(3)]
    assert [label["class_labels"].tolist() for label in labels] == [[5, 0], [], [2]]
    for row, label in enumerate(labels):
        assert label["masks"].shape == (len(label["class_labels"]), *examples[row]["pixel_values"].shape[-2:])
        assert label["masks"].dtype == torch.bool and label["masks"].flatten(1).any(dim=1).all()
    # Overlapping masks stay as they are: they share the triangle's part of the rectangle.
    assert (labels[0]["masks"][0] & labels[0]["masks"][1]).any()


def test_select(instances):
    part = instances.select([2, 1])
    assert part.image_ids.tolist() == [17, 5] and len(part) == 2
    assert part.open(0)[1].sum() == 90 and len(part.open(1)[1]) == 0
    assert [one["image_id"] for one in part.ground_truth()["annotations"]] == [17]
    assert len(instances.open(0)[1]) == 4


def test_config_keeps_the_original_ids(instances, panoptic):
    config = ClusterFormerConfig(**instances.config_fields())
    assert config.id2label == {0: "car", 1: "train", 2: "zebra"} and config.original_category_ids == [3, 7, 90]
    assert match_categories(instances, config) == [0, 1, 2]
    assert ClusterFormerConfig(**panoptic.config_fields()).original_category_ids == [3, 7, 90, 200]
    with pytest.raises(
        ValueError, match="panoptic_train.json: `categories` has 4 classes .* 3, 7, 90, 200, the model 3"
    ):
        match_categories(panoptic, config)


@pytest.mark.parametrize("kind", ["empty polygon", "size", "box", "none"])
def test_annotations_without_a_mask_are_named_or_left_out(kind, tmp_path, caplog):
    segmentation, message = BAD_MASKS[kind]
    content = instances_content()
    content["annotations"].append(instance(77, 42, 3, segmentation, bbox=[0, 0, 5, 5]))
    folder, file = write_instances(tmp_path, content)
    message = message.replace("30, 20", "40, 60")
    with pytest.raises(ValueError, match=f"masks.json: annotation 77 of image 42 {message}(.|\n)*--skip_corrupt"):
        read_coco_masks(folder, file)
    data, problems = read_coco_masks(folder, file, skip_corrupt=True)
    assert len(problems) == 1 and "annotation 77" in problems[0] and "annotation 77" in caplog.text
    assert len(data.open(0)[1]) == 4


INSTANCE_ERRORS = {
    "no JSON": (lambda content: "{", "masks.json is no JSON: line 1"),
    "list": (lambda content: "[]", "masks.json must hold an object"),
    "no annotations": (lambda content: content.pop("annotations"), "masks.json has no list `annotations`"),
    "unknown image": (lambda content: content["annotations"][0].update(image_id=8), r"`image_id` is unknown: 10 \(8\)"),
    "unknown class": (
        lambda content: content["annotations"][0].update(category_id=4),
        r"`category_id` is unknown: 10 \(4\)",
    ),
    "twice": (lambda content: content["annotations"][0].update(id=2), "`annotations` that are there more than once: 2"),
    "no picture": (
        lambda content: content["images"][1].update(file_name="q.png"),
        "1 pictures of `images` are missing: .*q.png",
    ),
}


@pytest.mark.parametrize("change, message", INSTANCE_ERRORS.values(), ids=INSTANCE_ERRORS)
def test_bad_instance_files(change, message, tmp_path):
    content = instances_content()
    changed = change(content)
    with pytest.raises(ValueError, match=message):
        read_coco_masks(*write_instances(tmp_path, changed if isinstance(changed, str) else content))


def test_picture_of_another_size_than_its_masks(instances, tmp_path):
    colours(50, 60).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png is 60 x 50 pixels when upright, but 60 x 40 in"):
        instances.open(0)


# Panoptic segments


SEGMENTS = {
    1: np.array([[70000, 70000, 0], [300, 300, 0]]).repeat(10, 0).repeat(10, 1),
    8: np.zeros((20, 30), np.int64),
    4: np.array([[5, 6, 6], [7, 6, 5]]).repeat(10, 0).repeat(10, 1),
}


def panoptic_content() -> dict:
    """Three pictures, one of them all void; ids up to three bytes, in no order; a crowd."""

    def segment(id_, category_id, **fields):
        return {"id": id_, "category_id": category_id, **fields}

    infos = {
        1: [segment(300, 200, iscrowd=0), segment(70000, 3)],
        8: [],
        4: [segment(7, 90, iscrowd=1), segment(5, 7), segment(6, 200)],
    }
    return {
        "images": [{"id": id_, "file_name": f"{id_}.jpg", "height": 20, "width": 30} for id_ in infos],
        "annotations": [
            {"image_id": id_, "file_name": f"{id_}.png", "segments_info": infos[id_]} for id_ in reversed(infos)
        ],
        "categories": [category | {"isthing": 1} for category in THINGS] + [{"id": 200, "name": "sky", "isthing": 0}],
    }


def write_panoptic(folder, content, segments=SEGMENTS) -> tuple:
    for part in ("train", "panoptic_train", "annotations"):
        (folder / part).mkdir(exist_ok=True, parents=True)
    for id_, ids_ in segments.items():
        colours(20, 30).save(folder / f"train/{id_}.jpg")
        Image.fromarray(segment_colours(ids_)).save(folder / f"panoptic_train/{id_}.png")
    file = folder / "annotations/panoptic_train.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "train", folder / "panoptic_train", file


@pytest.fixture
def panoptic(tmp_path) -> PanopticData:
    return read_panoptic(*write_panoptic(tmp_path / "scenes", panoptic_content()))


def test_segments_and_their_classes(panoptic):
    assert panoptic.image_ids.tolist() == [1, 8, 4] and panoptic.is_thing.tolist() == [True, True, True, False]
    expected = {
        1: (np.select([SEGMENTS[1] == 300, SEGMENTS[1] == 70000], [1, 2]), [3, 0], [False, False]),
        8: (SEGMENTS[8], [], []),
        4: (
            np.select([SEGMENTS[4] == 7, SEGMENTS[4] == 5, SEGMENTS[4] == 6], [1, 2, 3]),
            [2, 1, 3],
            [True, False, False],
        ),
    }
    for row, id_ in enumerate([1, 8, 4]):
        _, segments, classes, crowds = panoptic.open(row)
        wanted = expected[id_]
        assert (segments == wanted[0]).all() and (classes.tolist(), crowds.tolist()) == wanted[1:]


def test_segment_colours():
    """The format's own example of a colour: (10, 20, 30) is 10 + 20 * 256 + 30 * 65536 = 1971210."""
    assert segment_colours(np.array([[1971210]])).tolist() == [[[10, 20, 30]]]
    assert open_segments(Image.fromarray(np.full((2, 2, 3), [10, 20, 30], np.uint8))).tolist() == [[1971210] * 2] * 2


def test_panoptic_targets(panoptic):
    examples = UniversalDataset(panoptic, SegmentationEvalTransform(PROCESSOR), [10, 11, 12, 13])
    example = examples[2]
    # The crowd of class 12 is no training target, but evaluation knows it.
    assert example["labels"]["class_labels"].tolist() == [11, 13]
    assert example["target"]["class_labels"].tolist() == [12, 11, 13]
    assert example["target"]["crowds"].tolist() == [True, False, False]
    assert example["target"]["orig_size"].tolist() == [20, 30]
    assert example["target"]["size"].tolist() == list(example["pixel_values"].shape[-2:])
    assert (example["target"]["segments"].numpy() == panoptic.open(2)[1]).all()
    assert examples[1]["labels"]["masks"].shape[0] == 0
    assert not (example["labels"]["masks"].sum(dim=0) > 1).any()


def test_things_as_instances(panoptic):
    instances = panoptic.instances()
    assert instances.categories == {3: "car", 7: "train", 90: "zebra"}
    _, masks, classes, crowds = instances.open(2)
    assert classes.tolist() == [2, 1] and crowds.tolist() == [True, False]
    assert (masks == np.stack([SEGMENTS[4] == 7, SEGMENTS[4] == 5])).all()
    assert [(one["area"], one["bbox"]) for one in instances.ground_truth()["annotations"]][1:] == [
        (100, [0, 10, 10, 10]),
        (200, [0, 0, 30, 20]),
    ]
    assert instances.image_ids.tolist() == [1, 8, 4] and len(instances.open(1)[1]) == 0


def test_select_panoptic(panoptic):
    part = panoptic.select([2])
    assert part.image_ids.tolist() == [4] and part.open(0)[2].tolist() == panoptic.open(2)[2].tolist()


def change_infos(number: int, **fields):
    return lambda content: content["annotations"][0]["segments_info"][number].update(fields)


PANOPTIC_ERRORS = {
    "no JSON": (lambda content: "{", "panoptic_train.json is no JSON"),
    "no annotations": (lambda content: content.pop("annotations"), "has no list `annotations`"),
    "no isthing": (lambda content: content["categories"][1].pop("isthing"), "no `isthing` in `categories`, entries 1"),
    "name twice": (
        lambda content: content["categories"][3].update(name="car"),
        "panoptic_train.json: `categories` of the same name: car",
    ),
    "no segments": (
        lambda content: content["annotations"][1].pop("segments_info"),
        "no `segments_info` in `annotations`, entries 1",
    ),
    "unknown image": (lambda content: content["annotations"][0].update(image_id=99), "`image_id` is unknown: 99"),
    "twice": (
        lambda content: content["annotations"][0].update(image_id=1),
        "`annotations, image_id` that are there more than once: 1",
    ),
    "not annotated": (lambda content: content["annotations"].pop(0), "images without an entry in `annotations`: 4"),
    "no PNG": (
        lambda content: content["annotations"][0].update(file_name="q.png"),
        "1 PNGs of `annotations` are missing: .*q.png",
    ),
    "unknown class": (
        change_infos(0, category_id=1),
        r"`segments_info` of image 4: segments whose `category_id` is unknown: 7 \(1\)",
    ),
    "no class": (change_infos(0, category_id=None), "no `category_id` in `segments_info` of image 4, entries 0"),
    "a list": (lambda content: content["annotations"].append([1]), "`annotations` must be objects, entries 3"),
    "a number": (
        lambda content: content["annotations"][0].update(file_name=4),
        "panoptic_train.json: `file_name` in `annotations` must be text, entries 0",
    ),
    "segments as object": (
        lambda content: content["annotations"][1].update(segments_info={}),
        "`segments_info` in `annotations` must be a list, entries 1",
    ),
    "segment as list": (
        lambda content: content["annotations"][0]["segments_info"].append([7]),
        "`segments_info` of image 4 must be objects, entries 3",
    ),
    "class as list": (
        change_infos(1, category_id=[7]),
        "`category_id` in `segments_info` of image 4 must be a number, entries 1",
    ),
    "void": (change_infos(0, id=0), r"image 4: ids must be in \[1, 16777215\], got 0"),
    "segment twice": (change_infos(0, id=5), "image 4: ids in `segments_info` that are there more than once: 5"),
}


@pytest.mark.parametrize("change, message", PANOPTIC_ERRORS.values(), ids=PANOPTIC_ERRORS)
def test_bad_panoptic_files(change, message, tmp_path):
    content = panoptic_content()
    changed = change(content)
    with pytest.raises(ValueError, match=message):
        read_panoptic(*write_panoptic(tmp_path, changed if isinstance(changed, str) else content))


@pytest.mark.parametrize(
    "png, message",
    [
        (
            np.where(SEGMENTS[4] == 7, 9, SEGMENTS[4]),
            "4.png, image 4 of .*segments in the PNG but not in `segments_info`: 9",
        ),
        (
            np.where(SEGMENTS[4] == 7, 0, SEGMENTS[4]),
            "4.png, image 4 of .*segments in `segments_info` but not in the PNG: 7",
        ),
        (SEGMENTS[4][:10], "4.png is 30 x 10 pixels, but its picture 30 x 20"),
    ],
)
def test_png_and_file_that_disagree(png, message, tmp_path):
    data = read_panoptic(*write_panoptic(tmp_path, panoptic_content(), SEGMENTS | {4: png}))
    with pytest.raises(ValueError, match=message):
        data.open(2)
    with pytest.raises(ValueError, match=f"1 pictures of .*panoptic_train.json cannot be used:\n.*{message}"):
        drop_unusable(data, skip_corrupt=False)
    rest, problems = drop_unusable(data, skip_corrupt=True)
    assert rest.image_ids.tolist() == [1, 8] and len(problems) == 1


def test_grey_png_of_segments(panoptic):
    Image.fromarray(SEGMENTS[4].astype(np.uint8)).save(panoptic.pictures[2]["segments"]["path"])
    with pytest.raises(ValueError, match="4.png: segment ids are colours, .* got mode L"):
        panoptic.open(2)


def test_panoptic_layouts(tmp_path):
    """PNGs beside the pictures, or beside the file, as COCO's archives unpack."""
    images, segments, file = write_panoptic(tmp_path, panoptic_content())
    assert find_panoptic_splits(tmp_path) == {"train": (images, segments, file)}
    segments.rename(tmp_path / "annotations/panoptic_train")
    (tmp_path / "images").mkdir()
    images.rename(tmp_path / "images/train")
    found = find_panoptic_splits(tmp_path)["train"]
    assert found == (tmp_path / "images/train", tmp_path / "annotations/panoptic_train", file)
    file.with_name("panoptic_trainval.json").write_text("{}")  # without pictures, and not needed
    assert find_panoptic_splits(tmp_path)["train"] == found
    file.with_name("panoptic_trainval.json").unlink()
    (tmp_path / "annotations/panoptic_train").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match="its PNGs are neither in .*panoptic_train nor in .*annotations/panoptic_train"
    ):
        find_panoptic_splits(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="no annotations/panoptic_train.json"):
        find_panoptic_splits(tmp_path)


def test_digit_scenes_read_in_three_ways(tmp_path):
    """Masks, classes and label maps of the three readers agree."""
    folder = write_digit_scenes(tmp_path / "scenes", num_train=1, num_test=3)
    panoptic = read_panoptic(*find_panoptic_splits(folder)["validation"])
    instances, problems = read_coco_masks(*find_coco_splits(folder)["validation"])
    semantic = read_label_maps(*find_label_map_splits(folder)["validation"], read_class_names(folder))
    assert len(panoptic) == len(instances) == len(semantic) == 3 and not problems
    assert semantic.class_names == panoptic.class_names and instances.class_names == panoptic.class_names[:10]
    for row in range(3):
        image, segments, classes, _ = panoptic.open(row)
        assert np.array_equal(image, instances.open(row)[0]) and np.array_equal(image, semantic.open(row)[0])
        assert (classes[segments - 1] == semantic.open(row)[1]).all()
        for ours, theirs in zip(instances.open(row)[1:], panoptic.instances().open(row)[1:]):
            assert np.array_equal(ours, theirs)


# Augmentation


def blobs(height: int = 60, width: int = 80) -> tuple[Image.Image, np.ndarray]:
    """A picture in which two discs and a bar are painted in the colours of their numbers; masks (3, height, width)."""
    y, x = np.mgrid[:height, :width]
    masks = np.stack(
        [
            (y - 20) ** 2 + (x - 18) ** 2 < 150,
            (y - 38) ** 2 + (x - 52) ** 2 < 230,
            (abs(y - 8) < 5) & (abs(x - 60) < 14),
        ]
    )
    return Image.fromarray((masks.transpose(1, 2, 0) * 255).astype(np.uint8)), masks


def transform(processor=None, **args):
    processor = processor or Mask2FormerImageProcessor(size={"height": 60, "width": 80}, do_normalize=False)
    return SegmentationTrainTransform(processor, SegmentationAugmentationArguments(**PLAIN | args))


def test_no_change_gives_the_picture():
    image, masks = blobs()
    pixels, found = transform()(image, masks)
    assert torch.equal(found, torch.as_tensor(masks)) and torch.equal(pixels, torch.as_tensor(masks).float())


def test_masks_follow_the_picture():
    """
    Whatever is done to them: the painted shapes are where their masks are, but for the pixels of an outline, as many as
    a shape of this size has. Label maps and masks give the same.
    """
    image, masks = blobs()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, found = transform(min_scale=0.4, max_scale=2.5, horizontal_flip=0.5)(image, masks)
        torch.manual_seed(seed)
        _, label_map = transform(min_scale=0.4, max_scale=2.5, horizontal_flip=0.5)(image, masks.T.dot([1, 2, 3]).T)
        assert pixels.shape[-2:] == found.shape[-2:] == label_map.shape
        assert torch.equal(label_map, (found * torch.tensor([1, 2, 3])[:, None, None]).sum(dim=0))
        wrong = ((pixels > 0.5) != found).sum().item()
        assert wrong <= 0.02 * found.numel() / 3
        seen.add(tuple(pixels.shape[-2:]))
    assert len(seen) >= 5 and max(seen) == (60, 80)


def test_flip():
    image, masks = blobs()
    pixels, found = transform(horizontal_flip=1.0)(image, masks)
    assert torch.equal(found, torch.as_tensor(masks).flip(-1)) and torch.equal(pixels, found.float())


def test_distortion_leaves_masks_alone():
    image, masks = blobs()
    pixels, found = transform(photometric_distort=1.0)(image, masks)
    assert torch.equal(found, torch.as_tensor(masks)) and not torch.equal(pixels, found.float())


@pytest.mark.parametrize("scale", [0.1, 0.2, 0.25])
def test_small_masks_lie_on_the_picture(scale):
    """
    The centre of a shape keeps its place to half a pixel of the large mask, which is scale / 2 pixels here, at most
    0.125. With torchvision's rule, which takes the top left pixel of those that fall together, it moves by
    (1 - scale) / 2 pixels, 0.375 to 0.45.
    """
    y, x = np.mgrid[:400, :400]
    mask = (y - 170.0) ** 2 + (x - 230.0) ** 2 < 120**2
    jitter = ScaleJitter((400, 400), (scale, scale), 2)
    image, small = jitter(tv_tensors.Image(torch.zeros(3, 400, 400)), tv_tensors.Mask(mask.astype(np.uint8)))
    assert small.shape == image.shape[-2:] == (round(400 * scale),) * 2
    centre = torch.nonzero(small).double().mean(dim=0) + 0.5
    assert centre.tolist() == pytest.approx([170.5 * scale, 230.5 * scale], abs=scale / 2 + 0.02)


def test_scale_one_fits_the_picture_into_the_crop():
    for height, width, expected in ((60, 80, [30, 40]), (90, 60, [45, 30]), (10, 200, [2, 40])):
        jitter = ScaleJitter((45, 40), (1.0, 1.0), 2)
        assert jitter.make_params([torch.zeros(3, height, width)])["size"] == expected
    sizes = [
        ScaleJitter((100, 100), (0.5, 2.0), 2).make_params([torch.zeros(3, 50, 50)])["size"][0] for _ in range(300)
    ]
    assert 50 <= min(sizes) < 60 and 190 < max(sizes) <= 200


def test_crop_takes_all_places_and_never_pads():
    picture = torch.arange(20.0).reshape(1, 4, 5)
    corners = {
        tuple(RandomCrop((3, 9))(picture).shape) + (RandomCrop((3, 9))(picture)[0, 0, 0].item(),) for _ in range(60)
    }
    assert corners == {(1, 3, 5, 0.0), (1, 3, 5, 5.0)}


def test_pictures_without_instances_are_augmented_too():
    image, masks = blobs()
    pixels, found = transform(min_scale=0.5, max_scale=2.0, horizontal_flip=0.5)(image, masks[:0])
    assert found.shape == (0, *pixels.shape[-2:])


def test_crop_size():
    args = SegmentationAugmentationArguments
    assert args().crop(SEMANTIC_PROCESSOR) == (32, 48) and args().crop(PROCESSOR) == (32, 32)
    assert args(crop_size=64).crop(PROCESSOR) == (64, 64)
    with pytest.raises(ValueError, match="no height and width: pass --crop_size"):
        args().crop(Mask2FormerImageProcessor(size={"max_height": 9, "max_width": 9}))


@pytest.mark.parametrize(
    "args, message",
    [
        ({"min_scale": 0.0}, "--min_scale and --max_scale must be positive"),
        ({"min_scale": 2.0, "max_scale": 1.0}, "in this order, got 2.0 and 1.0"),
        ({"horizontal_flip": 1.5}, r"--horizontal_flip must be in \[0, 1\], got 1.5"),
        ({"photometric_distort": -1.0}, "--photometric_distort must be in"),
        ({"crop_size": 0}, "--crop_size must be at least 1, got 0"),
    ],
)
def test_bad_augmentation(args, message):
    with pytest.raises(ValueError, match=message):
        SegmentationAugmentationArguments(**args)


def test_arguments_of_a_command_line():
    (args,) = HfArgumentParser(SegmentationAugmentationArguments).parse_args_into_dataclasses(["--crop_size", "7"])
    assert args == SegmentationAugmentationArguments(crop_size=7)


def test_evaluation_is_the_image_processors_own():
    """Pixels and masks are exactly those that the image processors make of a picture and its map."""
    image, masks = blobs(61, 83)
    label_map = masks.T.dot([1, 2, 3]).T.astype(np.uint8)
    pixels, labels = SegmentationEvalTransform(SEMANTIC_PROCESSOR)(image, label_map)
    expected = SEMANTIC_PROCESSOR(image, segmentation_maps=label_map, return_tensors="pt")
    assert torch.equal(pixels, expected["pixel_values"][0]) and torch.equal(labels.long(), expected["labels"][0])
    pixels, found = SegmentationEvalTransform(PROCESSOR)(image, masks)
    expected = PROCESSOR(image, segmentation_maps=label_map, return_tensors="pt")
    assert torch.equal(pixels, expected["pixel_values"][0])
    assert torch.equal(found, expected["mask_labels"][0][1:].bool())  # without the background, 0


# Examples and batches


@pytest.fixture
def semantic(tmp_path) -> SemanticData:
    for number, size in enumerate([(20, 30), (31, 17), (40, 40)]):
        labels = ids(*size, 3)
        labels[:2] = 255
        write_pair(tmp_path / "maps", str(number), labels, *size)
    return read_train(tmp_path / "maps")


def test_semantic_examples(semantic):
    """Label maps in the model's ids; evaluation has the map of the picture's own size."""
    examples = SemanticDataset(semantic, SegmentationEvalTransform(SEMANTIC_PROCESSOR), [7, 0, 3])
    example = examples[1]
    assert example["pixel_values"].shape == (3, 32, 48) and example["labels"].shape == (32, 48)
    assert example["labels"].dtype == torch.int64 and set(example["labels"].unique().tolist()) == {7, 0, 3, 255}
    _, labels = semantic.open(1)
    assert (
        example["target"]["label_map"].numpy() == np.select([labels == 0, labels == 1, labels == 2], [7, 0, 3], 255)
    ).all()
    assert example["target"]["orig_size"].tolist() == [31, 17] and example["target"]["size"].tolist() == [32, 48]
    assert example["target"]["image_id"].tolist() == [1]
    with pytest.raises(ValueError, match="must have ids below 255, got 255"):
        SemanticDataset(semantic, None, [255, 0, 3])


def test_config_of_label_maps(semantic):
    config = ClusterFormerConfig(**semantic.config_fields())
    assert config.id2label == dict(enumerate(NAMES)) and match_categories(semantic, config) == [0, 1, 2]


def train_dataset(data, seed: int = 0):
    kind = SemanticDataset if isinstance(data, SemanticData) else UniversalDataset
    args = SegmentationAugmentationArguments(crop_size=32)
    return kind(data, SegmentationTrainTransform(PROCESSOR, args), list(range(len(data.categories))), seed=seed)


@pytest.mark.parametrize("name", ["semantic", "instances", "panoptic"])
def test_random_numbers_come_from_seed_epoch_and_row(name, request):
    """The same with any number of data workers; another epoch and another seed give other views."""
    data = request.getfixturevalue(name)

    def batches(dataset, workers: int = 0):
        loader = DataLoader(dataset, 3, collate_fn=SegmentationCollator(pad_to=(32, 32)), num_workers=workers)
        return next(iter(loader))["pixel_values"]

    first = batches(train_dataset(data))
    assert torch.equal(first, batches(train_dataset(data), workers=2))
    later = train_dataset(data)
    later.set_epoch(1)
    assert not torch.equal(first, batches(later)) and not torch.equal(first, batches(train_dataset(data, seed=1)))


@pytest.mark.parametrize("name", ["semantic", "instances", "panoptic"])
def test_training_batches(name, request):
    """One shape for all; padding is marked, 255 in label maps and 0 in masks; no target comes along."""
    data = request.getfixturevalue(name)
    examples = [train_dataset(data)[row] for row in range(3)]
    batch = SegmentationCollator(pad_to=(32, 32))(examples)
    assert set(batch) == {"pixel_values", "pixel_mask", "labels"}
    assert batch["pixel_values"].shape == (3, 3, 32, 32) and batch["pixel_mask"].dtype == torch.int64
    padding = 0
    for example, pixels, mask, labels in zip(examples, batch["pixel_values"], batch["pixel_mask"], batch["labels"]):
        height, width = example["pixel_values"].shape[-2:]
        assert torch.equal(pixels[:, :height, :width], example["pixel_values"]) and mask[:height, :width].all()
        assert mask.sum() == height * width and not pixels[:, mask == 0].any()
        padding += (mask == 0).sum()
        if name == "semantic":
            assert torch.equal(labels[:height, :width], example["labels"]) and (labels[mask == 0] == 255).all()
        else:
            assert torch.equal(labels["masks"][:, :height, :width], example["labels"]["masks"])
            assert not labels["masks"][:, mask == 0].any()
            assert torch.equal(labels["class_labels"], example["labels"]["class_labels"])
    assert padding > 0
    assert set(SegmentationCollator(pad_to=(32, 32), pixel_mask=False)(examples)) == {"pixel_values", "labels"}


def test_evaluation_batches(panoptic, instances):
    collator = SegmentationCollator(pad_to_multiple_of=40)
    examples = UniversalDataset(instances, SegmentationEvalTransform(PROCESSOR), [0, 1, 2])
    batch = collator([examples[row] for row in range(3)])
    sides = [tuple(examples[row]["pixel_values"].shape[-2:]) for row in range(3)]
    expected = tuple(-(-max(side[axis] for side in sides) // 40) * 40 for axis in (0, 1))
    assert batch["pixel_values"].shape[-2:] == expected and len(set(sides)) > 1
    assert [tuple(target["size"].tolist()) for target in batch["targets"]] == sides
    assert [tuple(target["padded_size"].tolist()) for target in batch["targets"]] == [expected] * 3
    assert [target["image_id"].item() for target in batch["targets"]] == [42, 5, 17]


def test_labels_for_other_models(instances):
    """MaskFormer and Mask2Former take two lists, of float masks."""
    examples = [train_dataset(instances)[row] for row in range(3)]
    ours = SegmentationCollator(pad_to=(32, 32))(examples)["labels"]
    batch = SegmentationCollator(pad_to=(32, 32), mask2former_labels=True)(examples)
    assert set(batch) == {"pixel_values", "pixel_mask", "mask_labels", "class_labels"}
    for masks, classes, label in zip(batch["mask_labels"], batch["class_labels"], ours):
        assert masks.dtype == torch.float32 and torch.equal(masks.bool(), label["masks"])
        assert torch.equal(classes, label["class_labels"])


def test_pictures_larger_than_the_batch(instances):
    with pytest.raises(ValueError, match=r"A picture of \d+ x \d+ cannot be padded to 8 x 8"):
        SegmentationCollator(pad_to=(8, 8))([train_dataset(instances)[0]])


def test_not_finite_pixels_are_named(instances):
    examples = [train_dataset(instances)[row] for row in range(2)]
    examples[1]["pixel_values"][0, 0, 0] = float("nan")
    (name,) = SegmentationCollator()(examples)["not_finite"]
    assert name.endswith("b.png")
