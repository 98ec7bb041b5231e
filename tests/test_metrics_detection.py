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
"""COCO's average precision in Trainer: the numbers of pycocotools, on one process and on two."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.multiprocessing import start_processes
from transformers import DeformableDetrImageProcessor, EvalPrediction, Trainer, TrainingArguments
from transformers.utils import ModelOutput

from clusterformer_hf.data.coco import read_coco
from clusterformer_hf.data.detection import DetectionCollator, DetectionDataset, DetectionEvalTransform
from clusterformer_hf.metrics.detection import (
    MAX_BOXES,
    STATISTICS,
    DetectionMetric,
    DetectionPostProcessor,
    average_precision,
    set_up_evaluation,
    write_coco_results,
)


ROOT = Path(__file__).parents[1]
PROCESSOR = DeformableDetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
# In another order than the data's classes, which are 3, 7, 90; the model knows a class more.
CLASS_IDS = [2, 0, 3]
NUM_LABELS = 4
NUM_QUERIES = 40
NUM_PICTURES = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of several sizes with boxes of all sizes, crowds, none at all; their number is no multiple of 2 or 4."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    images, annotations = [], []
    for number in range(NUM_PICTURES):
        height, width = generator.integers(150, 400, 2).tolist()
        name, image_id = f"{number}.png", 1000 - 7 * number
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for _ in range(0 if number in (3, 10) else generator.integers(2, 9)):
            x, y = generator.uniform(0, [width - 20, height - 20])
            w, h = generator.uniform(8, [width - x, height - y])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(generator.choice([3, 7, 90])),
                    "bbox": [x, y, w, h],
                    "area": w * h * generator.uniform(0.5, 1),  # of a mask, which is smaller than its box
                    "iscrowd": int(generator.random() < 0.15),
                }
            )
    categories = [{"id": 90, "name": "zebra"}, {"id": 3, "name": "car"}, {"id": 7, "name": "train"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder


@dataclass
class Output(ModelOutput):
    loss: torch.Tensor | None = None
    loss_dict: dict | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    hidden_state: torch.Tensor | None = None


class Guesser(nn.Module):
    """Stands in for a detector: the true boxes, moved a little, among wrong ones. Depends on the picture's id alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values, pixel_mask=None, labels=None):
        logits, boxes = zip(*map(self.guess, labels))
        loss = self.weight * pixel_values.mean()
        return Output(loss, {"loss_ce": loss}, torch.stack(logits), torch.stack(boxes), pixel_values.mean((1, 2, 3)))

    @staticmethod
    def guess(label: dict) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(int(label["image_id"]))
        boxes = torch.rand(NUM_QUERIES, 4, generator=generator) * 0.4 + 0.1
        logits = torch.randn(NUM_QUERIES, NUM_LABELS, generator=generator) - 1
        number = len(label["boxes"])
        boxes[:number] = label["boxes"] + 0.02 * torch.randn(number, 4, generator=generator)
        logits[range(number), label["class_labels"]] += 1.5
        return logits, boxes.clamp(0.01, 0.99)


def trainer_for(data, output_dir, batch_size: int = 4) -> Trainer:
    args = TrainingArguments(output_dir, per_device_eval_batch_size=batch_size, use_cpu=True, report_to="none")
    return Trainer(
        Guesser(),
        set_up_evaluation(args),
        data_collator=DetectionCollator(),
        eval_dataset=DetectionDataset(data, DetectionEvalTransform(PROCESSOR), CLASS_IDS),
        preprocess_logits_for_metrics=DetectionPostProcessor(PROCESSOR),
        compute_metrics=DetectionMetric(data, CLASS_IDS),
    )


