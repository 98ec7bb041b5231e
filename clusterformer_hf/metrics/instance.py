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
"""COCO's average precision of instance masks, which are kept as run lengths alone."""

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from ..data.coco_masks import InstanceData
from ..data.rle import encode_masks
from .detection import STATISTICS
from .segmentation import PostProcessor, check_image_ids, check_is_list


MAX_INSTANCES = 100
# Logits that are resized together: 128 MiB.
MAX_ELEMENTS = 2**25


class InstancePostProcessor(PostProcessor):
    """
    The best instances of each picture, see [`PostProcessor`], for models with `class_queries_logits` (batch, K,
    num_labels + 1) and `masks_queries_logits` (batch, K, height, width).

    Masks are resized to the picture as logits, as in Mask2Former's own evaluation.
    `Mask2FormerImageProcessor.post_process_instance_segmentation` finds the same instances, but resizes the finished
    masks, from 384 x 384 by nearest neighbours, which moves their outlines by up to a pixel of the picture.

    Args:
        max_instances: How many are kept.
    """

    def __init__(self, max_instances: int = MAX_INSTANCES):
        self.max_instances = max_instances

    def read(self, classes: torch.Tensor, masks: torch.Tensor, target: dict) -> dict:
        """
        Returns at most `max_instances` instances, best first: `scores` (n,) float32, `labels` (n,) int64, `counts`, n
        compressed run lengths, and `orig_size` (2,), the height and width of their masks.
        """
        probabilities = classes.softmax(dim=-1)[:, :-1]
        best = probabilities.flatten().topk(min(self.max_instances, probabilities.numel()))
        queries, labels = best.indices // probabilities.shape[1], best.indices % probabilities.shape[1]
        size, scores, counts = target["orig_size"].tolist(), [], []
        for chunk in queries.split(max(1, MAX_ELEMENTS // (size[0] * size[1]))):
            logits = F.interpolate(masks[chunk][None], size=size, mode="bilinear", align_corners=False)[0]
            inside = logits > 0
            area = inside.flatten(1).sum(dim=1)
            # How sure the model is of the pixels inside; 0 without any.
            scores.append((logits.sigmoid() * inside).flatten(1).sum(dim=1) / area.clamp(min=1))
            counts += encode_masks(inside.cpu().numpy())
        scores = best.values * torch.cat(scores)
        order = scores.argsort(descending=True, stable=True)[: int((scores > 0).sum())]
        return {
            "scores": scores[order],
            "labels": labels[order],
            "counts": [counts[number] for number in order.tolist()],
            "orig_size": target["orig_size"],
        }


class InstanceMetric:
    """
    COCO's average precision of masks for Trainer's `compute_metrics`, with `batch_eval_metrics=True`.

    Called once a batch with what [`InstancePostProcessor`] returns. When `compute_result` is true, returns what
    [`mask_average_precision`] does and starts anew; else an empty dict. A picture that comes twice, as where processes
    share the last batch, counts once.

    Args:
        data: The pictures that are evaluated, all of them and no others: use `data.select` for a part, and
            `PanopticData.instances` for the things of panoptic data.
        class_ids: The model's id of each class, as `match_categories` finds it.

    Attributes:
        instances: Those of the last evaluation by image id, for [`write_mask_results`].
    """

    def __init__(self, data: InstanceData, class_ids: list[int]):
        self.data, self.category_of = data, dict(zip(class_ids, data.category_ids))
        self.instances, self._finished = {}, False

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        check_is_list(prediction)
        if self._finished:
            self.instances, self._finished = {}, False
        self.instances |= {picture["image_id"]: picture for picture in prediction.predictions}
        if not compute_result:
            return {}
        self._finished = True
        check_image_ids(self.instances, self.data)
        results = mask_results(self.instances.values(), self.category_of)
        return mask_average_precision(self.data.ground_truth(), results)


def mask_results(instances: Iterable[dict], category_of: dict[int, int]) -> list[dict]:
    """
    Masks of pictures in the format of COCO's results files.

    Args:
        instances: As [`InstancePostProcessor`] returns them. Classes that are no category are left out.
        category_of: The original category id of each of the model's ids.
    """
    results = []
    for picture in instances:
        size = np.asarray(picture["orig_size"]).tolist()
        # No boxes: pycocotools would take their areas for the masks'.
        results += [
            {
                "image_id": picture["image_id"],
                "category_id": category_of[label],
                "segmentation": {"size": size, "counts": counts.decode()},
                "score": score,
            }
            for label, counts, score in zip(
                np.asarray(picture["labels"]).tolist(),
                picture["counts"],
                np.asarray(picture["scores"], np.float64).tolist(),
            )
            if label in category_of
        ]
    return results


def write_mask_results(path: str | Path, instances: Iterable[dict], category_of: dict[int, int]):
    """Writes [`mask_results`] to a JSON file that pycocotools' `loadRes` and COCO's servers take."""
    Path(path).write_text(json.dumps(mask_results(instances, category_of)) + "\n", encoding="utf-8")


def mask_average_precision(ground_truth: dict, results: list[dict]) -> dict[str, float]:
    """
    COCO's statistics, computed by pycocotools.

    Args:
        ground_truth: Images, annotations and categories as in COCO's files. No annotation may have id 0.
        results: As [`mask_results`] returns them.

    Returns:
        `STATISTICS` of `metrics.detection`, and `AP_<class>` for each class that has masks to find.
    """
    from pycocotools import mask as coco_mask  # of the extra "train"
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = [
        result | {"id": number, "area": float(coco_mask.area(result["segmentation"])), "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]
    sides = []
    with contextlib.redirect_stdout(io.StringIO()):
        for annotations in (ground_truth["annotations"], found):
            side = COCO()
            side.dataset = ground_truth | {"annotations": annotations}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = dict(zip(STATISTICS, map(float, evaluation.stats)))
    # Thresholds, recalls, classes, areas (the first is all), numbers of masks (the last is 100).
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    for row, category_id in enumerate(evaluation.params.catIds):
        # -1 where a class has no masks to find.
        if (precision[:, :, row] > -1).any():
            metrics[f"AP_{names[category_id]}"] = float(precision[:, :, row].mean())
    return metrics
