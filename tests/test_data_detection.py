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
"""Reading, checking and augmenting boxes for object detection."""

import json
import logging
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image
from torch.utils.data import DataLoader
from transformers import DeformableDetrImageProcessor, HfArgumentParser, RTDetrImageProcessor

from clusterformer_hf import ClusterFormerConfig
from clusterformer_hf.data.checks import drop_unusable
from clusterformer_hf.data.coco import find_coco_splits, read_coco
from clusterformer_hf.data.detection import (
    DetectionAugmentationArguments,
    DetectionCollator,
    DetectionDataset,
    DetectionEvalTransform,
    DetectionTrainTransform,
    match_categories,
    random_resize,
)
from clusterformer_hf.data.detection_data import DetectionData
from clusterformer_hf.data.digit_scenes import write_digit_scenes
from clusterformer_hf.data.object_columns import read_objects


PROCESSOR = DeformableDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 80})
PLAIN = {"min_scale": 1.0, "max_scale": 1.0, "crop": 0.0, "horizontal_flip": 0.0, "photometric_distort": 0.0}
CATEGORIES = [{"id": 90, "name": "zebra"}, {"id": 3, "name": "car"}, {"id": 7, "name": "train"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def colours(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def annotation(id_: int, image_id: int, category_id: int, bbox, **fields) -> dict:
    return {"id": id_, "image_id": image_id, "category_id": category_id, "bbox": bbox, **fields}


def content() -> dict:
    """Three pictures, the second without boxes, the ids in no order; a crowd, and boxes that need repair."""
    return {
        "images": [
            {"id": 42, "file_name": "a.png", "height": 40, "width": 60},
            {"id": 5, "file_name": "b.png", "height": 50, "width": 30},
            {"id": 17, "file_name": "c.png", "height": 32, "width": 32},
        ],
        "annotations": [
            annotation(10, 17, 90, [2, 3, 10, 12], area=77.5, iscrowd=0),
            annotation(2, 42, 3, [5, 6, 20, 10], area=200, iscrowd=0),
            annotation(3, 42, 7, [-4, 30, 70, 20], area=1400, iscrowd=0),  # outside at three sides
            annotation(4, 42, 7, [10, 10, 0, 5], area=0, iscrowd=0),
            annotation(5, 42, 7, [100, 10, 5, 5], area=25, iscrowd=0),  # all outside
            annotation(6, 42, 3, [0, 0, 60, 20], area=900, iscrowd=1),
        ],
        "categories": [dict(category) for category in CATEGORIES],
    }


def write(folder, content: dict | str):
    """A picture folder and an annotation file, as `read_coco` takes them."""
    folder.mkdir(exist_ok=True)
    for name, (height, width) in {"a.png": (40, 60), "b.png": (50, 30), "c.png": (32, 32)}.items():
        colours(height, width).save(folder / name)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "boxes.json").write_text(text)
    return folder, folder / "boxes.json"


@pytest.fixture
def data(tmp_path):
    return read_coco(*write(tmp_path, content()))


def dataset(data, args: dict | None = None, seed: int | None = 0, processor=PROCESSOR) -> DetectionDataset:
    """Training examples, or evaluation examples without `args`."""
    if args is None:
        return DetectionDataset(data, DetectionEvalTransform(processor), list(range(len(data.categories))))
    transform = DetectionTrainTransform(processor, DetectionAugmentationArguments(**PLAIN | args))
    return DetectionDataset(data, transform, list(range(len(data.categories))), seed=seed)


def test_classes_are_counted_in_the_order_of_their_ids(data):
    assert data.categories == {3: "car", 7: "train", 90: "zebra"}
    assert data.image_ids.tolist() == [42, 5, 17]
    assert data.targets(0)[1].tolist() == [0, 1]
    assert data.targets(2)[1].tolist() == [2]


def test_config_keeps_the_original_ids(data, tmp_path):
    ClusterFormerConfig(**data.config_fields()).save_pretrained(tmp_path / "model")
    config = ClusterFormerConfig.from_pretrained(tmp_path / "model")
    assert config.id2label == {0: "car", 1: "train", 2: "zebra"}
    assert config.label2id == {"car": 0, "train": 1, "zebra": 2}
    assert config.original_category_ids == [3, 7, 90]
    assert match_categories(data, config) == [0, 1, 2]


def test_classes_take_the_ids_of_the_model(data):
    names = ["train", "dog", "zebra", "car"]
    config = ClusterFormerConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    class_ids = match_categories(data, config)
    assert class_ids == [3, 0, 2]
    examples = DetectionDataset(data, DetectionEvalTransform(PROCESSOR), class_ids)
    assert examples[0]["labels"]["class_labels"].tolist() == [3, 0]


def test_classes_beyond_the_model_are_refused(data):
    with pytest.raises(
        ValueError, match=r"boxes.json: `categories` has 3 classes with the ids 3, 7, 90, the model 2\."
    ):
        match_categories(data, ClusterFormerConfig(num_labels=2))


def test_boxes_are_cut_to_the_picture_and_empty_ones_dropped(data, tmp_path, caplog):
    boxes, _ = data.targets(0)
    assert boxes.tolist() == [[5, 6, 25, 16], [0, 30, 60, 40]]
    assert data.box_counts() == {"clamped": 1, "dropped": 2}
    with caplog.at_level(logging.WARNING):
        read_coco(*write(tmp_path, content()))
    assert "boxes.json: 1 boxes reach outside" in caplog.text and "2 have no area" in caplog.text


def test_nothing_is_said_of_sound_boxes(tmp_path, caplog):
    sound = content()
    x, w = map(float, np.float32([59.9, 0.1]))
    assert x + w > 60
    sound["annotations"] = [annotation(1, 42, 3, [x, 0, w, 40])]
    with caplog.at_level(logging.WARNING):
        assert read_coco(*write(tmp_path, sound)).box_counts() == {"clamped": 0, "dropped": 0}
    assert not caplog.records


def test_evaluation_keeps_boxes_and_crowds_as_they_were_read(data):
    truth = data.ground_truth()
    assert [image["id"] for image in truth["images"]] == [42, 5, 17]
    found = {(a["image_id"], a["category_id"], *a["bbox"], a["area"], a["iscrowd"]) for a in truth["annotations"]}
    expected = content()["annotations"]
    assert found == {(a["image_id"], a["category_id"], *a["bbox"], a["area"], a["iscrowd"]) for a in expected}
    assert sorted(a["id"] for a in truth["annotations"]) == list(range(1, 7))


def test_missing_area_and_crowd(tmp_path):
    reduced = content()
    reduced["annotations"] = [annotation(0, 5, 3, [1, 2, 3, 4]), annotation(1, 5, 3, [1, 2, 3, 4], area=9.5, iscrowd=1)]
    truth = read_coco(*write(tmp_path, reduced)).ground_truth()["annotations"]
    assert [(a["area"], a["iscrowd"]) for a in truth] == [(12, 0), (9.5, 1)]


def test_pictures_without_boxes_are_kept(data, tmp_path):
    assert len(data) == 3
    labels = dataset(data)[1]["labels"]
    assert labels["boxes"].shape == (0, 4) and labels["class_labels"].shape == (0,)
    assert (labels["boxes"].dtype, labels["class_labels"].dtype) == (torch.float32, torch.int64)
    augmented = dataset(data, {"crop": 1.0, "horizontal_flip": 1.0, "photometric_distort": 1.0})[1]
    assert augmented["labels"]["boxes"].shape == (0, 4) and augmented["labels"]["class_labels"].shape == (0,)
    none = read_coco(*write(tmp_path, content() | {"annotations": []}))
    assert len(none) == 3 and len(none.targets(0)[0]) == 0 and none.ground_truth()["annotations"] == []


def test_select(data):
    part = data.select([2, 0])
    assert part.image_ids.tolist() == [17, 42] and len(part.pictures) == 2
    for row, original in enumerate([2, 0]):
        for ours, theirs in zip(part.targets(row), data.targets(original)):
            np.testing.assert_array_equal(ours, theirs)
    assert len(part.ground_truth()["annotations"]) == 6
    assert len(data.select([1])) == 1 and len(data.select([])) == 0


def changed(field: str, number: int, **values):
    broken = content()
    broken[field][number] |= values
    return broken


def without(field: str, number: int, key: str):
    broken = content()
    del broken[field][number][key]
    return broken


BROKEN = {
    "no JSON": ('{"images": [\n  1,\n  oops]}', r"boxes.json is no JSON: line 3, column 3"),
    "no object": ("[1, 2]", "must hold an object"),
    "no field": ({"images": [], "annotations": []}, "boxes.json has no list `categories`"),
    "pictures": (changed("images", 1, file_name="lost.png"), r"1 pictures of `images` are missing: .*lost\.png"),
    "image twice": (changed("images", 1, id=42), "ids in `images` that are there more than once: 42"),
    "annotation twice": (changed("annotations", 1, id=10), "ids in `annotations` that are there more than once: 10"),
    "category twice": (changed("categories", 1, id=90), "ids in `categories` that are there more than once: 90"),
    "name twice": (changed("categories", 1, name="zebra"), "`categories` of the same name: zebra"),
    "text id": (changed("images", 1, id="b"), "ids of `images` must be whole numbers, got 'b'"),
    "no file name": (without("images", 2, "file_name"), "no `file_name` in `images`, entries 2"),
    "image": (changed("annotations", 1, image_id=99), r"annotations whose `image_id` is unknown: 2 \(99\)"),
    "category": (changed("annotations", 1, category_id=1), r"annotations whose `category_id` is unknown: 2 \(1\)"),
    "no box": (without("annotations", 1, "bbox"), r"annotations without a `bbox` .*: 2\."),
    "null box": (changed("annotations", 1, bbox=None, segmentation=[[1, 2, 3, 4, 5, 6]]), r"without a `bbox` .*: 2\."),
    "short box": (changed("annotations", 1, bbox=[1, 2, 3]), "annotations whose `bbox` is not four numbers: 2"),
    "text box": (changed("annotations", 1, bbox=["1", 2, 3, 4]), "annotations whose `bbox` is not four numbers: 2"),
    "nan": (changed("annotations", 1, bbox=[1, 2, float("nan"), 4]), "annotations whose `bbox` is not finite: 2"),
    "infinity": (changed("annotations", 2, bbox=[1, 2, float("inf"), 4]), "annotations whose `bbox` is not finite: 3"),
    "list": (
        content() | {"annotations": [[1]]},
        "boxes.json: `annotations` must be objects, entries 0, counted from 0",
    ),
    "number": (changed("images", 1, file_name=5), "boxes.json: `file_name` in `images` must be text, entries 1"),
    "list as id": (changed("annotations", 2, image_id=[5]), "`image_id` in `annotations` must be a number, entries 2"),
    "panoptic": (changed("annotations", 0, segments_info=[]), "`annotations` are panoptic segments"),
}


@pytest.mark.parametrize("broken, message", BROKEN.values(), ids=BROKEN)
def test_broken_files_say_what_is_wrong(broken, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read_coco(*write(tmp_path, broken))
    assert "boxes.json" in str(error.value)


def test_missing_annotation_file(tmp_path):
    with pytest.raises(ValueError, match="none.json cannot be read"):
        read_coco(tmp_path, tmp_path / "none.json")


def test_long_lists_are_cut(tmp_path):
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(50)]
    with pytest.raises(ValueError, match=r"50 pictures of `images` are missing: .*19\.png and 30 more\."):
        read_coco(*write(tmp_path, content() | {"images": images}))


def test_sizes_are_read_upright_where_the_file_has_none(tmp_path):
    missing = content()
    for image in missing["images"]:
        del image["width"], image["height"]
    folder, file = write(tmp_path, missing)
    exif = Image.Exif()
    exif[0x0112] = 6
    colours(60, 40).save(folder / "a.png", exif=exif)  # stored turned, 40 high and 60 wide when upright
    data = read_coco(folder, file)
    assert data.sizes.tolist() == [[40, 60], [50, 30], [32, 32]]
    assert dataset(data)[0]["labels"]["orig_size"].tolist() == [40, 60]
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png: the size cannot be read"):
        read_coco(folder, file)


def test_pictures_that_cannot_be_used(tmp_path, caplog):
    """They are no problem until asked for, name themselves then, and can be left out beforehand."""
    folder, file = write(tmp_path, content())
    (folder / "a.png").write_bytes(b"no picture")
    colours(30, 50).save(folder / "b.png")
    data = read_coco(folder, file)
    examples = dataset(data)
    with pytest.raises(ValueError, match="a.png: not a picture"):
        examples[0]
    with pytest.raises(ValueError, match=r"b.png is 50 x 30 pixels when upright, but 30 x 50 in .*boxes.json"):
        examples[1]
    with pytest.raises(ValueError, match="2 pictures of .*boxes.json cannot be used") as error:
        drop_unusable(data, skip_corrupt=False)
    assert "a.png" in str(error.value) and "b.png" in str(error.value)
    with caplog.at_level(logging.WARNING):
        rest, lines = drop_unusable(data, skip_corrupt=True)
    assert len(lines) == 2 and lines[1] in caplog.text
    assert rest.image_ids.tolist() == [17]
    assert drop_unusable(rest, skip_corrupt=False) == (rest, [])


@pytest.mark.parametrize("num_proc", [None, 2])
def test_pictures_are_checked_once(tmp_path, monkeypatch, num_proc):
    """Another process, or a run that goes on, opens them again only where a file is another one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, file = write(tmp_path, content())
    assert drop_unusable(read_coco(folder, file), skip_corrupt=False, num_proc=num_proc)[1] == []
    with monkeypatch.context() as patch:
        patch.setattr(DetectionData, "open", None)
        assert drop_unusable(read_coco(folder, file), skip_corrupt=False, num_proc=num_proc)[1] == []
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(whole[:60])
    with pytest.raises(ValueError, match="a.png"):
        drop_unusable(read_coco(folder, file), skip_corrupt=False, num_proc=num_proc)
    (folder / "a.png").write_bytes(whole)
    assert drop_unusable(read_coco(folder, file), skip_corrupt=False, num_proc=num_proc)[1] == []


def test_pictures_are_checked_without_a_cache(tmp_path, monkeypatch, caplog):
    folder, file = write(tmp_path, content())
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert drop_unusable(read_coco(folder, file), skip_corrupt=False)[1] == []
    assert "checks the pictures for itself" in caplog.text
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "read_only"))

    def refuse(dir):
        raise PermissionError(f"{dir} is read-only")

    monkeypatch.setattr("clusterformer_hf.data.checks.TemporaryFile", refuse)
    assert drop_unusable(read_coco(folder, file), skip_corrupt=False)[1] == []
    assert "read_only/picture_checks is read-only" in caplog.text


@pytest.mark.parametrize("layout", ["annotations", "images", "beside"])
def test_find_coco_splits(layout, tmp_path):
    for name in ("train2017", "test", "val2017"):
        images = tmp_path / "images" / name if layout == "images" else tmp_path / name
        images.mkdir(parents=True)
        file = images / "_annotations.coco.json"
        if layout != "beside":
            file = tmp_path / "annotations" / f"instances_{name}.json"
            file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    if layout != "beside":  # a file that no split needs
        (file.parent / "instances_trainval2017.json").write_text("{}")
    splits = find_coco_splits(tmp_path)
    assert [(images.name, file.is_file()) for images, file in splits.values()] == [
        ("train2017", True),
        ("val2017", True),
    ]
    assert list(splits) == ["train", "validation"]


def test_folders_that_are_no_coco_data(tmp_path):
    with pytest.raises(ValueError, match="There is no annotations/instances_train.json"):
        find_coco_splits(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_text("{}")
    with pytest.raises(ValueError, match="its pictures are neither in"):
        find_coco_splits(tmp_path)


def object_rows(objects: list, feature, **columns) -> Dataset:
    pictures = [colours(40, 60, seed=row) for row in range(len(objects))]
    features = {"image": datasets.Image(), "objects": feature}
    features |= {name: Value("int64") for name in columns}
    return Dataset.from_dict({"image": pictures, "objects": objects, **columns}, Features(features))


def columns_of(category) -> dict:
    return {"bbox": List(List(Value("float32"), length=4)), "category": List(category)}


OBJECTS = {
    "classes": (ClassLabel(names=["cat", "dog"]), [1, 0], {0: "cat", 1: "dog"}),
    "numbers": (Value("int64"), [8, 3], {3: "3", 8: "8"}),
    "words": (Value("string"), ["dog", "cat"], {0: "cat", 1: "dog"}),
}


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_of_the_datasets_library(kind, records):
    """Columns or records; classes that validation alone lacks keep their ids."""
    feature, categories, names = OBJECTS[kind]
    boxes = [[1, 2, 10, 20], [5, 5, 100, 10]]
    objects = [{"bbox": boxes, "category": categories}, {"bbox": [], "category": []}]
    validation = [{"bbox": boxes[:1], "category": categories[:1]}]
    feature = columns_of(feature)
    if records:
        objects, validation = (
            [[dict(zip(value, pair)) for pair in zip(*value.values())] for value in rows]
            for rows in (objects, validation)
        )
        feature = List({"bbox": List(Value("float32"), length=4), "category": feature["category"].feature})
    splits = DatasetDict(train=object_rows(objects, feature), validation=object_rows(validation, feature))
    found = read_objects(splits, "owner/pets")
    assert found["train"].categories == found["validation"].categories == names
    assert found["train"].image_ids.tolist() == [0, 1]
    assert found["train"].targets(0)[0].tolist() == [[1, 2, 11, 22], [5, 5, 60, 15]]
    assert found["train"].targets(0)[1].tolist() == [1, 0]
    assert found["validation"].targets(0)[1].tolist() == [1]
    example = dataset(found["train"])[1]
    assert example["labels"]["orig_size"].tolist() == [40, 60] and len(example["labels"]["boxes"]) == 0


def test_words_become_numbers_in_alphabetical_order():
    words = ["owl", "ant", "cow", "bee", "elk", "fox", "gnu"]
    rows = object_rows([{"bbox": [[0, 0, 9, 9]] * 7, "category": words}], columns_of(Value("string")))
    data = read_objects(DatasetDict(train=rows), "pets")["train"]
    assert data.class_names == sorted(words)
    assert [data.class_names[label] for label in data.targets(0)[1]] == words


def test_objects_with_all_columns():
    """Ids of objects may start anew in each picture; sizes are taken from the columns."""
    feature = columns_of(ClassLabel(names=["cat"])) | {name: List(Value("int64")) for name in ("id", "area", "iscrowd")}
    value = {"bbox": [[0, 0, 9, 9], [1, 1, 2, 2]], "category": [0, 0], "id": [1, 2], "area": [50, 4], "iscrowd": [0, 1]}
    rows = object_rows([value, value], feature, image_id=[30, 20], width=[60, 60], height=[40, 40])
    data = read_objects(DatasetDict(train=rows), "pets")["train"]
    assert data.image_ids.tolist() == [30, 20] and data.sizes.tolist() == [[40, 60]] * 2
    assert len(data.targets(0)[0]) == 1
    truth = [(a["image_id"], a["area"], a["iscrowd"]) for a in data.ground_truth()["annotations"]]
    assert truth == [(30, 50, 0), (30, 4, 1), (20, 50, 0), (20, 4, 1)]


def test_broken_object_columns():
    feature = columns_of(ClassLabel(names=["cat"]))
    good = {"bbox": [[0, 0, 9, 9]], "category": [0]}
    rows = object_rows([good, good], feature)

    def read(rows):
        return read_objects(DatasetDict(train=rows), "pets")

    with pytest.raises(ValueError, match="pets has no column objects; it has image"):
        read(rows.remove_columns("objects"))
    with pytest.raises(ValueError, match="`objects` of pets must have `bbox` and `category`; it has bbox, kind"):
        read(object_rows([{"bbox": [], "kind": []}], {"bbox": feature["bbox"], "kind": List(Value("int64"))}))
    with pytest.raises(ValueError, match="pets, split train: ids in `image_id` that are there more than once: 4"):
        read(object_rows([good, good], feature, image_id=[4, 4]))
    for bad, message in (
        ({"bbox": [[0, 0, float("nan"), 9]], "category": [0]}, "pets, split train: .* not finite: 2"),
        ({"bbox": [None], "category": [0]}, "pets, split train: .* without a `bbox` .*: 2"),
        ({"bbox": [[0, 0, 9, 9]], "category": [-1]}, r"`category_id` is unknown: 2 \(-1\)"),
        ({"bbox": [[0, 0, 9, 9]], "category": [None]}, r"`category_id` is unknown: 2 \(None\)"),
    ):
        with pytest.raises(ValueError, match=message):
            read(object_rows([good, bad], feature))
    with pytest.raises(ValueError, match="pets, split train: lists in `objects` of image 1 differ .*'category': 1"):
        read(object_rows([good, {"bbox": [[0, 0, 9, 9]] * 2, "category": [0]}], feature))
    with_areas = object_rows([good | {"area": [7]}, good | {"area": None}], feature | {"area": List(Value("int64"))})
    assert read(with_areas)["train"].areas.tolist() == [7, 81]
    twice = feature | {"id": List(Value("int64"))}
    with pytest.raises(ValueError, match="ids in `objects, image 0` that are there more than once: 6"):
        read(object_rows([{"bbox": [[0, 0, 9, 9]] * 2, "category": [0, 0], "id": [6, 6]}], twice))


def test_eval_examples_are_what_the_image_processor_makes(data):
    """Of each picture alone; its own padding, for batches, would change the boxes."""
    for row, name in enumerate(("a.png", "b.png", "c.png")):
        boxes, classes = data.targets(row)
        annotations = [
            {"category_id": int(label), "bbox": [x, y, right - x, bottom - y], "area": 1, "iscrowd": 0}
            for label, (x, y, right, bottom) in zip(classes, boxes.tolist())
        ]
        picture = Image.open(data.pictures[row]["image"]["path"])
        target = {"image_id": int(data.image_ids[row]), "annotations": annotations}
        expected = PROCESSOR(picture, annotations=target, return_tensors="pt")
        example = dataset(data)[row]
        assert name in picture.filename
        torch.testing.assert_close(example["pixel_values"], expected["pixel_values"][0], rtol=0, atol=0)
        for key in ("boxes", "class_labels", "image_id", "orig_size"):
            torch.testing.assert_close(example["labels"][key], expected["labels"][0][key])


def test_boxes_return_to_the_picture_after_post_processing(data):
    """In a batch padded at will, with the processor's own function."""
    batch = DetectionCollator(pad_to_multiple_of=64)([dataset(data)[row] for row in range(3)])
    for row, labels in enumerate(batch["labels"]):
        logits = torch.full((1, len(labels["boxes"]), 3), -20.0)
        logits[0, range(len(labels["boxes"])), labels["class_labels"]] = 20.0
        outputs = SimpleNamespace(logits=logits, pred_boxes=labels["boxes"][None])
        (found,) = PROCESSOR.post_process_object_detection(outputs, 0.5, labels["orig_size"][None])
        boxes, classes = data.targets(row)
        order = np.argsort(found["labels"].numpy())  # equal scores come in any order; the classes here ascend
        np.testing.assert_allclose(found["boxes"].numpy()[order].reshape(-1, 4), boxes, atol=1e-4)
        assert found["labels"].numpy()[order].tolist() == classes.tolist()


def one_rectangle(tmp_path, height: int, width: int, box: list[int]):
    """A black picture with one red rectangle."""
    pixels = np.zeros((height, width, 3), np.uint8)
    x, y, w, h = box
    pixels[y : y + h, x : x + w, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "red.png")
    images = [{"id": 1, "file_name": "red.png", "height": height, "width": width}]
    boxes = {"images": images, "annotations": [annotation(1, 1, 3, box)], "categories": CATEGORIES}
    (tmp_path / "red.json").write_text(json.dumps(boxes))
    return read_coco(tmp_path, tmp_path / "red.json")


def red_box(pixel_values: torch.Tensor) -> np.ndarray:
    """Corners of the red pixels."""
    red = pixel_values[0].numpy()
    y, x = np.nonzero(red > (red.min() + red.max()) / 2)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


def corners(boxes: torch.Tensor, height: int, width: int) -> np.ndarray:
    x, y, w, h = (boxes.numpy() * [width, height, width, height]).T
    return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1)


@pytest.mark.parametrize("size", [{"shortest_edge": 72, "longest_edge": 120}, {"height": 64, "width": 96}])
@pytest.mark.parametrize("shape", [(60, 90), (100, 70)])
def test_boxes_follow_the_pixels(size, shape, tmp_path):
    """Through sizes, crops and mirrors, wherever they cut the rectangle."""
    data = one_rectangle(tmp_path, *shape, [22, 31, 30, 18])
    processor = DeformableDetrImageProcessor(size=size, do_normalize=False)
    examples = dataset(data, {"min_scale": 0.5, "crop": 0.7, "horizontal_flip": 0.5}, processor=processor)
    found, shapes = [], set()
    for epoch in range(80):
        examples.set_epoch(epoch)
        pixel_values, labels = examples[0]["pixel_values"], examples[0]["labels"]
        height, width = pixel_values.shape[1:]
        assert labels["class_labels"].tolist() == [0]
        assert (0 <= labels["boxes"]).all() and (labels["boxes"] <= 1).all()
        box = corners(labels["boxes"], height, width)
        np.testing.assert_allclose(box[0], red_box(pixel_values), atol=1)
        found.append(tuple(box[0].round(1)))
        shapes.add((height, width))
    assert len(set(found)) > 20 and len(shapes) > 5


@pytest.mark.parametrize("crop_size", [40, 170])
def test_squares_at_random_places(crop_size, tmp_path):
    """Pictures that are larger and smaller end in one size; what is cut away has no box."""
    data = one_rectangle(tmp_path, 60, 90, [22, 31, 30, 18])
    processor = DeformableDetrImageProcessor(size={"height": 72, "width": 108}, do_normalize=False)
    args = {"min_scale": 0.5, "max_scale": 1.5, "crop_size": crop_size, "horizontal_flip": 0.5}
    examples = dataset(data, args, processor=processor)
    found = []
    for epoch in range(80):
        examples.set_epoch(epoch)
        pixel_values, boxes = examples[0]["pixel_values"], examples[0]["labels"]["boxes"]
        assert pixel_values.shape == (3, crop_size, crop_size)
        if (pixel_values[0] > 0.6).any():  # padding has the image processor's mean, 0.485
            box = red_box(pixel_values)
            is_sliver = (box[2:] - box[:2]).min() <= 1
            assert len(boxes) == 1 or is_sliver
        else:
            assert len(boxes) == 0
        if len(boxes):
            np.testing.assert_allclose(corners(boxes, crop_size, crop_size)[0], box, atol=1)
            found.append(tuple(box))
    assert len(set(found)) > 30
    if crop_size > 162:  # larger than every picture
        assert len(found) == 80


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip(flip, tmp_path):
    data = one_rectangle(tmp_path, 48, 48, [4, 10, 10, 10])
    examples = dataset(data, {"horizontal_flip": flip})
    for epoch in range(10):
        examples.set_epoch(epoch)
        box = corners(examples[0]["labels"]["boxes"], 48, 48)
        np.testing.assert_allclose(box, [[34, 10, 44, 20] if flip else [4, 10, 14, 20]], atol=1e-4)


def test_plain_training_examples_are_the_evaluation_examples(data):
    for row in range(3):
        train, evaluation = dataset(data, {})[row], dataset(data)[row]
        torch.testing.assert_close(train["pixel_values"], evaluation["pixel_values"], rtol=0, atol=0.02)
        for key, value in evaluation["labels"].items():
            torch.testing.assert_close(train["labels"][key], value)


def test_distortion_changes_pixels_alone(data):
    plain, distorted = dataset(data, {})[0], dataset(data, {"photometric_distort": 1.0})[0]
    torch.testing.assert_close(plain["labels"], distorted["labels"])
    assert (plain["pixel_values"] - distorted["pixel_values"]).abs().max() > 0.2


def test_crops_drop_boxes_whose_centre_is_gone(tmp_path):
    """What remains of the others is inside; each crop keeps at least one."""
    boxes = [[x, y, 10, 10] for x in range(0, 90, 15) for y in range(0, 90, 15)]
    Image.new("RGB", (100, 100)).save(tmp_path / "grid.png")
    images = [{"id": 1, "file_name": "grid.png", "height": 100, "width": 100}]
    annotations = [annotation(number, 1, 3, box) for number, box in enumerate(boxes)]
    (tmp_path / "grid.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES})
    )
    examples = dataset(read_coco(tmp_path, tmp_path / "grid.json"), {"crop": 1.0})
    numbers = set()
    for epoch in range(40):
        examples.set_epoch(epoch)
        labels = examples[0]["labels"]
        assert len(labels["boxes"]) == len(labels["class_labels"]) >= 1
        assert (labels["boxes"][:, 2:] > 0).all()
        box = corners(labels["boxes"], 1, 1)
        assert box.min() >= -1e-6 and box.max() <= 1 + 1e-6
        numbers.add(len(labels["boxes"]))
    assert min(numbers) < 15 and max(numbers) == len(boxes)  # some crops keep everything


def test_random_sizes(data):
    """From min_scale to max_scale of the shorter side, the longer within its limit, and the proportions kept."""
    examples = dataset(data, {"min_scale": 0.5, "max_scale": 1.0})
    shapes = []
    for epoch in range(60):
        examples.set_epoch(epoch)
        shapes.append(examples[1]["pixel_values"].shape[1:])  # 50 x 30
    widths = [width for _, width in shapes]
    assert min(widths) == 24 and max(widths) == 48
    assert all(height == pytest.approx(width * 5 / 3, abs=1) and height <= 80 for height, width in shapes)
    processor = DeformableDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 60})
    for largest, limit in ((0.9, 60), (2.0, 120)):
        resize = random_resize(processor, 0.9, largest)
        assert max(max(resize(torch.zeros(3, 90, 30)).shape) for _ in range(30)) == limit
    with pytest.raises(ValueError, match="max_height"):
        random_resize(DeformableDetrImageProcessor(size={"max_height": 8, "max_width": 8}), 1, 1)


