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
COCO's average precision of boxes while [`Trainer`] evaluates, batch by batch and with flat memory.

    trainer = Trainer(
        args=set_up_evaluation(training_args),
        preprocess_logits_for_metrics=DetectionPostProcessor(image_processor),
        compute_metrics=DetectionMetric(data, class_ids),
        ...
    )

With other settings Trainer joins the boxes of different pictures and cuts those of the last batch, without an error.
"""

import contextlib
import inspect
import io
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import BaseImageProcessor, EvalPrediction, TrainingArguments

from ..data.detection_data import DetectionData, listed


MAX_BOXES = 100
# The order of pycocotools' statistics; each in [0, 1], or -1 where there is no box to find.
STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def set_up_evaluation(args: TrainingArguments) -> TrainingArguments:
    """Sets what makes Trainer's evaluation of pictures with any number of boxes exact, on one process or several."""
    args.remove_unused_columns = False
    args.batch_eval_metrics = True
    args.eval_use_gather_object = True
    args.eval_do_concat_batches = False
    return args


class DetectionPostProcessor:
    """
    The best boxes of each picture as Trainer's `preprocess_logits_for_metrics`.

    Takes the model's outputs, of which the first two tensors are `logits` (batch, K, num_labels) and `pred_boxes`
    (batch, K, 4), and the labels with `image_id` and `orig_size`; the list of labels is emptied. Returns for each
    picture a dict of `image_id`, an int, and arrays of at most `MAX_BOXES` boxes, best first: `scores` (n,), float32,
    `labels` (n,), int64, and `boxes` (n, 4), float32: x, y, x, y in pixels of the picture as it was read.

    For `Trainer.evaluate`; the boxes are then in [`DetectionMetric`]'s `detections`. `Trainer.predict` takes no arrays.
    """

    def __init__(self, image_processor: BaseImageProcessor):
        self.post_process = image_processor.post_process_object_detection
        # Image processors for softmax return one box a query and have no such argument.
        has_top_k = "top_k" in inspect.signature(self.post_process).parameters
        self.options = {"top_k": MAX_BOXES} if has_top_k else {}

    def __call__(self, outputs: tuple, labels: list[dict]) -> list[dict]:
        # Trainer drops outputs that are None, and the losses are a dict.
        logits, boxes = [output.float() for output in outputs if isinstance(output, torch.Tensor)][:2]
        detections = self.post_process(
            SimpleNamespace(logits=logits, pred_boxes=boxes),
            threshold=0.0,  # where processes have different numbers of boxes, Trainer adds some of logit -100
            target_sizes=torch.stack([label["orig_size"] for label in labels]),
            **self.options,
        )
        image_ids = [int(label["image_id"]) for label in labels]
        # Trainer sends the labels between processes after this, of which the metric needs nothing more.
        labels.clear()
        # Arrays and no tensors: of these, Trainer's second evaluation forgets `eval_use_gather_object`.
        return [
            {"image_id": image_id, **{name: value.cpu().numpy() for name, value in best_boxes(detection).items()}}
            for image_id, detection in zip(image_ids, detections)
        ]