def boxes_by_hand(data) -> list[dict]:
    """COCO results of the guesses, picture by picture, with no code of the package but the data set's labels."""
    category_of, results = dict(zip(CLASS_IDS, [3, 7, 90])), []
    for example in DetectionDataset(data, DetectionEvalTransform(PROCESSOR), CLASS_IDS):
        label = example["labels"]
        logits, boxes = Guesser.guess(label)
        height, width = label["orig_size"].tolist()
        x, y, w, h = boxes.unbind(-1)
        scale = torch.tensor([width, height, width, height])
        left_top, right_bottom = (
            torch.stack([x - 0.5 * w, y - 0.5 * h], -1),
            torch.stack([x + 0.5 * w, y + 0.5 * h], -1),
        )
        corners = (torch.cat([left_top, right_bottom], -1) * scale).double()
        scores, best = logits.sigmoid().flatten().sort(descending=True)
        for score, index in list(zip(scores.tolist(), best.tolist()))[:MAX_BOXES]:
            query, class_id = divmod(index, NUM_LABELS)
            if class_id in category_of:
                left, top, right, bottom = corners[query].tolist()
                results.append(
                    {
                        "image_id": int(label["image_id"]),
                        "category_id": category_of[class_id],
                        "bbox": [left, top, right - left, bottom - top],
                        "score": score,
                    }
                )
    return results


def official(annotation_file, results, cat_ids=None) -> np.ndarray:
    """The twelve statistics as pycocotools' own example computes them."""
    truth = COCO(annotation_file)
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    if cat_ids is not None:
        evaluation.params.catIds = cat_ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


@pytest.fixture(scope="module")
def data(folder):
    return read_coco(folder, folder / "boxes.json")


@pytest.fixture(scope="module")
def expected(folder, data) -> dict:
    """What pycocotools says of the same boxes."""
    file, results = str(folder / "boxes.json"), boxes_by_hand(data)
    metrics = dict(zip(STATISTICS, official(file, results)))
    names = {3: "car", 7: "train", 90: "zebra"}
    return metrics | {f"AP_{name}": official(file, results, [id_])[0] for id_, name in names.items()}


def metrics_of(evaluated: dict) -> dict:
    names = {name.removeprefix("eval_"): value for name, value in evaluated.items()}
    return {name: value for name, value in names.items() if name.startswith(("AP", "AR"))}


def test_the_test_can_tell(expected):
    """Its numbers are far from 0 and 1, and no two are alike."""
    assert all(0.05 < value < 0.95 for value in expected.values())
    assert len(set(expected.values())) == len(expected) == 15


@pytest.mark.parametrize("batch_size", [1, 4, 11, 16])
def test_trainer_gives_the_numbers_of_pycocotools(batch_size, data, expected, tmp_path):
    trainer = trainer_for(data, tmp_path, batch_size)
    for _ in range(2):  # Trainer gathers in another way from the second time on
        assert metrics_of(trainer.evaluate()) == expected


def test_fast_numbers_are_the_same(data, expected, tmp_path):
    trainer = trainer_for(data, tmp_path)
    trainer.compute_metrics = DetectionMetric(data, CLASS_IDS, fast=True)
    assert metrics_of(trainer.evaluate()) == pytest.approx(expected, rel=1e-12)