def test_other_image_processors(data):
    """One that resizes to a fixed shape and has no mask."""
    processor = RTDetrImageProcessor(size={"height": 32, "width": 64})
    for examples in (dataset(data, processor=processor), dataset(data, {"crop": 1.0}, processor=processor)):
        assert examples[0]["pixel_values"].shape == (3, 32, 64)
    assert dataset(data, {"crop_size": 48}, processor=processor)[0]["pixel_values"].shape == (3, 48, 48)


def test_image_processors_do_not_pad(data):
    """The collator does, so that boxes stay shares of the picture."""
    padding = DeformableDetrImageProcessor(size=PROCESSOR.size, pad_size={"height": 128, "width": 128})
    for args in (None, {}):
        padded, plain = dataset(data, args, processor=padding)[1], dataset(data, args)[1]
        torch.testing.assert_close(padded["pixel_values"], plain["pixel_values"])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = write_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", 12, 3, size=64)
    return read_coco(*find_coco_splits(folder)["train"])


def test_examples_depend_on_seed_epoch_and_row_alone(scenes):
    args = {"min_scale": 0.5, "crop": 0.5, "horizontal_flip": 0.5, "photometric_distort": 0.5}
    examples = dataset(scenes, args)

    def epoch(number, workers):
        examples.set_epoch(number)
        loader = DataLoader(examples, 4, collate_fn=DetectionCollator(), num_workers=workers)
        return list(loader)

    first = epoch(0, workers=0)
    torch.manual_seed(5)
    torch.testing.assert_close(epoch(0, workers=2), first, rtol=0, atol=0)
    assert any(one["pixel_values"].shape != two["pixel_values"].shape for one, two in zip(epoch(1, workers=0), first))
    other = dataset(scenes, args, seed=1)
    assert any(one["pixel_values"].shape != examples[row]["pixel_values"].shape for row, one in enumerate(other))