def best_boxes(detection: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The best boxes of a picture, at most `MAX_BOXES`, best first."""
    order = detection["scores"].argsort(descending=True, stable=True)[:MAX_BOXES]
    return {name: detection[name][order] for name in ("scores", "labels", "boxes")}


class DetectionMetric:
    """
    COCO's average precision for Trainer's `compute_metrics`, with `batch_eval_metrics=True`.

    Called once a batch with what [`DetectionPostProcessor`] returns. When `compute_result` is true, returns
    `STATISTICS` and `AP_<class>` for each class with boxes to find, and starts anew; else an empty dict. A picture that
    comes twice, as where processes share the last batch, counts once.

    Args:
        data: The pictures that are evaluated, all of them and no others: use `data.select` for a part.
        class_ids: The model's id of each class, as `match_categories` finds it.
        fast: See [`average_precision`].

    Attributes:
        detections: The boxes of the last evaluation by image id, for [`write_coco_results`].
    """

    def __init__(self, data: DetectionData, class_ids: list[int], fast: bool = False):
        self.data, self.fast = data, fast
        self.category_of = dict(zip(class_ids, data.category_ids))
        self.detections = {}
        self._finished = False

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        if not isinstance(prediction.predictions, list):
            raise TypeError(
                "Boxes must come as a list with one dict for each picture: pass a DetectionPostProcessor as "
                "preprocess_logits_for_metrics, and training arguments from set_up_evaluation."
            )
        if self._finished:
            self.detections, self._finished = {}, False
        self.detections |= {detection["image_id"]: detection for detection in prediction.predictions}
        if not compute_result:
            return {}
        self._finished = True
        check_image_ids(self.detections, self.data)
        results = coco_results(self.detections.values(), self.category_of)
        return average_precision(self.data.ground_truth(), results, self.fast)


def check_image_ids(found: Iterable[int], data):
    """Raises `ValueError` unless all pictures of the data and no others were evaluated."""
    found, expected = set(found), set(data.image_ids.tolist())
    if found - expected:
        raise ValueError(f"{data.source} has no pictures with the ids {listed(sorted(found - expected))}.")
    if expected - found:
        raise ValueError(
            f"{len(expected - found)} of {len(expected)} pictures of {data.source} were not evaluated, ids "
            f"{listed(sorted(expected - found))}. To evaluate a part, give the metric data.select(rows)."
        )


def coco_results(detections: Iterable[dict], category_of: dict[int, int]) -> list[dict]:
    """
    Boxes of pictures in the format of COCO's results files.

    Args:
        detections: As [`DetectionPostProcessor`] returns them. Classes that are no category are left out.
        category_of: The original category id of each of the model's ids.
    """
    results = []
    for detection in detections:
        corners = np.asarray(detection["boxes"], np.float64).reshape(-1, 4)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
        scores = np.asarray(detection["scores"], np.float64).tolist()
        labels = np.asarray(detection["labels"]).tolist()
        results += [
            {"image_id": detection["image_id"], "category_id": category_of[label], "bbox": box, "score": score}
            for score, label, box in zip(scores, labels, boxes)
            if label in category_of
        ]
    return results


def write_coco_results(path: str | Path, detections: Iterable[dict], category_of: dict[int, int]):
    """Writes [`coco_results`] to a JSON file that pycocotools' `loadRes` and COCO's servers take."""
    Path(path).write_text(json.dumps(coco_results(detections, category_of)) + "\n", encoding="utf-8")


def average_precision(ground_truth: dict, results: list[dict], fast: bool = False) -> dict[str, float]:
    """
    COCO's statistics, computed by pycocotools.

    Args:
        ground_truth: Images, annotations and categories as in COCO's files. No annotation may have id 0.
        results: As [`coco_results`] returns them.
        fast: Use faster-coco-eval: the same numbers but for rounding, ten times as fast on large data sets.

    Returns:
        `STATISTICS`, and `AP_<class>` for each class that has boxes to find.
    """
    detections = [
        result | {"id": number, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]
    # Of the extra "train".
    if fast:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = _index(COCO(), ground_truth), _index(COCO(), ground_truth | {"annotations": detections})
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = dict(zip(STATISTICS, map(float, evaluation.stats)))
    # Thresholds, recalls, classes, areas (the first is all), numbers of boxes (the last is 100).
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    for row, category_id in enumerate(evaluation.params.catIds):
        # -1 where a class has no boxes to find.
        if (precision[:, :, row] > -1).any():
            metrics[f"AP_{names[category_id]}"] = float(precision[:, :, row].mean())
    return metrics


def _index(coco, content: dict):
    coco.dataset = content
    coco.createIndex()
    return coco