def test_two_processes(folder, data, expected, tmp_path):
    """The last batch is filled up with pictures that were there before."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, folder, tmp_path], check=True, env=environment, timeout=300)
    for rank in range(2):
        found = json.loads((tmp_path / f"metrics_{rank}.json").read_text())
        assert found["world_size"] == 2
        assert [metrics_of(evaluated) for evaluated in found["evaluated"]] == [expected, expected]


def test_a_part_of_the_data(folder, data, tmp_path):
    rows = [0, 3, 5, 7]
    part = data.select(rows)
    reduced = json.loads((folder / "boxes.json").read_text())
    ids = set(part.image_ids.tolist())
    reduced["images"] = [image for image in reduced["images"] if image["id"] in ids]
    reduced["annotations"] = [one for one in reduced["annotations"] if one["image_id"] in ids]
    (tmp_path / "part.json").write_text(json.dumps(reduced))
    found = metrics_of(trainer_for(part, tmp_path).evaluate())
    statistics = official(str(tmp_path / "part.json"), boxes_by_hand(part))
    assert [found[name] for name in STATISTICS] == statistics.tolist()


def test_results_file(folder, data, expected, tmp_path):
    """Has the original category ids, and pycocotools reads the same numbers from it."""
    trainer = trainer_for(data, tmp_path)
    trainer.evaluate()
    metric = trainer.compute_metrics
    write_coco_results(tmp_path / "results.json", metric.detections.values(), metric.category_of)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["category_id"] for result in results} == {3, 7, 90}
    assert {result["image_id"] for result in results} == set(data.image_ids.tolist())
    statistics = official(str(folder / "boxes.json"), str(tmp_path / "results.json"))
    assert dict(zip(STATISTICS, statistics)).items() <= expected.items()


def test_only_the_best_boxes_are_kept(data, tmp_path):
    """160 candidates a picture come in, and nothing else of them stays, nor of the labels."""
    trainer = trainer_for(data, tmp_path)
    trainer.evaluate()
    for detection in trainer.compute_metrics.detections.values():
        assert {name: detection[name].shape for name in ("scores", "labels", "boxes")} == {
            "scores": (MAX_BOXES,),
            "labels": (MAX_BOXES,),
            "boxes": (MAX_BOXES, 4),
        }
    labels = [{"image_id": torch.tensor([1]), "orig_size": torch.tensor([10, 20])}]
    (detection,) = DetectionPostProcessor(PROCESSOR)((torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)), labels)
    assert labels == [] and detection["image_id"] == 1


def test_padding_between_processes_is_no_box():
    """Trainer fills up with -100 where a process has fewer boxes; half precision is taken too."""
    logits, boxes = torch.full((1, 3, 2), -100.0), torch.full((1, 3, 4), -100.0)
    logits[0, 0], boxes[0, 0] = 1.0, 0.5
    labels = [{"image_id": torch.tensor([1]), "orig_size": torch.tensor([10, 20])}]
    outputs = ({"loss_ce": torch.zeros(())}, logits.bfloat16(), boxes.bfloat16())
    (detection,) = DetectionPostProcessor(PROCESSOR)(outputs, labels)
    assert detection["boxes"].tolist() == [[5, 2.5, 15, 7.5]] * 2
    assert detection["scores"].dtype == np.float32


def truth(*boxes: list, categories=("thing",), images: int = 1, **fields) -> dict:
    """Ground truth with one box of the first category in each of the first images."""
    annotations = [
        {"id": number, "image_id": number, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        | fields
        for number, box in enumerate(boxes, start=1)
    ]
    return {
        "images": [{"id": number, "height": 100, "width": 100} for number in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, start=1)],
    }


def result(image_id: int, box: list, score: float = 0.9, category_id: int = 1) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


BOX = [10, 10, 50, 40]
BY_HAND = {
    "found": (truth(BOX), [result(1, BOX)], {"AP": 1, "AP50": 1, "APm": 1, "APs": -1, "APl": -1, "AR1": 1}),
    "nothing": (truth(BOX), [], {"AP": 0, "AR100": 0}),
    # IoU 50 * 25 / (50 * 40) = 0.625: three of the ten thresholds, 0.5, 0.55 and 0.6.
    "roughly": (truth(BOX), [result(1, [10, 10, 50, 25])], {"AP": 0.3, "AP50": 1, "AP75": 0, "AR1": 0.3}),
    # Recall reaches one half, which is 51 of the 101 recalls.
    "one of two": (truth(BOX, BOX, images=2), [result(2, BOX)], {"AP": 51 / 101, "AR100": 0.5}),
    "wrong one first": (
        truth(BOX),
        [result(1, [80, 80, 9, 9], 0.95), result(1, BOX)],
        {"AP": 0.5, "AR1": 0, "AR10": 1},
    ),
    # A picture without boxes is not passed over: what is found there is wrong.
    "empty picture": (truth(BOX, images=2), [result(2, BOX, 0.95), result(1, BOX)], {"AP": 0.5, "AR100": 1}),
    "twice": (truth(BOX), [result(1, BOX, 0.5), result(1, BOX, 0.9)], {"AP": 1}),
    "classes": (truth(BOX, categories=("a", "b")), [result(1, BOX, category_id=2)], {"AP": 0, "AP_a": 0}),
    "no boxes": (truth(), [result(1, BOX)], {"AP": -1, "AR100": -1}),
}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("ground_truth, results, values", BY_HAND.values(), ids=BY_HAND)
def test_numbers_worked_by_hand(ground_truth, results, values, fast, capfd):
    metrics = average_precision(ground_truth, results, fast)
    assert {name: metrics[name] for name in values} == pytest.approx(values)
    assert list(metrics)[:12] == list(STATISTICS)
    assert {name for name in metrics if name.startswith("AP_")} <= {"AP_thing", "AP_a"}
    assert capfd.readouterr() == ("", "")


def test_boxes_in_a_crowd_are_neither_right_nor_wrong():
    crowded = truth(BOX, [60, 0, 40, 100])
    crowded["annotations"][1] |= {"iscrowd": 1, "image_id": 1}
    inside = [result(1, [65 + shift, 20, 10, 30], 0.99) for shift in range(5)]
    assert average_precision(crowded, [*inside, result(1, BOX)])["AP"] == pytest.approx(1)
    outside = [result(1, [0, 60, 20, 30], 0.99)]
    assert average_precision(crowded, [*outside, result(1, BOX)])["AP"] == 0.5


def test_an_annotation_with_id_0_counts(folder, data, tmp_path):
    """To pycocotools itself its box is never found."""
    content = truth(BOX)
    content["annotations"][0]["id"] = 0
    content["images"] = [{"id": 1, "file_name": "black.png", "height": 100, "width": 100}]
    Image.new("RGB", (100, 100)).save(tmp_path / "black.png")
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    assert official(str(tmp_path / "boxes.json"), [result(1, BOX)])[0] == 0
    data = read_coco(tmp_path, tmp_path / "boxes.json")
    assert average_precision(data.ground_truth(), [result(1, BOX)])["AP"] == pytest.approx(1)


def detection(image_id: int) -> dict:
    return {"image_id": image_id, "scores": np.ones(1), "labels": np.array([2]), "boxes": np.array([[1, 2, 3, 4]])}


def test_pictures_that_were_not_evaluated(data):
    metric = DetectionMetric(data, CLASS_IDS)
    some = [detection(int(image_id)) for image_id in data.image_ids[:-2]]
    with pytest.raises(ValueError, match=r"2 of 11 pictures of .*boxes.json were not evaluated, ids 930, 937\."):
        metric(EvalPrediction(some, []), compute_result=True)
    every = [detection(int(image_id)) for image_id in data.image_ids]
    assert metric(EvalPrediction(every, []), compute_result=True)["AR100"] == 0
    with pytest.raises(ValueError, match="2 of 11 pictures"):  # what the last evaluation saw does not count
        metric(EvalPrediction(some, []), compute_result=True)
    with pytest.raises(ValueError, match="boxes.json has no pictures with the ids 12"):
        metric(EvalPrediction([detection(12)], []), compute_result=True)


def test_arguments_that_would_mix_pictures_are_refused(data, tmp_path):
    """Without the post-processor, Trainer hands over tensors."""
    trainer = trainer_for(data, tmp_path)
    trainer.preprocess_logits_for_metrics = None
    with pytest.raises(TypeError, match="pass a DetectionPostProcessor as preprocess_logits_for_metrics"):
        trainer.evaluate()


def evaluate(rank: int, folder: Path, output_dir: Path, port: int):
    """One of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    trainer = trainer_for(read_coco(folder, folder / "boxes.json"), output_dir, batch_size=2)
    found = {"evaluated": [trainer.evaluate(), trainer.evaluate()], "world_size": torch.distributed.get_world_size()}
    (output_dir / f"metrics_{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # Forked, so that everything is imported once.
    start_processes(evaluate, (*map(Path, sys.argv[1:]), port), nprocs=2, start_method="fork")