def test_collator_pads_and_marks(data):
    examples = [dataset(data)[row] for row in range(3)]  # 48 x 72, 80 x 48, 48 x 48
    batch = DetectionCollator()(examples)
    assert batch["pixel_values"].shape == (3, 3, 80, 72) and batch["pixel_mask"].shape == (3, 80, 72)
    for row, example in enumerate(examples):
        height, width = example["pixel_values"].shape[1:]
        torch.testing.assert_close(batch["pixel_values"][row, :, :height, :width], example["pixel_values"])
        assert batch["pixel_mask"][row, :height, :width].all()
        assert batch["pixel_mask"][row].sum() == height * width
        assert batch["pixel_values"][row].masked_select(batch["pixel_mask"][row] == 0).eq(0).all()
        assert batch["labels"][row] is example["labels"]
    assert set(batch) == {"pixel_values", "pixel_mask", "labels"}
    assert DetectionCollator(pad_to_multiple_of=32)(examples)["pixel_values"].shape[2:] == (96, 96)
    assert DetectionCollator(pad_to_multiple_of=8)(examples)["pixel_values"].shape[2:] == (80, 72)


def test_pixels_that_are_not_finite_are_named(data):
    examples = [dataset(data, {})[row] for row in range(3)]
    assert "not_finite" not in DetectionCollator()(examples)
    examples[1]["pixel_values"][0, 0, 0] = float("nan")
    (name,) = DetectionCollator()(examples)["not_finite"]
    assert name.endswith("b.png")


def test_augmentation_arguments():
    (args,) = HfArgumentParser(DetectionAugmentationArguments).parse_args_into_dataclasses(["--horizontal_flip", "0"])
    assert args.horizontal_flip == 0
    for wrong in ({"crop": 1.5}, {"horizontal_flip": -1}, {"min_scale": 2.0}, {"min_scale": 0.0}, {"crop_size": 0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=name):
            DetectionAugmentationArguments(**wrong)
