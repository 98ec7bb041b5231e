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
"""COCO's average precision of instance masks."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from ..data.coco_masks import InstanceData
from ..data.rle import encode_masks
from .average_precision import average_precision, match_objects
from .detection import check_image_ids
from .segmentation import PostProcessor, check_is_list


MAX_INSTANCES = 100
# Logits that are resized together: 128 MiB.
MAX_ELEMENTS = 2**25


class InstancePostProcessor(PostProcessor):
    """
    The best instances of each picture, matched with the true ones, see [`PostProcessor`], for models with
    `class_queries_logits` (batch, K, num_labels + 1) and `masks_queries_logits` (batch, K, height, width).

    Args:
        data: The pictures that are evaluated; for the things of panoptic data `PanopticData.instances`.
        class_ids: The model's id of each class, as `match_categories` finds it. Instances of others are left out.
        max_instances: How many are kept of a picture.
        keep_results: Whether the metric is to keep the instances found, for [`write_mask_results`]. Their run lengths
            take memory.
    """

    def __init__(
        self,
        data: InstanceData,
        class_ids: list[int],
        max_instances: int = MAX_INSTANCES,
        keep_results: bool = False,
    ):
        self.data, self.max_instances, self.keep_results = data, max_instances, keep_results
        self.category_of = dict(zip(class_ids, data.category_ids))
        self.row_of = {image_id: row for row, image_id in enumerate(data.image_ids.tolist())}

    def read(self, classes: torch.Tensor, masks: torch.Tensor, target: dict) -> dict:
        """Returns what [`match_objects`] does, and if kept, `results`, COCO's entries for a results file."""
        image_id, size = int(target["image_id"]), tuple(target["orig_size"].tolist())
        if image_id not in self.row_of:
            raise ValueError(f"{self.data.source} has no picture with the id {image_id}.")
        found = read_instances(classes, masks, size, self.max_instances)
        results = mask_results(image_id, *found, size, self.category_of)
        matches = match_objects(self.data.annotations(self.row_of[image_id]), results, "segm", size)
        return matches | ({"results": results} if self.keep_results else {})


def read_instances(
    classes: torch.Tensor, masks: torch.Tensor, size: tuple[int, int], max_instances: int = MAX_INSTANCES
) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """
    The best instances of one picture.

    Masks are resized to the picture as logits, as in Mask2Former's own evaluation.
    `Mask2FormerImageProcessor.post_process_instance_segmentation` finds the same instances, but resizes the finished
    masks, from 384 x 384 by nearest neighbours, which moves the outlines of small pictures.

    Args:
        classes, masks: Logits (K, num_labels + 1) and (K, height, width).
        size: The picture's height and width.

    Returns:
        Scores (n,) float32, the model's class ids (n,) int64, and masks of the picture's size as n compressed run
        lengths; the best first.
    """
    probabilities = classes.softmax(dim=-1)[:, :-1]
    best = probabilities.flatten().topk(min(max_instances, probabilities.numel()))
    queries, labels = best.indices // probabilities.shape[1], best.indices % probabilities.shape[1]
    scores, counts = [], []
    for chunk in queries.split(max(1, MAX_ELEMENTS // (size[0] * size[1]))):
        logits = F.interpolate(masks[chunk][None], size=size, mode="bilinear", align_corners=False)[0]
        inside = logits > 0
        area = inside.flatten(1).sum(dim=1)
        # How sure the model is of the pixels inside; 0 without any.
        scores.append((logits.sigmoid() * inside).flatten(1).sum(dim=1) / area.clamp(min=1))
        counts += encode_masks(inside.cpu().numpy())
    scores = best.values * torch.cat(scores)
    order = scores.argsort(descending=True, stable=True)[: int((scores > 0).sum())]
    return scores[order].cpu().numpy(), labels[order].cpu().numpy(), [counts[number] for number in order.tolist()]


class InstanceMetric:
    """
    COCO's average precision of masks for Trainer's `compute_metrics`, with `batch_eval_metrics=True`.

    Called once a batch with what [`InstancePostProcessor`] returns. When `compute_result` is true, returns what
    [`average_precision`] does and starts anew; else an empty dict. A picture that comes twice, as where processes share
    the last batch, counts once.

    Args:
        data: The pictures that are evaluated, all of them and no others: use `data.select` for a part.

    Attributes:
        results: COCO's entries for the instances of the last evaluation, if the post-processor keeps them.
    """

    def __init__(self, data: InstanceData):
        self.data = data
        self.matches, self.results, self._finished = {}, [], False

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        check_is_list(prediction)
        if self._finished:
            self.matches, self.results, self._finished = {}, [], False
        for picture in prediction.predictions:
            if picture["image_id"] not in self.matches:
                self.results += picture.get("results", [])
                self.matches[picture["image_id"]] = {name: picture[name] for name in picture if name != "results"}
        if not compute_result:
            return {}
        self._finished = True
        check_image_ids(self.matches, self.data)
        return average_precision((self.matches[image_id] for image_id in sorted(self.matches)), self.data.categories)


def mask_results(
    image_id: int,
    scores: np.ndarray,
    labels: np.ndarray,
    counts: list[bytes],
    size: tuple[int, int],
    category_of: dict[int, int],
) -> list[dict]:
    """
    Instances of one picture in the format of COCO's results files.

    Args:
        scores, labels, counts: As [`read_instances`] returns them. Classes that are no category are left out.
        size: The picture's height and width.
        category_of: The original category id of each of the model's ids.
    """
    # No boxes: pycocotools would take their areas for the masks'.
    return [
        {
            "image_id": image_id,
            "category_id": category_of[label],
            "segmentation": {"size": list(size), "counts": mask.decode()},
            "score": score,
        }
        for score, label, mask in zip(np.asarray(scores, np.float64).tolist(), np.asarray(labels).tolist(), counts)
        if label in category_of
    ]


def write_mask_results(path: str | Path, results: list[dict]):
    """Writes a COCO results file, which pycocotools' `loadRes` and COCO's servers take."""
    Path(path).write_text(json.dumps(results) + "\n", encoding="utf-8")
