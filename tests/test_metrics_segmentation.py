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
"""Mean IoU, mask AP and panoptic quality in Trainer: the definitions' numbers, on one process and on two."""

import json
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hotcoco.panoptic import PanopticEval
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.multiprocessing import start_processes
from torchmetrics.classification import MulticlassJaccardIndex
from transformers import EvalPrediction, Mask2FormerImageProcessor, SegformerImageProcessor, Trainer, TrainingArguments
from transformers.utils import ModelOutput

from clusterformer_hf.data.coco_panoptic import read_panoptic, segment_colours
from clusterformer_hf.data.label_maps import SemanticData, read_label_maps
from clusterformer_hf.data.rle import decode_masks, encode_masks
from clusterformer_hf.data.segmentation import SegmentationCollator, SemanticDataset, UniversalDataset
from clusterformer_hf.data.segmentation_augmentation import SegmentationEvalTransform
from clusterformer_hf.metrics.average_precision import average_precision, match_objects
from clusterformer_hf.metrics.detection import STATISTICS, set_up_evaluation
from clusterformer_hf.metrics.instance import (
    InstanceMetric,
    InstancePostProcessor,
    read_instances,
    write_mask_results,
)
from clusterformer_hf.metrics.panoptic import (
    PanopticMetric,
    PanopticPostProcessor,
    number_segments,
    panoptic_counts,
    panoptic_quality,
    png_name,
    write_panoptic_json,
)
from clusterformer_hf.metrics.segmentation import (
    JoinedMetric,
    JoinedPostProcessor,
    SegmentationTrainer,
    find_stride,
    real_area,
)
from clusterformer_hf.metrics.semantic import (
    SemanticMetric,
    SemanticPostProcessor,
    UniversalSemanticPostProcessor,
    confusion_matrix,
    semantic_scores,
)


ROOT = Path(__file__).parents[1]
CATEGORIES = [
    {"id": 3, "name": "car", "isthing": 1},
    {"id": 7, "name": "train", "isthing": 1},
    {"id": 90, "name": "sky", "isthing": 0},
]
# In another order than the data's; the model knows a class more.
CLASS_IDS = [2, 0, 3]
ID2LABEL = {0: "train", 1: "dog", 2: "car", 3: "sky"}
NUM_LABELS = 4
NUM_PICTURES = 11
NUM_QUERIES = 12
PROCESSOR = Mask2FormerImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}, size_divisor=4)


# Mean IoU


