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
Training and evaluation data for segmentation: examples and padded batches.

Semantic examples have label maps, instance and panoptic examples a mask and a class for each object; 255 marks pixels
of no class. Evaluation examples also have a `target`, what the metrics compare with, at the picture's own size; models
take none, and [`SegmentationTrainer`] keeps it from them.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from .coco_masks import InstanceData
from .coco_panoptic import PanopticData
from .detection import DetectionDataset
from .label_maps import IGNORE_INDEX, SemanticData


class SemanticDataset(DetectionDataset):
    """
    Pictures as examples, as [`DetectionDataset`] makes them, with `labels` (height, width), int64: the model's class
    ids, or 255. The `target` of evaluation examples, without a `seed`, holds

    - `image_id` (1,), `size` (2,) of the pixels and `orig_size` (2,) of the picture, height and width, int64;
    - `label_map` of that size, uint8.

    Args:
        data, class_ids: Label maps, and the model's id of each of their classes, in [0, 255).
        transform: [`SegmentationTrainTransform`] or [`SegmentationEvalTransform`].
        seed: See [`DetectionDataset`].
    """

    def __init__(self, data: SemanticData, transform: Callable, class_ids: list[int], seed: int | None = None):
        super().__init__(data, transform, class_ids, seed)
        self.model_ids = np.full(IGNORE_INDEX + 1, IGNORE_INDEX, np.uint8)
        self.model_ids[: len(class_ids)] = check_ids_fit(class_ids)

    def _example(self, row: int) -> dict:
        image, label_map = self.data.open(row)
        label_map = self.model_ids[label_map]
        pixel_values, labels = self.transform(image, label_map)
        example = {"pixel_values": pixel_values, "labels": labels.long()}
        if self.seed is None:
            example["target"] = _target(self.data, row, pixel_values, label_map)
            example["target"]["label_map"] = torch.as_tensor(label_map)
        return example


class UniversalDataset(DetectionDataset):
    """
    Pictures as examples, as [`DetectionDataset`] makes them, with `labels`, a dict of `masks` (n, height, width), bool,
    and `class_labels` (n,), int64: instances or panoptic segments, crowds and those without a pixel left out. The
    `target` of evaluation examples, without a `seed`, holds

    - `image_id` (1,), `size` (2,) of the pixels and `orig_size` (2,) of the picture, height and width, int64;
    - of panoptic data also `segments`, a map of that size, int32, 0 for void and i + 1 for segment i, and the segments'
      `class_labels` (k,), int64, and `crowds` (k,), bool.

    Args:
        data, class_ids: Instances or segments, and the model's id of each of their classes.
        transform: [`SegmentationTrainTransform`] or [`SegmentationEvalTransform`].
        seed: See [`DetectionDataset`].
    """

    data: InstanceData | PanopticData

    def _example(self, row: int) -> dict:
        image, segments, classes, crowds = self.data.open(row)
        classes = torch.as_tensor(self.class_ids[classes])
        pixel_values, masks = self.transform(image, segments)
        if masks.ndim == 2:
            masks = masks == torch.arange(1, len(classes) + 1)[:, None, None]
        kept = masks.flatten(1).any(dim=1) & ~torch.as_tensor(crowds)
        example = {"pixel_values": pixel_values, "labels": {"masks": masks[kept], "class_labels": classes[kept]}}
        if self.seed is None:
            example["target"] = _target(self.data, row, pixel_values, segments)
        if self.seed is None and segments.ndim == 2:
            example["target"] |= {
                "segments": torch.as_tensor(segments),
                "class_labels": classes,
                "crowds": torch.as_tensor(crowds),
            }
        return example


def check_ids_fit(class_ids: list[int]) -> list[int]:
    """Raises `ValueError` if a class has an id that means "no class" in label maps, or lies beyond."""
    if max(class_ids) >= IGNORE_INDEX:
        raise ValueError(f"Classes of label maps must have ids below {IGNORE_INDEX}, got {max(class_ids)}.")
    return class_ids


def _target(data, row: int, pixel_values: torch.Tensor, masks: np.ndarray) -> dict[str, torch.Tensor]:
    return {
        "image_id": torch.tensor([int(data.image_ids[row])]),
        "size": torch.tensor(pixel_values.shape[-2:]),
        "orig_size": torch.tensor(masks.shape[-2:]),
    }


class SegmentationCollator:
    """
    Pads examples at the right and at the bottom.

    Returns `pixel_values` (batch, 3, height, width), `pixel_mask` (batch, height, width), int64, 1 at real pixels, and
    `labels`: label maps (batch, height, width), int64, padded with 255, or the list of the examples' masks and classes,
    masks padded with 0. Of evaluation examples also `targets`, a list, with the batch's `padded_size` (2,) added. Names
    of training pictures are listed as `not_finite` where pixels are NaN or infinite.

    Args:
        pad_to: Height and width of every batch, if not those of its largest picture. For training the crop's: all
            batches have one shape then.
        pad_to_multiple_of: Else height and width of the batch become multiples of it.
        mask2former_labels: Whether masks and classes come as `mask_labels` and `class_labels`, two lists, which other
            models of transformers take.
        pixel_mask: Whether the model takes one.
    """

    def __init__(
        self,
        pad_to: tuple[int, int] | None = None,
        pad_to_multiple_of: int = 1,
        mask2former_labels: bool = False,
        pixel_mask: bool = True,
    ):
        self.pad_to, self.pad_to_multiple_of = pad_to, pad_to_multiple_of
        self.mask2former_labels, self.pixel_mask = mask2former_labels, pixel_mask

    def __call__(self, examples: list[dict]) -> dict:
        pictures = [example["pixel_values"] for example in examples]
        size = self.pad_to or [self._padded(max(picture.shape[axis] for picture in pictures)) for axis in (1, 2)]
        batch = {
            "pixel_values": torch.stack([pad(picture, size) for picture in pictures]),
            **self._labels([example["labels"] for example in examples], size),
        }
        if self.pixel_mask:
            real = [torch.ones_like(picture[0], dtype=torch.int64) for picture in pictures]
            batch["pixel_mask"] = torch.stack([pad(mask, size) for mask in real])
        if "target" in examples[0]:
            batch["targets"] = [example["target"] | {"padded_size": torch.tensor(size)} for example in examples]
        not_finite = [
            example["name"]
            for example in examples
            if "name" in example and not example["pixel_values"].isfinite().all()
        ]
        return batch | {"not_finite": not_finite} if not_finite else batch

    def _padded(self, side: int) -> int:
        return -(-side // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def _labels(self, labels: list, size: tuple[int, int]) -> dict:
        if isinstance(labels[0], torch.Tensor):
            return {"labels": torch.stack([pad(label_map, size, IGNORE_INDEX) for label_map in labels])}
        masks, classes = [pad(label["masks"], size) for label in labels], [label["class_labels"] for label in labels]
        if self.mask2former_labels:
            return {"mask_labels": [mask.float() for mask in masks], "class_labels": classes}
        return {"labels": [{"masks": mask, "class_labels": label} for mask, label in zip(masks, classes)]}


def pad(tensor: torch.Tensor, size: tuple[int, int], value: int = 0) -> torch.Tensor:
    """(..., height, width) with `value` added at the right and at the bottom up to `size`."""
    height, width = tensor.shape[-2:]
    if height > size[0] or width > size[1]:
        raise ValueError(f"A picture of {height} x {width} cannot be padded to {size[0]} x {size[1]}.")
    return F.pad(tensor, (0, size[1] - width, 0, size[0] - height), value=value)
