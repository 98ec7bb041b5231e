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

from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss
from transformers.models.mask2former import modeling_mask2former
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerHungarianMatcher,
    Mask2FormerLoss,
    pair_wise_dice_loss,
    sample_point,
)
from transformers.utils.generic import maybe_autocast

from .configuration_clusterformer import ClusterFormerConfig


# How far a box may reach beyond the image, as a share of its side: the rounding of normalised numbers.
BOX_TOLERANCE = 1e-3


# The classes of all images that a training step accumulates, if it does: see [`accumulated`].
_step_labels: ContextVar[list[torch.Tensor] | None] = ContextVar("step_labels", default=None)


@contextmanager
def accumulated(class_labels: list[torch.Tensor]):
    """
    Inside, the losses of batches are shares of one loss: added up over the batches that a step accumulates, they are
    the loss of all their images in one batch.

    Args:
        class_labels (`list[torch.Tensor]`): The classes (n,) of every image of these batches, in this process.
    """
    token = _step_labels.set(class_labels)
    try:
        yield
    finally:
        _step_labels.reset(token)


def mean_over_processes(number: float, device: torch.device) -> torch.Tensor:
    number = torch.tensor(float(number), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(number)
        number = number / dist.get_world_size()
    return number


def mean_count(labels: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """
    Number of objects that a process has on average in a step, at least 1: what sums of losses are divided by.
    (transformers' losses divide by the number of processes twice, and so grow with it.)
    """
    labels = _step_labels.get() or labels
    return mean_over_processes(sum(len(label) for label in labels), device).clamp_min(1)


class ClusterFormerBoxLoss(DeformableDetrImageLoss):
    """Deformable DETR's losses, divided by the mean number of boxes of all processes."""

    def forward(self, outputs, targets) -> dict[str, torch.Tensor]:
        self.num_boxes = mean_count([target["class_labels"] for target in targets], outputs["logits"].device)
        return super().forward(outputs, targets)

    def get_loss(self, loss, outputs, targets, indices, num_boxes) -> dict[str, torch.Tensor]:
        return super().get_loss(loss, outputs, targets, indices, self.num_boxes)


class ClusterFormerVarifocalBoxLoss(ClusterFormerBoxLoss):
    """
    The same with RT-DETR's varifocal loss (https://arxiv.org/abs/2008.13367) of the classes: the score of a matched
    box's class shall be its IoU, and other scores count as in the focal loss.
    """

    gamma = 2.0  # the focal loss's

    @property
    def alpha(self) -> float:
        return 1 - max(self.focal_alpha, 0)  # a negative one weighs nothing in the focal loss

    def loss_labels(self, outputs, targets, indices, num_boxes) -> dict[str, torch.Tensor]:
        return {"loss_ce": RTDetrLoss.loss_labels_vfl(self, outputs, targets, indices, num_boxes)["loss_vfl"]}


def detection_loss(
    outputs: list[dict[str, torch.Tensor]], labels: list[dict[str, torch.Tensor]], config: ClusterFormerConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The set loss of Deformable DETR (https://arxiv.org/abs/2010.04159): sigmoid focal loss, L1 and GIoU under the best
    matching, for each of several predictions. With `config.use_varifocal_loss` RT-DETR's class loss.

    Args:
        outputs (`list[dict[str, torch.Tensor]]`):
            `logits` (batch, K, num_labels) and `pred_boxes` (batch, K, 4); the final prediction first, then the
            auxiliary ones.
        labels (`list[dict[str, torch.Tensor]]`): See [`check_detection_labels`].

    Returns:
        The weighted sum, and its parts before weighting: `loss_ce`, `loss_bbox`, `loss_giou`, with `_0`, `_1`, ... for
        the auxiliary predictions. NaN and no parts where a prediction is not finite.
    """
    matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    criterion_class = ClusterFormerVarifocalBoxLoss if config.use_varifocal_loss else ClusterFormerBoxLoss
    criterion = criterion_class(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"])
    weights = {
        "loss_ce": config.class_loss_coefficient,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    device = outputs[0]["logits"].device
    with maybe_autocast(device.type, enabled=False):
        outputs = [{name: tensor.float() for name, tensor in output.items()} for output in outputs]
        is_finite = sum(tensor.sum() for output in outputs for tensor in output.values()).isfinite()
        # The matcher would blame the boxes' format, and other processes wait for this one's number of boxes.
        outputs = [
            {name: tensor.nan_to_num(0.0, 0.0, 0.0) for name, tensor in output.items()} if not is_finite else output
            for output in outputs
        ]
        labels = [
            {"class_labels": label["class_labels"].to(device).long(), "boxes": label["boxes"].to(device).float()}
            for label in labels
        ]
        loss_dict = criterion({**outputs[0], "auxiliary_outputs": outputs[1:]}, labels)
        loss = sum(weights[_without_number(name)] * value for name, value in loss_dict.items())
    return (loss, loss_dict) if is_finite else (loss * torch.nan, {})


def boxes_of_real_areas(
    labels: list[dict[str, torch.Tensor]], sizes: torch.Tensor | None, padded_size: tuple[int, int]
) -> list[dict[str, torch.Tensor]]:
    """
    Labels with boxes that are shares of an image's real area.

    Args:
        labels (`list[dict[str, torch.Tensor]]`): Where `size` is `padded_size`, boxes are shares of the padded image.
        sizes (`torch.Tensor` of shape `(batch, 2)`, *optional*): Real height and width of padded images.
        padded_size (`tuple[int, int]`): Height and width of the batch.

    Raises:
        `ValueError`: if such boxes reach into the padding, naming the image and the box.
    """
    if sizes is None:
        return labels
    found = []
    for i, (label, size) in enumerate(zip(labels, sizes)):
        if _is_size(label.get("size"), padded_size):
            boxes = label["boxes"].float()
            ratios = boxes.new_tensor(padded_size).flip(0) / size.flip(0).to(boxes)
            label = {**label, "boxes": boxes * ratios.repeat(2)}
            _check_boxes(label["boxes"], i, len(boxes))
        found.append(label)
    return found


def _is_size(value, size: tuple[int, int]) -> bool:
    """Whether a label's entry, which may be anything, is this height and width."""
    try:
        return torch.as_tensor(value).flatten().tolist() == list(size)
    except (TypeError, ValueError, RuntimeError):
        return False


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


def _check_tensor(value, i: int, name: str):
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` of image {i} must be a tensor, got {type(value).__name__}.")


def _check_classes(classes: torch.Tensor, i: int, num_labels: int):
    _check_tensor(classes, i, "class_labels")
    if classes.ndim != 1 or classes.is_floating_point() or classes.dtype == torch.bool:
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
    _check_tensor(boxes, i, "boxes")
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
            f"y_max): {expected}. If that is what it is, cut it at the image's border."
        )


class ClusterFormerMaskLoss(Mask2FormerLoss):
    """Mask2Former's set loss for images that may be without any mask."""

    def __init__(self, config: ClusterFormerConfig):
        weights = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        super().__init__(config, weights)
        self.matcher = ClusterFormerMaskMatcher(
            config.class_weight, config.mask_weight, config.dice_weight, config.train_num_points
        )

    def get_num_masks(self, class_labels, device) -> torch.Tensor:
        return mean_count(class_labels, device)

    def loss_labels(self, class_queries_logits, class_labels, indices) -> dict[str, torch.Tensor]:
        # Cross-entropy divides by the weights of its own queries: many processes and batches by those of a step.
        losses = super().loss_labels(class_queries_logits, class_labels, indices)
        num_queries, device = class_queries_logits.shape[1], class_queries_logits.device
        own = self._weight_of_queries(class_labels, num_queries)
        total = mean_over_processes(self._weight_of_queries(_step_labels.get() or class_labels, num_queries), device)
        return {"loss_cross_entropy": losses["loss_cross_entropy"] * (own / total)}

    def _weight_of_queries(self, class_labels: list[torch.Tensor], num_queries: int) -> float:
        matched = sum(min(len(classes), num_queries) for classes in class_labels)
        return matched + (len(class_labels) * num_queries - matched) * self.eos_coef

    def loss_masks(self, masks_queries_logits, mask_labels, indices, num_masks) -> dict[str, torch.Tensor]:
        if sum(len(masks) for masks in mask_labels) > 0:
            return super().loss_masks(masks_queries_logits, mask_labels, indices, num_masks)
        nothing = 0.0 * masks_queries_logits.sum()  # every parameter keeps its gradient, which other processes wait for
        return {"loss_mask": nothing, "loss_dice": nothing}


class ClusterFormerMaskMatcher(Mask2FormerHungarianMatcher):
    """
    Mask2Former's matching in half its time, for images that may be without any mask: an image's masks are sampled
    together, as channels, and one softplus gives the cross-entropy to both 0 and 1.
    """

    @torch.no_grad()
    def forward(self, masks_queries_logits, class_queries_logits, mask_labels, class_labels) -> list[tuple]:
        nothing = torch.zeros(0, dtype=torch.int64)
        images = zip(masks_queries_logits, class_queries_logits, mask_labels, class_labels)
        return [self.match(*image) if len(image[-1]) > 0 else (nothing, nothing) for image in images]

    def match(self, masks, classes, mask_labels, class_labels) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            masks, classes (`torch.Tensor`): An image's logits, (K, height, width) and (K, num_labels + 1).
            mask_labels, class_labels (`torch.Tensor`): Its labels, (n, H, W) and (n,).

        Returns:
            The queries that are matched and the label of each, (min(K, n),) int64.
        """
        points = torch.rand(1, self.num_points, 2, device=masks.device)
        masks, labels = (
            sample_point(maps[None], points, align_corners=False)[0] for maps in (masks, mask_labels.to(masks))
        )
        cross_entropy = (F.softplus(masks).sum(dim=1, keepdim=True) - masks @ labels.T) / self.num_points
        costs = (
            self.cost_mask * cross_entropy
            - self.cost_class * classes.softmax(dim=-1)[:, class_labels]
            + self.cost_dice * pair_wise_dice_loss(masks, labels)
        )
        largest = torch.finfo(costs.dtype).max
        # Theirs, which is there where SciPy is: models load without it.
        matches = modeling_mask2former.linear_sum_assignment(costs.nan_to_num(largest, largest, largest).cpu())
        return tuple(torch.as_tensor(indices, dtype=torch.int64) for indices in matches)


def segmentation_loss(
    outputs: list[dict[str, torch.Tensor]],
    mask_labels: list[torch.Tensor],
    class_labels: list[torch.Tensor],
    config: ClusterFormerConfig,
    training: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The set loss of Mask2Former (https://arxiv.org/abs/2112.01527): cross-entropy over classes and "no object", binary
    cross-entropy and dice of masks at sampled points, under the best matching, for each of several predictions.

    Args:
        outputs (`list[dict[str, torch.Tensor]]`):
            `class_queries_logits` (batch, K, num_labels + 1) and `masks_queries_logits` (batch, K, height, width); the
            final prediction first, then the auxiliary ones.
        mask_labels (`list[torch.Tensor]`): For each image (n, H, W) in [0, 1], all images of one H and W.
        class_labels (`list[torch.Tensor]`): For each image (n,) int64.
        training (`bool`): Outside training the random numbers go back to where they were, so that evaluation leaves no
            trace in training.

    Returns:
        The weighted sum, and its parts before weighting: `loss_cross_entropy`, `loss_mask`, `loss_dice`, with `_0`,
        `_1`, ... for the auxiliary predictions.
    """
    device = outputs[0]["masks_queries_logits"].device
    criterion = ClusterFormerMaskLoss(config).to(device)
    devices = [] if device.type == "cpu" else [device]
    with (
        maybe_autocast(device.type, enabled=False),
        torch.random.fork_rng(devices, enabled=not training, device_type="cuda" if not devices else device.type),
    ):
        final, *auxiliary = [{name: tensor.float() for name, tensor in output.items()} for output in outputs]
        loss_dict = criterion(
            final["masks_queries_logits"],
            final["class_queries_logits"],
            [masks.to(device).float() for masks in mask_labels],
            [classes.to(device).long() for classes in class_labels],
            auxiliary,
        )
        loss = sum(criterion.weight_dict[_without_number(name)] * value for name, value in loss_dict.items())
    return loss, loss_dict


def _without_number(name: str) -> str:
    """The loss's name without the number of the auxiliary prediction that Mask2Former's and DETR's losses append."""
    return name.rstrip("0123456789").rstrip("_")


def masks_of_label_maps(
    label_maps: torch.Tensor, ignore_index: int, num_labels: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    One mask for each class that an image shows.

    Args:
        label_maps (`torch.LongTensor` of shape `(batch, height, width)`):
            Classes in [0, num_labels), or `ignore_index` for pixels of no mask.

    Returns:
        For each image masks (n, height, width) and their classes (n,).

    Raises:
        `ValueError`: naming the image and the values that are no class.
    """
    if not isinstance(label_maps, torch.Tensor):
        raise ValueError(f"`labels` must be a tensor, got {type(label_maps).__name__}.")
    if label_maps.ndim != 3 or label_maps.is_floating_point():
        raise ValueError(
            f"`labels` must be integers of shape (batch_size, height, width), got {label_maps.dtype} of shape "
            f"{tuple(label_maps.shape)}."
        )
    mask_labels, class_labels = [], []
    for i, label_map in enumerate(label_maps):
        classes = label_map.unique()
        classes = classes[classes != ignore_index]
        wrong = classes[(classes < 0) | (classes >= num_labels)]
        if len(wrong) > 0:
            raise ValueError(
                f"`labels[{i}]` has the classes {wrong.tolist()}, which are not in [0, {num_labels}) for num_labels="
                f"{num_labels} and not semantic_loss_ignore_index={ignore_index}."
            )
        mask_labels.append(label_map[None] == classes[:, None, None])
        class_labels.append(classes)
    return mask_labels, class_labels


def check_segment_labels(labels):
    """Raises `ValueError` unless `labels` is a list of dicts with `masks` and `class_labels`."""
    if not isinstance(labels, (list, tuple)) or not all(hasattr(label, "keys") for label in labels):
        raise ValueError(
            "`labels` must be a list with one dict of `masks` and `class_labels` for each image, got "
            f"{type(labels).__name__}."
        )
    for i, label in enumerate(labels):
        missing = {"masks", "class_labels"} - set(label.keys())
        if missing:
            raise ValueError(f"`labels[{i}]` lacks {', '.join(sorted(missing))}; it has {', '.join(label.keys())}.")


def check_mask_labels(mask_labels, class_labels, pixel_values: torch.Tensor, num_labels: int) -> list[torch.Tensor]:
    """
    Checks the masks of instances or segments and brings them to the size of `pixel_values`.

    Args:
        mask_labels (`list[torch.Tensor]`): For each image (n, height, width), 1 inside; of the padded size or smaller,
            for instance the image's own: then they are padded with zeros at the right and the bottom, as images are.
        class_labels (`list[torch.Tensor]`): For each image (n,) int64 in [0, num_labels).

    Returns:
        The masks, `(n, height, width)` of `pixel_values`.

    Raises:
        `ValueError`: naming the image and the value.
    """
    batch_size, size = len(pixel_values), tuple(pixel_values.shape[-2:])
    if len(mask_labels) != batch_size or len(class_labels) != batch_size:
        raise ValueError(
            f"There must be masks and classes for each of the {batch_size} images, got {len(mask_labels)} and "
            f"{len(class_labels)}."
        )
    padded = []
    for i, (masks, classes) in enumerate(zip(mask_labels, class_labels)):
        _check_classes(classes, i, num_labels)
        _check_tensor(masks, i, "masks")
        if masks.ndim != 3 or len(masks) != len(classes):
            raise ValueError(
                f"The masks of image {i} must have the shape ({len(classes)}, height, width), one for each class, "
                f"got {tuple(masks.shape)}."
            )
        height, width = masks.shape[-2:]
        if len(masks) > 0 and (height > size[0] or width > size[1]):
            raise ValueError(f"The masks of image {i} are {height} x {width}, larger than its pixels' {size}.")
        # On an accelerator this would wait for the device at every step.
        if masks.device.type == "cpu" and masks.dtype != torch.bool and masks.numel() > 0:
            lowest, highest = (bound.item() for bound in masks.aminmax())
            if not (lowest >= 0 and highest <= 1):
                raise ValueError(
                    f"The masks of image {i} must be 1 inside and 0 outside, and hold {lowest} to {highest}."
                )
        masks = masks if len(masks) > 0 else masks.new_zeros((0, 1, 1))
        padded.append(F.pad(masks, (0, size[1] - masks.shape[2], 0, size[0] - masks.shape[1])))
    return padded