def test_confusion_worked_by_hand():
    """
    Five pixels count, the one with 255 does not: classes 0 as 0, 0 as 1, 1 as 1 twice, 2 as 0. So the IoUs are
    1 / (2 + 2 - 1) of class 0, 2 / (2 + 3 - 2) of class 1 and 0 / 1 of class 2, and the accuracies 1/2, 2/2 and 0/1.
    Class 3 is nowhere and in no mean. That 2 was found at the pixel with 255 counts for nothing.
    """
    truth, found = torch.tensor([[0, 0, 1], [1, 2, 255]]), torch.tensor([[0, 1, 1], [1, 0, 2]])
    confusion = confusion_matrix(truth, found, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    scores = semantic_scores(confusion.numpy(), ["a", "b", "c", "d"])
    assert scores == pytest.approx(
        {"mIoU": 1 / 3, "mean_accuracy": 1 / 2, "pixel_accuracy": 3 / 5, "IoU_a": 1 / 3, "IoU_b": 2 / 3, "IoU_c": 0}
    )


def test_a_class_that_is_only_found_lowers_the_iou_but_has_no_accuracy():
    scores = semantic_scores(confusion_matrix(torch.tensor([0, 0]), torch.tensor([0, 1]), 2).numpy(), ["a", "b"])
    assert scores == {"mIoU": 0.25, "mean_accuracy": 0.5, "pixel_accuracy": 0.5, "IoU_a": 0.5, "IoU_b": 0.0}


def test_nothing_to_compare_with():
    confusion = confusion_matrix(torch.full((4,), 255), torch.zeros(4), 2)
    assert confusion.sum() == 0 and np.isnan(semantic_scores(confusion.numpy(), ["a", "b"])["mIoU"])


def test_class_255_of_panoptic_segments_counts():
    """Only in label maps is it void."""
    classes, masks = torch.zeros(1, 257), torch.full((1, 2, 2), 9.0)
    classes[0, 255] = 9
    target = {"segments": torch.tensor([[0, 1], [1, 1]]), "class_labels": torch.tensor([255])}
    reader = UniversalSemanticPostProcessor(Mask2FormerImageProcessor())
    confusion = reader.read(classes, masks, target | {"orig_size": torch.tensor([2, 2])})["confusion"]
    assert confusion.shape == (256, 256) and confusion.sum() == confusion[255, 255] == 3


def test_mean_iou_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    truth, found = (torch.randint(0, 6, (3, 40, 50), generator=generator) for _ in range(2))
    found = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth, found)
    truth[:, :5] = 255
    scores = semantic_scores(confusion_matrix(truth, found, 6).numpy(), list("abcdef"))
    expected = MulticlassJaccardIndex(6, average="none", ignore_index=255)(found, truth)
    assert [scores[f"IoU_{name}"] for name in "abcdef"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert scores["mIoU"] == pytest.approx(expected.mean().item(), abs=1e-6)


@pytest.mark.parametrize("truth, found", [(4, 0), (-1, 0), (0, 4)])
def test_ids_beyond_the_model_are_refused(truth, found):
    with pytest.raises(ValueError, match=r"Class ids must be in \[0, 4\), got"):
        confusion_matrix(torch.tensor([1, truth]), torch.tensor([1, found]), 4)


# Panoptic quality


@dataclass
class Case:
    """
    A picture of 10 x 10 pixels, and what is to be counted for its classes: 0 and 1, things, and 2, stuff.

    Segments are (class, first row, last row but one), as wide as the picture, crowds with a fourth. By class, `counts`
    are the segments found, wrong and missed, and the sum of IoUs.
    """

    truth: list[tuple]
    found: list[tuple]
    counts: dict[int, tuple]

    def maps(self) -> list[np.ndarray]:
        drawn = [np.zeros((10, 10), np.int64), np.zeros((10, 10), np.int64)]
        for segments, side in zip(drawn, (self.truth, self.found)):
            for number, (_, start, stop, *_) in enumerate(side, start=1):
                segments[start:stop] = number
        return drawn


CROWD = True
CASES = {
    "exact": Case([(0, 0, 4), (2, 4, 10)], [(0, 0, 4), (2, 4, 10)], {0: (1, 0, 0, 1), 2: (1, 0, 0, 1)}),
    # 30 pixels are shared of 40 and 40, so 30 / 50; and 50 of 60 and 50, so 50 / 60.
    "shifted": Case([(0, 0, 4), (2, 4, 10)], [(0, 1, 5), (2, 5, 10)], {0: (1, 0, 0, 3 / 5), 2: (1, 0, 0, 5 / 6)}),
    # 20 / 40 is not above a half.
    "half": Case([(0, 0, 4), (2, 4, 10)], [(0, 0, 2), (2, 4, 10)], {0: (0, 1, 1, 0), 2: (1, 0, 0, 1)}),
    "other class": Case([(0, 0, 10)], [(1, 0, 10)], {0: (0, 0, 1, 0), 1: (0, 1, 0, 0)}),
    "nothing found": Case([(0, 0, 4), (2, 4, 10)], [], {0: (0, 0, 1, 0), 2: (0, 0, 1, 0)}),
    # All that is found lies in void: neither right nor wrong.
    "nothing there": Case([], [(0, 0, 4)], {}),
    # Rows 4 and 5 are void and no part of the union: 40 / 40.
    "void beside": Case([(0, 0, 4), (2, 6, 10)], [(0, 0, 6)], {0: (1, 0, 0, 1), 2: (0, 0, 1, 0)}),
    # With 30 of its 50 pixels in void it is not counted; with 20 of 40, exactly a half, it is wrong.
    "mostly void": Case([(2, 0, 5)], [(0, 3, 8)], {2: (0, 0, 1, 0)}),
    "half void": Case([(2, 0, 5)], [(0, 3, 7)], {0: (0, 1, 0, 0), 2: (0, 0, 1, 0)}),
    # In a crowd of their class segments are not counted, and crowds are not missed.
    "in a crowd": Case([(0, 0, 6, CROWD), (2, 6, 10)], [(0, 0, 2), (0, 2, 5)], {2: (0, 0, 1, 0)}),
    "in a crowd of another class": Case([(1, 0, 6, CROWD)], [(0, 0, 2)], {0: (0, 1, 0, 0)}),
    # However well it fits, a crowd is never found.
    "on a crowd": Case([(0, 0, 10, CROWD)], [(0, 0, 10)], {}),
    # 20 pixels of the crowd and 10 of void are more than half of 50; without the void they are not.
    "crowd and void": Case([(2, 0, 2), (0, 2, 4, CROWD)], [(0, 0, 5)], {2: (0, 0, 1, 0)}),
    "crowd alone": Case([(2, 0, 2), (0, 2, 4, CROWD), (2, 4, 5)], [(0, 0, 5)], {0: (0, 1, 0, 0), 2: (0, 0, 2, 0)}),
    # COCO's tool knows the last crowd of a class alone.
    "first of two crowds": Case([(0, 0, 3, CROWD), (0, 5, 8, CROWD)], [(0, 0, 2)], {0: (0, 1, 0, 0)}),
    "last of two crowds": Case([(0, 0, 3, CROWD), (0, 5, 8, CROWD)], [(0, 6, 8)], {}),
    # Two found as one: 50 / 90 is above a half, so one of them is found and the other missed.
    "merged": Case([(0, 0, 5), (0, 5, 9), (2, 9, 10)], [(0, 0, 9), (2, 9, 10)], {0: (1, 0, 1, 5 / 9), 2: (1, 0, 0, 1)}),
}


def counts_of(case: Case) -> np.ndarray:
    truth, found = case.maps()
    classes = [np.array([one[0] for one in segments], np.int64) for segments in (case.truth, case.found)]
    crowds = np.array([len(one) > 3 for one in case.truth], bool)
    return panoptic_counts(truth, classes[0], crowds, found, classes[1], 3)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_counts_worked_by_hand(case):
    expected = np.zeros((3, 4))
    for label, counts in case.counts.items():
        expected[label] = counts
    np.testing.assert_allclose(counts_of(case), expected, rtol=1e-12)


def test_quality_worked_by_hand():
    """
    Class 0: two found with IoUs that add up to 1.5, one wrong, three missed: PQ 1.5 / (2 + 0.5 + 1.5), SQ 1.5 / 2,
    RQ 2 / 4. Class 1 is nowhere. Class 2, stuff: one wrong, all 0.
    """
    counts = np.array([[2, 1, 3, 1.5], [0, 0, 0, 0], [0, 1, 0, 0]])
    scores = panoptic_quality(counts, np.array([True, True, False]), ["a", "b", "c"])
    assert scores == {
        **{"PQ": 0.1875, "SQ": 0.375, "RQ": 0.25, "PQ_things": 0.375, "SQ_things": 0.75, "RQ_things": 0.5},
        **{"PQ_stuff": 0, "SQ_stuff": 0, "RQ_stuff": 0},
        **{"PQ_a": 0.375, "SQ_a": 0.75, "RQ_a": 0.5, "PQ_c": 0, "SQ_c": 0, "RQ_c": 0},
    }
    nothing = panoptic_quality(np.zeros((1, 4)), np.array([True]), ["a"])
    assert nothing["PQ"] == nothing["PQ_things"] == nothing["RQ_stuff"] == -1 and "PQ_a" not in nothing


def write_segments(folder: Path, name: str, pictures: list[tuple[np.ndarray, list]]) -> Path:
    """A file in COCO's panoptic format, and its PNGs in the folder of the same name."""
    (folder / name).mkdir(parents=True)
    annotations = []
    for image_id, (segments, infos) in enumerate(pictures, start=1):
        Image.fromarray(segment_colours(segments)).save(folder / name / f"{image_id}.png")
        areas = [int((segments == number).sum()) for number in range(1, len(infos) + 1)]
        annotations.append(
            {
                "image_id": image_id,
                "file_name": f"{image_id}.png",
                "segments_info": [
                    {"id": number, "category_id": CATEGORIES[label]["id"], "iscrowd": int(crowd), "area": area}
                    for number, ((label, crowd), area) in enumerate(zip(infos, areas), start=1)
                ],
            }
        )
    images = [{"id": one["image_id"], "file_name": one["file_name"], "height": 10, "width": 10} for one in annotations]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"


def hotcoco_results(truth: Path, found: Path, **folders) -> dict:
    evaluation = PanopticEval(str(truth), str(found), **folders)
    evaluation.evaluate()
    return evaluation.results()


def agree_with_hotcoco(scores: dict, expected: dict):
    for suffix, group in (("", "All"), ("_things", "Things"), ("_stuff", "Stuff")):
        for name in ("PQ", "SQ", "RQ"):
            assert scores[name + suffix] == pytest.approx(expected[group][name.lower()], rel=1e-12, abs=1e-12)
    for category in CATEGORIES:
        for name in ("PQ", "SQ", "RQ"):
            found = scores.get(f"{name}_{category['name']}", -1)
            wanted = expected["per_class"].get(category["id"], expected["per_class"].get(str(category["id"])))
            assert found == pytest.approx(wanted[name.lower()], rel=1e-12, abs=1e-12)


def test_cases_by_hand_are_those_of_hotcoco(tmp_path):
    """Which says that it equals COCO's own tool."""
    for number, case in enumerate(CASES.values()):
        folder = tmp_path / str(number)
        truth, found = case.maps()
        write_segments(folder, "truth", [(truth, [(one[0], len(one) > 3) for one in case.truth])])
        write_segments(folder, "found", [(found, [(one[0], False) for one in case.found])])
        expected = hotcoco_results(folder / "truth.json", folder / "found.json")
        scores = panoptic_quality(counts_of(case), np.array([True, True, False]), [one["name"] for one in CATEGORIES])
        agree_with_hotcoco(scores, expected)


def random_segments(generator: np.random.Generator, size: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles of random classes over each other and over void; all have a pixel."""
    segments = np.zeros((size, size), np.int64)
    for number in range(1, generator.integers(2, 7)):
        (top, left), (height, width) = generator.integers(0, size - 2, 2), generator.integers(2, size, 2)
        segments[top : top + height, left : left + width] = number
    segments = np.unique(segments, return_inverse=True)[1].reshape(size, size) if (segments == 0).any() else segments
    present = np.setdiff1d(segments, [0])
    segments = np.searchsorted(present, segments, side="right")
    return segments, generator.integers(0, 3, len(present))


def moved(generator: np.random.Generator, segments: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The segments moved by up to a pixel; a few get another class."""
    segments = np.roll(segments, generator.integers(-1, 2, 2), (0, 1))
    return segments, np.where(generator.random(len(classes)) < 0.2, generator.integers(0, 3, len(classes)), classes)


def test_random_segments_score_as_in_hotcoco(tmp_path):
    """100 pictures, with crowds and void, added up picture by picture."""
    generator, counts, pictures = np.random.default_rng(0), np.zeros((3, 4)), ([], [])
    for _ in range(100):
        truth, true_classes = random_segments(generator)
        found, classes = moved(generator, truth, true_classes)
        crowds = (generator.random(len(true_classes)) < 0.2) & (true_classes < 2)
        counts += panoptic_counts(truth, true_classes, crowds, found, classes, 3)
        pictures[0].append((truth, list(zip(true_classes, crowds))))
        pictures[1].append((found, [(label, False) for label in classes]))
    write_segments(tmp_path, "truth", pictures[0])
    write_segments(tmp_path, "found", pictures[1])
    scores = panoptic_quality(counts, np.array([True, True, False]), [one["name"] for one in CATEGORIES])
    agree_with_hotcoco(scores, hotcoco_results(tmp_path / "truth.json", tmp_path / "found.json"))
    assert all(0.1 < scores[name] < 0.95 for name in ("PQ_car", "PQ_train", "PQ_sky", "SQ", "RQ"))
    assert (counts[:, :3] > 5).all()


def test_segments_without_pixels_or_of_unknown_classes_are_void():
    segmentation = torch.tensor([[1, 1, 4], [2, 4, -1]])
    infos = [{"id": 1, "label_id": 5}, {"id": 3, "label_id": 2}, {"id": 4, "label_id": 2}, {"id": 2, "label_id": 0}]
    segments, classes = number_segments(segmentation, infos, {2: 0, 0: 1}, np.array([True, True]))
    assert segments.tolist() == [[0, 0, 1], [2, 1, 0]] and classes.tolist() == [0, 1]


def test_stuff_is_one_segment_and_things_stay_apart(data):
    """
    Four masks, a quarter of the picture each: sky, car, sky, car. Fused by transformers itself, the second car gets the
    first one's id: after the sky's second part it goes on counting from the sky's.
    """
    masks = torch.full((1, 4, 8, 8), -9.0)
    for query in range(4):
        masks[0, query, 2 * query : 2 * query + 2] = 9
    classes = torch.full((1, 4, NUM_LABELS + 1), -9.0)
    classes[0, [0, 2], 3] = classes[0, [1, 3], 2] = 9
    outputs = ModelOutput(class_queries_logits=classes, masks_queries_logits=masks)
    found = {
        stuff: PROCESSOR.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=stuff, target_sizes=[(8, 8)])[0]
        for stuff in (frozenset(), frozenset([3]))
    }
    args = {2: 0, 0: 1, 3: 2}, np.array([True, True, False])
    segments, labels = number_segments(*found[frozenset()].values(), *args)
    assert segments[:, 0].tolist() == [1, 1, 2, 2, 1, 1, 3, 3] and labels.tolist() == [2, 0, 0]
    assert found[frozenset([3])]["segmentation"][:, 0].tolist() == [1, 1, 2, 2, 1, 1, 2, 2]
    target = {
        "image_id": torch.tensor([1]),
        "orig_size": torch.tensor([8, 8]),
        "segments": torch.as_tensor(segments),
        "class_labels": torch.tensor([3, 2, 2]),
        "crowds": torch.zeros(3, dtype=torch.bool),
    }
    result = PanopticPostProcessor(PROCESSOR, data, CLASS_IDS).read(classes[0], masks[0], target)
    assert result["counts"].tolist() == [[2, 0, 0, 2], [0, 0, 0, 0], [1, 0, 0, 1]]


# Average precision of masks


BOX = np.zeros((100, 100), bool)
BOX[10:50, 10:60] = True
LOWER, OTHER = np.zeros_like(BOX), np.zeros_like(BOX)
LOWER[10:35, 10:60] = True
OTHER[50:90, 0:40] = True
# Every second column of the mask: half of its pixels, with nearly the same box.
STRIPES = BOX & (np.arange(100) % 2 == 0)


def entry(mask: np.ndarray, category_id: int = 1, score: float = 0.9, **fields) -> dict:
    """A mask to be found, or one that was."""
    rle = {"size": [100, 100], "counts": encode_masks(mask[None])[0].decode()}
    fields = {"id": 1, "area": int(mask.sum()), "iscrowd": 0} | fields
    return {"category_id": category_id, "segmentation": rle, "bbox": [0, 0, 1, 1], "score": score, **fields}


CROWD_BELOW = entry(OTHER, id=2, iscrowd=1)
# For each picture the masks to be found and those that were.
MASK_CASES = {
    "found": ([([entry(BOX)], [entry(BOX)])], {"AP": 1, "AP50": 1, "APm": 1, "APs": -1, "AR1": 1, "AP_a": 1}),
    "nothing": ([([entry(BOX)], [])], {"AP": 0, "AR100": 0, "AP_a": 0}),
    # IoU 25 / 40 = 0.625: three of the ten thresholds, 0.5, 0.55 and 0.6.
    "roughly": ([([entry(BOX)], [entry(LOWER)])], {"AP": 0.3, "AP50": 1, "AP75": 0}),
    # IoU 0.5 of the masks, while the boxes' would be 0.98: one threshold.
    "not the box": ([([entry(BOX)], [entry(STRIPES)])], {"AP": 0.1, "AP50": 1}),
    # Recall reaches one half, which is 51 of the 101 recalls.
    "one of two": ([([entry(BOX)], []), ([entry(BOX)], [entry(BOX)])], {"AP": 51 / 101, "AR100": 0.5}),
    # What is found where nothing is, is wrong.
    "empty picture": ([([], [entry(BOX, score=0.95)]), ([entry(BOX)], [entry(BOX)])], {"AP": 0.5, "AR100": 1}),
    # The wrong one is of medium area, and so wrong among those.
    "wrong one first": ([([entry(BOX)], [entry(BOX), entry(OTHER, score=0.95)])], {"AP": 0.5, "APm": 0.5, "AR1": 0}),
    "other class": ([([entry(BOX)], [entry(BOX, 2)])], {"AP": 0, "AP_a": 0}),
    "in a crowd": ([([entry(BOX), CROWD_BELOW], [entry(BOX), entry(OTHER, score=0.95)])], {"AP": 1}),
    "nothing there": ([([], [entry(BOX)]), ([], [])], {"AP": -1, "AR100": -1}),
}


def scores_of(pictures: list[tuple[list, list]], iou_type: str = "segm", size=(100, 100)) -> dict[str, float]:
    matches = [match_objects(truth, found, iou_type, size) for truth, found in pictures]
    return average_precision(matches, {1: "a", 2: "b", 3: "c"})


def all_at_once(pictures: list[tuple[list, list]], iou_type: str = "segm", size=(100, 100)) -> np.ndarray:
    """The twelve statistics of pycocotools."""
    numbered = [
        [one | {"image_id": row} for row, picture in enumerate(pictures) for one in picture[side]] for side in (0, 1)
    ]
    content = {
        "images": [{"id": row, "height": size[0], "width": size[1]} for row in range(len(pictures))],
        "annotations": [one | {"id": number} for number, one in enumerate(numbered[0], start=1)],
        "categories": [{"id": category_id, "name": str(category_id)} for category_id in (1, 2, 3)],
    }
    field = {"segm": "segmentation", "bbox": "bbox"}[iou_type]  # a box would give a mask's area
    results = [{name: one[name] for name in ("image_id", "category_id", "score", field)} for one in numbered[1]]
    return official(content, results, iou_type)


@pytest.mark.parametrize("pictures, values", MASK_CASES.values(), ids=MASK_CASES)
def test_average_precision_worked_by_hand(pictures, values, capsys):
    metrics = scores_of(pictures)
    assert {name: metrics[name] for name in values} == pytest.approx(values)
    assert list(metrics)[:12] == list(STATISTICS) and capsys.readouterr() == ("", "")
    assert set(metrics) - set(STATISTICS) == ({"AP_a"} if any(truth for truth, _ in pictures) else set())


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
def test_average_precision_of_pycocotools(iou_type):
    """
    Equal in all digits to what it says of all pictures at once: 40 pictures of 300 x 400 with objects of all sizes,
    crowds and up to 150 findings, of which some have equal scores.
    """
    generator, pictures = np.random.default_rng(0), []
    for _ in range(40):
        truth, found = [], []
        for number in range(generator.integers(0, 12)):
            x, y = generator.integers(0, [350, 250])
            w, h = generator.integers(4, [400 - x, 300 - y]) // generator.integers(1, 5) + 1
            box = np.array([x, y, w, h])
            if number % 2:  # a part of the one before, so that findings fit both
                box = truth[-1]["bbox"] - np.array([0, 0, 1, 1]) * generator.integers(0, 9, 4)
                box = np.maximum(box, [0, 0, 1, 1])
            truth.append(_object(box) | {"id": number + 1, "iscrowd": int(generator.random() < 0.1)})
            for _ in range(generator.integers(0, 30)):
                moved = np.maximum(box + generator.integers(-4, 5, 4), [0, 0, 1, 1])
                found.append(_object(moved) | {"score": round(generator.random(), 2)})
        for one in truth + found:
            one["category_id"] = int(generator.integers(1, 3))
        pictures.append((truth, found[:150]))
    expected = all_at_once(pictures, iou_type, (300, 400))
    metrics = scores_of(pictures, iou_type, (300, 400))
    assert [metrics[name] for name in STATISTICS] == expected.tolist()
    assert len(set(expected.tolist())) == 12 and all(0.02 < value < 0.98 for value in expected)
    assert set(metrics) - set(STATISTICS) == {"AP_a", "AP_b"}
    assert (metrics["AP_a"] + metrics["AP_b"]) / 2 == pytest.approx(metrics["AP"])


def test_what_is_matched_depends_on_the_areas():
    """
    A small mask within a medium one. Of all areas the first finding is the small one and the second the medium one; of
    medium areas the first is the medium one, and the second is wrong, before the right one of another picture.
    """
    large, small, first, second = (np.zeros_like(BOX) for _ in range(4))
    large[:50, :60], small[:50, :20], first[:50, :34], second[:50, 20:60] = True, True, True, True
    pictures = [
        ([entry(large), entry(small, id=2)], [entry(first), entry(second, score=0.8)]),
        ([entry(BOX)], [entry(BOX, score=0.5)]),
    ]
    matched = match_objects(*pictures[0], "segm", (100, 100))["matched"]
    assert matched[:3, 0].tolist() == [[True, True], [True, True], [True, False]]  # all, small and medium, IoU 0.5
    metrics = scores_of(pictures)
    assert [metrics[name] for name in STATISTICS] == all_at_once(pictures).tolist()


def _object(box: np.ndarray) -> dict:
    """A rectangle with a corner cut off."""
    x, y, w, h = box.tolist()
    mask = np.zeros((300, 400), bool)
    mask[y : y + h, x : x + w] = True
    mask[y : y + h // 3, x : x + w // 3] = False
    rle = {"size": [300, 400], "counts": encode_masks(mask[None])[0].decode()}
    return {"bbox": [x, y, w, h], "segmentation": rle, "area": int(mask.sum())}


def test_instances_are_those_of_the_image_processor():
    """At 384 x 384, where it resizes nothing twice: the same masks, classes and scores, which it rounds to 6 digits."""
    generator = torch.Generator().manual_seed(0)
    classes, masks = torch.randn(7, 5, generator=generator) * 2, torch.randn(7, 12, 16, generator=generator)
    scores, labels, counts = read_instances(classes, masks, (384, 384), max_instances=7)
    outputs = ModelOutput(class_queries_logits=classes[None], masks_queries_logits=masks[None])
    (expected,) = PROCESSOR.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True
    )
    order = sorted(range(7), key=lambda number: -expected["segments_info"][number]["score"])
    infos = [expected["segments_info"][number] for number in order]
    assert labels.tolist() == [info["label_id"] for info in infos]
    assert scores.tolist() == pytest.approx([info["score"] for info in infos], abs=2e-6)
    assert (decode_masks(counts, 384, 384) == expected["segmentation"][order].bool().numpy()).all()


def test_masks_are_resized_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    args = torch.randn(9, 5, generator=generator), torch.randn(9, 8, 8, generator=generator), (50, 40)
    whole = read_instances(*args)
    monkeypatch.setattr("clusterformer_hf.metrics.instance.MAX_ELEMENTS", 5000)  # two masks of 2,000
    parts = read_instances(*args)
    assert (whole[0] == parts[0]).all() and (whole[1] == parts[1]).all() and whole[2] == parts[2]
    assert len(whole[2]) == 36 and (np.diff(whole[0]) <= 0).all()


def test_queries_without_pixels_are_no_instances():
    """As those that Trainer fills up with -100 where a process has fewer queries."""
    classes, masks = torch.tensor([[3.0, 0, 0], [-100, -100, -100]]), torch.full((2, 8, 8), -100.0)
    masks[0, :4], masks[0, 4:] = 5, -5
    scores, labels, counts = read_instances(classes, masks, (16, 16))
    assert labels.tolist() == [0, 1] and len(scores) == 2  # one query in two classes
    assert decode_masks(counts, 16, 16).sum(axis=(1, 2)).tolist() == [128, 128]


# Padding


def test_padding_is_cut_off():
    logits = torch.arange(2 * 8 * 10.0).reshape(2, 8, 10)
    target = {"size": torch.tensor([16, 24]), "padded_size": torch.tensor([32, 40])}
    assert torch.equal(real_area(logits, target), logits[:, :4, :6])
    full = {"size": torch.tensor([32, 40]), "padded_size": torch.tensor([32, 40])}
    assert torch.equal(real_area(logits, full), logits)
    # Of models whose logits have the size of the picture.
    assert torch.equal(real_area(torch.ones(1, 32, 40), target), torch.ones(1, 16, 24))


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6, 7, 12, 16])
def test_strides_are_found(stride):
    for sides in ((48, 96), (200, 129), (333, 500), (640, 480)):
        assert find_stride(sides, [-(-side // stride) for side in sides]) == stride


def test_small_pictures_have_strides_of_powers_of_two():
    assert find_stride((5, 9), (2, 3)) == 4


@pytest.mark.parametrize("height, width", [(33, 50), (21, 90), (64, 35)])
def test_a_border_within_a_cell(height, width):
    """
    Cells of 4 x 4 pixels at the values of a ramp, of which the last is cut: resized to the picture they are the ramp
    again, where interpolation reaches, though cells were sampled twice.
    """
    rows, columns = -(-height // 4), -(-width // 4)
    y = torch.arange(rows + 3.0) * 4 + 2
    x = torch.arange(columns + 2.0) * 4 + 2
    logits = torch.stack([y[:, None].expand(-1, len(x)), x.expand(len(y), -1)])
    target = {"size": torch.tensor([height, width]), "padded_size": torch.tensor([len(y) * 4, len(x) * 4])}
    ramps = F.interpolate(real_area(logits, target)[None], size=(height, width), mode="bilinear")[0]
    for ramp, side, axis in zip(ramps, (height, width), (0, 1)):
        places = ramp.select(1 - axis, 0)[6:-6]
        torch.testing.assert_close(places, torch.arange(side)[6:-6] + 0.5, atol=0.01, rtol=0)


# With Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of several sizes; crowds, void, and one picture without any segment; no multiple of 2 or 4 of them."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    images, annotations = [], []
    for part in ("images", "segments", "labels"):
        (folder / part).mkdir()
    for number in range(NUM_PICTURES):
        image_id, name = 1000 - 7 * number, f"{number:02d}.png"
        segments, classes = random_segments(generator)
        height, width = (generator.integers(4, 9, 2) * 10).tolist()
        segments = segments.repeat(height // 10, 0).repeat(width // 10, 1)
        if number == 3:
            segments, classes = np.zeros_like(segments), classes[:0]
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / "images" / name)
        Image.fromarray(segment_colours(segments)).save(folder / "segments" / name)
        labels = np.concatenate([[255], classes]).astype(np.uint8)[segments]
        Image.fromarray(labels).save(folder / "labels" / name)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        infos = [
            {
                "id": number,
                "category_id": CATEGORIES[label]["id"],
                "iscrowd": int(label < 2 and generator.random() < 0.2),
                "area": int((segments == number).sum()),
            }
            for number, label in enumerate(classes, start=1)
        ]
        annotations.append({"image_id": image_id, "file_name": name, "segments_info": infos})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "segments.json").write_text(json.dumps(content))
    return folder


@dataclass
class Output(ModelOutput):
    loss: torch.Tensor | None = None
    loss_dict: dict | None = None
    class_queries_logits: torch.Tensor | None = None
    masks_queries_logits: torch.Tensor | None = None
    auxiliary_logits: list | None = None


class Guesser(nn.Module):
    """Stands in for a model: the true masks, moved a little, among wrong ones. Depends on the pixels alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values, pixel_mask, labels=None):
        size = [side // 4 for side in pixel_values.shape[-2:]]
        found = [self.guess(*args) for args in zip(pixel_values, pixel_mask, labels)]
        classes = torch.stack([classes for classes, _ in found])
        masks = torch.stack(
            [F.pad(mask, (0, size[1] - mask.shape[2], 0, size[0] - mask.shape[1])) for _, mask in found]
        )
        loss = 1.5 + self.weight * pixel_values.mean()
        auxiliary = {"class_queries_logits": classes, "masks_queries_logits": masks}
        return Output(loss, {"loss_mask": loss}, classes, masks, [auxiliary])

    @staticmethod
    def guess(pixels, mask, label) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = mask.any(dim=1).sum().item(), mask.any(dim=0).sum().item()
        seed = int(pixels[:, :height, :width].double().abs().sum().item() * 1000)
        generator = torch.Generator().manual_seed(seed)
        rows, columns = height // 4, width // 4
        masks = torch.randn(NUM_QUERIES, rows, columns, generator=generator) - 2
        classes = torch.randn(NUM_QUERIES, NUM_LABELS + 1, generator=generator)
        classes[:, -1] += 2
        for query, (true_mask, true_class) in enumerate(zip(label["masks"], label["class_labels"])):
            share = F.avg_pool2d(true_mask[None, :height, :width].float(), 4)[0]
            shift = torch.randint(-1, 2, (), generator=generator).item()
            masks[query] = share.roll(shift, 0) * 8 - 4 + 0.5 * torch.randn(share.shape, generator=generator)
            classes[query, true_class] += 5
        return classes, masks


def read_data(folder: Path):
    return read_panoptic(folder / "images", folder / "segments", folder / "segments.json")


def trainer_for(data, output_dir, batch_size: int = 4, png_folder=None) -> SegmentationTrainer:
    """All three readings of one model."""
    instances = data.instances()
    args = TrainingArguments(output_dir, per_device_eval_batch_size=batch_size, use_cpu=True, report_to="none")
    return SegmentationTrainer(
        Guesser(),
        set_up_evaluation(args),
        data_collator=SegmentationCollator(pad_to_multiple_of=32),
        eval_dataset=UniversalDataset(data, SegmentationEvalTransform(PROCESSOR), CLASS_IDS),
        preprocess_logits_for_metrics=JoinedPostProcessor(
            panoptic=PanopticPostProcessor(PROCESSOR, data, CLASS_IDS, png_folder),
            instance=InstancePostProcessor(instances, CLASS_IDS[:2], keep_results=png_folder is not None),
            semantic=UniversalSemanticPostProcessor(PROCESSOR),
        ),
        compute_metrics=JoinedMetric(
            panoptic=PanopticMetric(data),
            instance=InstanceMetric(instances),
            semantic=SemanticMetric(data, ID2LABEL),
        ),
    )


@pytest.fixture(scope="module")
def data(folder):
    return read_data(folder)


@pytest.fixture(scope="module")
def expected(folder, data, tmp_path_factory) -> dict:
    """
    The numbers of hotcoco, pycocotools and torchmetrics, picture by picture without padding, with no code of the
    package but the examples and the reading of instances, which has a test of its own.
    """
    output = tmp_path_factory.mktemp("expected")
    (output / "found").mkdir()
    category_of, things = {0: 7, 2: 3, 3: 90}, {0: 7, 2: 3}
    annotations, results, semantic = [], [], MulticlassJaccardIndex(NUM_LABELS, average="none", ignore_index=255)
    for example in UniversalDataset(data, SegmentationEvalTransform(PROCESSOR), CLASS_IDS):
        target, pixels = example["target"], example["pixel_values"]
        classes, masks = Guesser.guess(pixels, torch.ones_like(pixels[0]), example["labels"])
        outputs = ModelOutput(class_queries_logits=classes[None], masks_queries_logits=masks[None])
        size, image_id = tuple(target["orig_size"].tolist()), int(target["image_id"])
        (panoptic,) = PROCESSOR.post_process_panoptic_segmentation(
            outputs, label_ids_to_fuse=set(), target_sizes=[size]
        )
        named = [info for info in panoptic["segments_info"] if info["label_id"] in category_of]
        sky = [info["id"] for info in named if info["label_id"] == 3]
        for id_ in sky[1:]:
            panoptic["segmentation"][panoptic["segmentation"] == id_] = sky[0]
        named = [info for info in named if info["id"] not in sky[1:]]
        segments = np.where(
            np.isin(panoptic["segmentation"], [info["id"] for info in named]), panoptic["segmentation"], 0
        )
        Image.fromarray(segment_colours(segments)).save(output / "found" / f"{image_id}.png")
        infos = [{"id": info["id"], "category_id": category_of[info["label_id"]]} for info in named]
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos})
        results += [
            {"image_id": image_id, "category_id": things[label], "score": score}
            | {"segmentation": {"size": list(size), "counts": counts}}
            for score, label, counts in zip(*read_instances(classes, masks, size))
            if label in things
        ]
        truth = torch.tensor([255, *target["class_labels"].tolist()])[target["segments"].long()]
        (label_map,) = PROCESSOR.post_process_semantic_segmentation(outputs, target_sizes=[size])
        semantic.update(label_map[None], truth[None])
    (output / "found.json").write_text(json.dumps({"annotations": annotations}))
    ious = semantic.compute().tolist()
    return {
        "panoptic": hotcoco_results(
            folder / "segments.json", output / "found.json", gt_folder=str(folder / "segments")
        ),
        "instance": official(data.instances().ground_truth(), results),
        "semantic": {f"IoU_{name}": ious[label] for label, name in ID2LABEL.items()} | {"mIoU": float(np.mean(ious))},
    }


def official(ground_truth: dict, results: list | str, iou_type: str = "segm") -> np.ndarray:
    """The twelve statistics as pycocotools' own example computes them."""
    truth = COCO()
    truth.dataset = ground_truth
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def check(evaluated: dict, expected: dict):
    found = {name.removeprefix("eval_"): value for name, value in evaluated.items()}
    agree_with_hotcoco(found, expected["panoptic"])
    assert [found[name] for name in STATISTICS] == expected["instance"].tolist()
    assert {name: found[name] for name in expected["semantic"]} == pytest.approx(expected["semantic"], abs=1e-6)
    assert found["loss"] == 1.5


def test_the_test_can_tell(expected):
    """Its numbers are far from 0 and 1."""
    groups = expected["panoptic"]
    numbers = [groups[group][name] for group in ("All", "Things", "Stuff") for name in ("pq", "sq", "rq")]
    numbers += [*expected["instance"][:3], expected["semantic"]["mIoU"], expected["semantic"]["IoU_sky"]]
    assert all(0.02 < number < 0.98 for number in numbers) and len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_trainer_gives_the_numbers_of_the_official_tools(batch_size, data, expected, tmp_path):
    """In padded batches, with a short last one; and again, when Trainer gathers in another way."""
    trainer = trainer_for(data, tmp_path, batch_size)
    for _ in range(2):
        check(trainer.evaluate(), expected)


def test_two_processes(folder, expected, tmp_path):
    """The last batch is filled up with pictures that were there before, and maps are padded to those of the other."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, folder, tmp_path], check=True, env=environment, timeout=300)
    for rank in range(2):
        found = json.loads((tmp_path / f"metrics_{rank}.json").read_text())
        assert found["world_size"] == 2
        for evaluated in found["evaluated"]:
            check(evaluated, expected)


def test_result_files(folder, data, expected, tmp_path):
    """The official tools read the same numbers from them; they have the original category ids."""
    trainer = trainer_for(data, tmp_path / "run", png_folder=tmp_path / "found")
    trainer.evaluate()
    panoptic, instance = (trainer.compute_metrics.parts[name] for name in ("panoptic", "instance"))
    write_panoptic_json(tmp_path / "found.json", panoptic.found, data)
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == sorted(map(png_name, data.image_ids))
    found = hotcoco_results(folder / "segments.json", tmp_path / "found.json", gt_folder=str(folder / "segments"))
    assert found == expected["panoptic"]

    write_mask_results(tmp_path / "masks.json", instance.results)
    assert {result["category_id"] for result in json.loads((tmp_path / "masks.json").read_text())} == {3, 7}
    statistics = official(data.instances().ground_truth(), str(tmp_path / "masks.json"))
    assert statistics.tolist() == expected["instance"].tolist()


def test_a_part_of_the_data(data, tmp_path):
    part = data.select([0, 5, 3])
    found, whole = trainer_for(part, tmp_path).evaluate(), trainer_for(data, tmp_path).evaluate()
    assert found["eval_PQ"] != whole["eval_PQ"] and found["eval_mIoU"] != whole["eval_mIoU"]
    trainer = trainer_for(data, tmp_path)
    trainer.eval_dataset = torch.utils.data.Subset(trainer.eval_dataset, range(9))
    with pytest.raises(ValueError, match=r"2 of 11 pictures of .*segments.json were not evaluated, ids 930, 937\."):
        trainer.evaluate()
    trainer = trainer_for(part, tmp_path)
    trainer.eval_dataset = trainer_for(data, tmp_path).eval_dataset
    with pytest.raises(ValueError, match=r"segments.json has no picture with the id 993"):
        trainer.evaluate()
    trainer.preprocess_logits_for_metrics.parts.pop("instance")
    trainer.compute_metrics.parts.pop("instance")
    with pytest.raises(ValueError, match=r"segments.json has no pictures with the ids 930, 937, 944"):
        trainer.evaluate()


class LabelMapModel(nn.Module):
    """Logits of the true label map, wrong where the picture is bright."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values, pixel_mask, labels):
        found = torch.where((pixel_values[:, 0] > 0.8) | (labels == 255), 1, labels)
        logits = F.avg_pool2d(F.one_hot(found, NUM_LABELS).permute(0, 3, 1, 2).float(), 4)
        return ModelOutput(loss=self.weight * logits.mean(), logits=logits)


def semantic_trainer(data: SemanticData, output_dir, processor, batch_size: int) -> SegmentationTrainer:
    args = TrainingArguments(output_dir, per_device_eval_batch_size=batch_size, use_cpu=True, report_to="none")
    return SegmentationTrainer(
        LabelMapModel(),
        set_up_evaluation(args),
        data_collator=SegmentationCollator(pad_to_multiple_of=32),
        eval_dataset=SemanticDataset(data, SegmentationEvalTransform(processor), CLASS_IDS),
        preprocess_logits_for_metrics=SemanticPostProcessor(processor),
        compute_metrics=SemanticMetric(data, ID2LABEL),
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_label_maps_with_trainer(batch_size, folder, tmp_path):
    """The mean IoU that torchmetrics counts from the whole pictures, one by one."""
    data = read_label_maps(folder / "images", folder / "labels", ["car", "train", "sky"])
    processor = SegformerImageProcessor(size={"height": 32, "width": 48})
    jaccard = MulticlassJaccardIndex(NUM_LABELS, average="none", ignore_index=255)
    for example in SemanticDataset(data, SegmentationEvalTransform(processor), CLASS_IDS):
        logits = LabelMapModel()(example["pixel_values"][None], None, example["labels"][None]).logits
        sizes = [tuple(example["target"]["orig_size"].tolist())]
        (found,) = processor.post_process_semantic_segmentation(ModelOutput(logits=logits), target_sizes=sizes)
        jaccard.update(found[None], example["target"]["label_map"][None].long())
    trainer = semantic_trainer(data, tmp_path, processor, batch_size)
    for _ in range(2):
        evaluated = trainer.evaluate()
        for label, iou in enumerate(jaccard.compute().tolist()):
            assert evaluated[f"eval_IoU_{ID2LABEL[label]}"] == pytest.approx(iou, abs=1e-6)
        assert 0.1 < evaluated["eval_mIoU"] < evaluated["eval_pixel_accuracy"] < 0.95


def test_padding_changes_nothing(folder, tmp_path):
    """Pictures of several sizes, alone or in a batch padded to the largest."""
    data = read_label_maps(folder / "images", folder / "labels", ["car", "train", "sky"])
    processor = SegformerImageProcessor(do_resize=False)
    alone, padded = (
        semantic_trainer(data, tmp_path, processor, batch_size).evaluate()["eval_mIoU"] for batch_size in (1, 11)
    )
    assert alone == pytest.approx(padded, abs=1e-9) and 0.1 < alone < 0.95


def test_a_picture_that_comes_twice_counts_once(data, tmp_path):
    trainer = trainer_for(data, tmp_path, png_folder=tmp_path / "found")
    loader, found = trainer.get_eval_dataloader(), []
    with torch.no_grad():
        for batch in loader:
            targets = batch.pop("targets")
            found += trainer.preprocess_logits_for_metrics(trainer.model(**batch).to_tuple()[1:], targets)
            assert targets == []
    once = trainer.compute_metrics(EvalPrediction(found, []), compute_result=True)
    assert trainer.compute_metrics(EvalPrediction(found[:4] + found[:2], []), compute_result=False) == {}
    twice = trainer.compute_metrics(EvalPrediction(found[2:], []), compute_result=True)
    assert once == twice
    results = trainer.compute_metrics.parts["instance"].results
    assert len(results) == sum(len(picture["instance"]["results"]) for picture in found) > 0
    # The next evaluation begins with nothing: other results, here of the same picture each time, stand alone.
    other = EvalPrediction([found[0] | {"image_id": picture["image_id"]} for picture in found], [])
    alone = trainer_for(data, tmp_path).compute_metrics(other, compute_result=True)
    assert trainer.compute_metrics(other, compute_result=True) == alone
    assert all(alone[name] != once[name] for name in ("PQ", "AP", "mIoU"))


def test_equal_scores_count_in_the_order_of_the_image_ids():
    """Of two masks with the same score, in picture 3 a wrong one and in 5 the right one, the wrong one comes first."""
    data = SimpleNamespace(image_ids=np.array([5, 3]), categories={1: "a"}, source="pictures")
    right = {"image_id": 5} | match_objects([entry(BOX)], [entry(BOX)], "segm", (100, 100))
    wrong = {"image_id": 3} | match_objects([], [entry(BOX)], "segm", (100, 100))
    metrics = InstanceMetric(data)(EvalPrediction([right, wrong], []), compute_result=True)
    assert metrics["AP"] == pytest.approx(0.5)


def test_memory_stays_flat(data, tmp_path):
    """A metric keeps a few numbers for each picture: of its segments, and 100 bytes for each of its 10 instances."""
    target = {
        "image_id": torch.tensor([979]),  # in which nothing is to be found
        "size": torch.tensor([512, 512]),
        "padded_size": torch.tensor([512, 512]),
        "orig_size": torch.tensor([512, 512]),
        "segments": torch.ones(512, 512, dtype=torch.int32),
        "class_labels": torch.tensor([2]),
        "crowds": torch.tensor([False]),
    }
    masks, classes = torch.full((1, 5, 128, 128), -3.0), torch.zeros(1, 5, NUM_LABELS + 1)
    masks[0, :, 20:60], classes[..., 2] = 3, 9
    trainer = trainer_for(data, tmp_path)
    (found,) = trainer.preprocess_logits_for_metrics((classes, masks), [target])
    assert len(found["instance"]["scores"]) == 10 and found["panoptic"]["counts"].sum() > 0

    def kept_after(number: int) -> dict[str, int]:
        for image_id in range(number):
            picture = {name: pickle.loads(pickle.dumps(value)) for name, value in found.items()}
            trainer.compute_metrics(EvalPrediction([picture | {"image_id": image_id}], []), compute_result=False)
        parts = trainer.compute_metrics.parts.items()
        return {
            name: len(pickle.dumps([vars(part)[key] for key in vars(part) if key != "data"])) for name, part in parts
        }

    few, many = kept_after(100), kept_after(200)
    grown = {name: (many[name] - few[name]) / 100 for name in few}
    assert grown["semantic"] < 10 and grown["panoptic"] < 300 and grown["instance"] < 2500


def test_arguments_that_would_mix_pictures_are_refused(data, tmp_path):
    trainer = trainer_for(data, tmp_path)
    trainer.preprocess_logits_for_metrics = None
    with pytest.raises(TypeError, match="pass a post-processor as preprocess_logits_for_metrics"):
        trainer.evaluate()
    with pytest.raises(TypeError, match="compared with `targets`: give SegmentationTrainer a SegmentationCollator"):
        trainer_for(data, tmp_path).preprocess_logits_for_metrics((torch.zeros(1, 2, 3),), torch.zeros(1, 4, 4))


def test_trainer_of_transformers_does_not_keep_targets_from_the_model(data, tmp_path):
    """So the class of ours is needed, and says nothing wrong where it is not used."""
    ours = trainer_for(data, tmp_path)
    theirs = Trainer(
        ours.model,
        ours.args,
        data_collator=ours.data_collator,
        eval_dataset=ours.eval_dataset,
        preprocess_logits_for_metrics=ours.preprocess_logits_for_metrics,
        compute_metrics=ours.compute_metrics,
    )
    with pytest.raises(TypeError, match="targets"):
        theirs.evaluate()


def evaluate(rank: int, folder: Path, output_dir: Path, port: int):
    """One of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    trainer = trainer_for(read_data(folder), output_dir, batch_size=2)
    found = {"evaluated": [trainer.evaluate(), trainer.evaluate()], "world_size": torch.distributed.get_world_size()}
    (output_dir / f"metrics_{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Forked, so that everything is imported once.
    start_processes(evaluate, (*map(Path, sys.argv[1:]), port), nprocs=2, start_method="fork")
