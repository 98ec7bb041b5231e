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
"""Set losses of the detection and segmentation models, on top of transformers'."""

import torch
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.utils.generic import maybe_autocast

from .configuration_clusterformer import ClusterFormerConfig


# How far a box may reach beyond the image, as a share of its side: the rounding of normalised numbers.
BOX_TOLERANCE = 1e-3


def detection_loss(
    outputs: list[dict[str, torch.Tensor]], labels: list[dict[str, torch.Tensor]], config: ClusterFormerConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The set loss of Deformable DETR (https://arxiv.org/abs/2010.04159): sigmoid focal loss, L1 and GIoU under the best
    matching, for each of several predictions.

    Args:
        outputs (`list[dict[str, torch.Tensor]]`):
            `logits` (batch, K, num_labels) and `pred_boxes` (batch, K, 4); the final prediction first, then the
            auxiliary ones.
        labels (`list[dict[str, torch.Tensor]]`): See [`check_detection_labels`].

    Returns:
        The weighted sum, and its parts before weighting: `loss_ce`, `loss_bbox`, `loss_giou`, with `_0`, `_1`, ... for
        the auxiliary predictions.
    """
    matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    criterion = DeformableDetrImageLoss(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"])
    weights = {
        "loss_ce": config.class_loss_coefficient,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    device = outputs[0]["logits"].device
    with maybe_autocast(device.type, enabled=False):
        outputs = [{name: tensor.float() for name, tensor in output.items()} for output in outputs]
        labels = [
            {"class_labels": label["class_labels"].to(device), "boxes": label["boxes"].to(device).float()}
            for label in labels
        ]
        loss_dict = criterion({**outputs[0], "auxiliary_outputs": outputs[1:]}, labels)
        loss = sum(weights["_".join(name.split("_")[:2])] * value for name, value in loss_dict.items())
    return loss, loss_dict


def check_detection_labels(labels, batch_size: int, num_labels: int):
    """
    Checks that `labels` is a list with a dict for each image, of `class_labels` (n,) int64 in [0, num_labels) and
    `boxes` (n, 4) as cx, cy, w, h in [0, 1] of the image's real area.

    Raises:
        `ValueError`: naming the image, the field and the value.
    """
    if not isinstance(labels, (list, tuple)) or not all(hasattr(label, "keys") for label in labels):
        raise ValueError(
            "`labels` must be a list with one dict of `class_labels` and `boxes` for each image, got "
            f"{type(labels).__name__}."
        )
    if len(labels) != batch_size:
        raise ValueError(f"`labels` must have one dict for each of the {batch_size} images, got {len(labels)}.")
    for i, label in enumerate(labels):
        missing = {"class_labels", "boxes"} - set(label.keys())
        if missing:
            raise ValueError(f"`labels[{i}]` lacks {', '.join(sorted(missing))}; it has {', '.join(label.keys())}.")
        _check_classes(label["class_labels"], i, num_labels)
        _check_boxes(label["boxes"], i, len(label["class_labels"]))


def _check_classes(classes: torch.Tensor, i: int, num_labels: int):
    if classes.ndim != 1 or classes.is_floating_point():
        raise ValueError(
            f"`labels[{i}]['class_labels']` must hold integers in one dimension, got {classes.dtype} of shape "
            f"{tuple(classes.shape)}."
        )
    if classes.numel() > 0 and (classes.min() < 0 or classes.max() >= num_labels):
        raise ValueError(
            f"`labels[{i}]['class_labels']` must be in [0, {num_labels}) for num_labels={num_labels}, got "
            f"{classes.tolist()}. Map the category ids of a data set to 0, 1, ... first."
        )


def _check_boxes(boxes: torch.Tensor, i: int, num_classes: int):
    if boxes.shape != (num_classes, 4) or not boxes.is_floating_point():
        raise ValueError(
            f"`labels[{i}]['boxes']` must hold floating point numbers of shape ({num_classes}, 4), one box for each "
            f"class label, got {boxes.dtype} of shape {tuple(boxes.shape)}."
        )
    if boxes.numel() == 0:
        return
    expected = "`boxes` are (center_x, center_y, width, height) in [0, 1] of the image's real area"
    wrong = ~torch.isfinite(boxes).all(dim=-1) | (boxes < 0).any(dim=-1) | (boxes > 1 + BOX_TOLERANCE).any(dim=-1)
    if wrong.any():
        raise ValueError(f"`labels[{i}]['boxes']` has {boxes[wrong][0].tolist()}: {expected}, no pixels.")
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    outside = ((low < -BOX_TOLERANCE) | (high > 1 + BOX_TOLERANCE)).any(dim=-1)
    # A box may reach over the border, but if all would also do as corners they most likely are.
    if outside.any() and (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError(
            f"`labels[{i}]['boxes']` has {boxes[outside][0].tolist()}, which looks like corners (x_min, y_min, x_max, "
            f"y_max): {expected}."
        )
