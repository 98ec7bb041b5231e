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
What the metrics of segmentation share: how predictions reach them while [`Trainer`] evaluates, with flat memory.

    trainer = SegmentationTrainer(
        args=set_up_evaluation(training_args),
        data_collator=SegmentationCollator(),
        preprocess_logits_for_metrics=PanopticPostProcessor(image_processor, data, class_ids),
        compute_metrics=PanopticMetric(data),
        ...
    )

With other settings Trainer joins the masks of different pictures and cuts those of the last batch, without an error.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from ..training import ClusterFormerTrainer


class SegmentationTrainer(ClusterFormerTrainer):
    """[`ClusterFormerTrainer`] that hands the `targets` of evaluation batches to the metrics and not to the model."""

    def evaluation_loop(self, *args, **kwargs):
        # The losses sample points: the same ones in every evaluation, whatever came before it.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.args.seed)
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        targets = self._prepare_input(inputs.pop("targets", None))
        loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, outputs, labels if targets is None or prediction_loss_only else targets


class PostProcessor:
    """
    Trainer's `preprocess_logits_for_metrics`: what a metric counts, read from the model's outputs image by image.

    Takes the outputs, of which the first `num_outputs` tensors with three axes or more are read, and the batch's
    `targets`; that list is emptied. Returns for each picture a dict of `image_id`, an int, and what `read` returns,
    tensors as arrays.

    For `Trainer.evaluate`. `Trainer.predict` takes no arrays.
    """

    num_outputs = 2

    def read(self, *args) -> dict:
        """
        Reads one picture.

        Args:
            args: The first `num_outputs` tensors without the batch's axis and the padding, float32; then the target.
        """
        raise NotImplementedError

    def __call__(self, outputs: tuple | torch.Tensor, targets: list[dict]) -> list[dict]:
        if not isinstance(targets, list) or not all("padded_size" in target for target in targets):
            raise TypeError(
                "Masks are compared with `targets`: give SegmentationTrainer a SegmentationCollator and data sets "
                "without a seed for evaluation."
            )
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        # Trainer drops outputs that are None; losses and auxiliary logits may come along.
        tensors = [output.float() for output in outputs if isinstance(output, torch.Tensor) and output.ndim > 2]
        tensors = tensors[: self.num_outputs]
        found = []
        for row, target in enumerate(map(_without_padding, targets)):
            logits = [real_area(tensor[row], target) if tensor.ndim == 4 else tensor[row] for tensor in tensors]
            found.append({"image_id": int(target["image_id"]), **_as_arrays(self.read(*logits, target))})
        # Trainer sends the targets between processes after this, of which the metric needs nothing more.
        targets.clear()
        return found


def _without_padding(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The target with maps of the picture's size: Trainer pads them to the widest of all processes."""
    height, width = target["orig_size"].tolist()
    return {name: value[:height, :width] if value.ndim == 2 else value for name, value in target.items()}


def _as_arrays(found):
    """Arrays in place of tensors: of these, Trainer's second evaluation forgets `eval_use_gather_object`."""
    if isinstance(found, dict):
        return {name: _as_arrays(value) for name, value in found.items()}
    return found.cpu().numpy() if isinstance(found, torch.Tensor) else found


def real_area(logits: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    Logits of a picture without the batch's padding.

    Args:
        logits: (channels, height, width), a cell for each square of pixels of the padded picture.
        target: With `size` and `padded_size` (2,), height and width in pixels.

    Returns:
        (channels, rows, columns), which cover the picture exactly: where its border runs through cells, all are sampled
        anew.
    """
    padded, kept = target["padded_size"].tolist(), target["size"].tolist()
    stride = find_stride(padded, logits.shape[-2:])
    rows, columns = (math.ceil(side / stride) for side in kept)
    logits = logits[:, :rows, :columns]
    y, x = kept[0] / stride / rows, kept[1] / stride / columns
    if y == x == 1:
        return logits
    theta = torch.tensor([[[x, 0, x - 1], [0, y, y - 1]]], device=logits.device)
    grid = F.affine_grid(theta, [1, len(logits), rows, columns], align_corners=False)
    return F.grid_sample(logits[None], grid, padding_mode="border", align_corners=False)[0]


def find_stride(sides: Iterable[int], cells: Iterable[int]) -> int:
    """
    By what sides in pixels were divided and rounded up to numbers of cells: a power of two where one fits, as nearly
    always, and else the least number.
    """
    sides, cells = list(sides), list(cells)
    least = max(side / number for side, number in zip(sides, cells))
    power = 2 ** math.ceil(math.log2(least))
    is_power = all(math.ceil(side / power) == number for side, number in zip(sides, cells))
    return power if is_power else math.ceil(least)


class JoinedPostProcessor(PostProcessor):
    """Several readings of the same outputs, for [`JoinedMetric`]: `JoinedPostProcessor(panoptic=..., instance=...)`."""

    def __init__(self, **parts: PostProcessor):
        self.parts = parts
        self.num_outputs = max(part.num_outputs for part in parts.values())

    def read(self, *args) -> dict:
        return {name: part.read(*args) for name, part in self.parts.items()}


class JoinedMetric:
    """The metrics of several readings: `JoinedMetric(panoptic=..., instance=...)`, named as the post-processors are."""

    def __init__(self, **parts):
        self.parts = parts

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        check_is_list(prediction)
        metrics = {}
        for name, part in self.parts.items():
            found = [{"image_id": picture["image_id"], **picture[name]} for picture in prediction.predictions]
            metrics |= part(EvalPrediction(predictions=found, label_ids=[]), compute_result)
        return metrics


def check_is_list(prediction: EvalPrediction):
    """Raises `TypeError` where Trainer was given other settings than the metrics need."""
    if not isinstance(prediction.predictions, list):
        raise TypeError(
            "Predictions must come as a list with one dict for each picture: pass a post-processor as "
            "preprocess_logits_for_metrics, and training arguments from set_up_evaluation."
        )
