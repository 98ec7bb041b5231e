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
What a training writes down beside its loss: parts of the loss, learning rates, samples a second, time lost waiting for
data, memory, how well the model clusters; and pictures of their course.
"""

import resource
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .metrics.clusters import cluster_statistics


# Pictures of a batch on which the clustering is looked at.
NUM_WATCHED = 8
CURVES_NAME = "training_curves.png"


class TrainingLog:
    """Gathers what one process sees between two lines of a log."""

    def __init__(self):
        self._parts: dict[str, torch.Tensor] = defaultdict(float)
        self._steps = self._samples = 0
        self._waited, self._since = 0.0, time.perf_counter()
        self.watched: dict[str, torch.Tensor] = {}

    def add_step(self, num_samples: int, waited: float):
        """Notes a step of `num_samples` pictures of all processes, for which this one waited so many seconds."""
        self._steps += 1
        self._samples += num_samples
        self._waited += waited

    def add_loss(self, outputs: ModelOutput, scale: float):
        """Adds the parts of the final prediction's loss: a batch is `scale` of its step."""
        for name, value in (outputs.get("loss_dict") or {}).items():
            if not name[-1].isdigit():  # of an auxiliary prediction
                self._parts[name] = self._parts[name] + scale * value.detach()

    def watch(self, inputs: dict):
        """Keeps pictures (without their padding, so with one only) to look at the clustering."""
        pixels, mask = inputs["pixel_values"].detach(), inputs.get("pixel_mask")
        if mask is not None:
            height, width = int(mask[0, :, 0].sum()), int(mask[0, 0].sum())
            pixels = pixels[:1, :, :height, :width]
        self.watched = {"pixel_values": pixels[:NUM_WATCHED]}

    def summary(self, device: torch.device) -> dict[str, float]:
        """The numbers since the last summary."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        steps = max(self._steps, 1)
        numbers = {name: float(value) / steps for name, value in self._parts.items()}
        numbers["samples_per_second"] = self._samples / seconds
        numbers["waiting_for_data"] = self._waited / seconds
        numbers["memory_gib"] = peak_memory(device) / 2**30
        watched = self.watched
        self.__init__()
        self.watched = watched
        return numbers


def peak_memory(device: torch.device) -> int:
    """Most bytes that were in use on the device, or on the CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def clustering_health(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """For each stage the entropy of the assignments over log K and the share of the centres that are in use."""
    was_training = model.training
    model.eval()
    try:
        stages = cluster_statistics(model(**inputs, output_cluster_assignments=True))
    finally:
        model.train(was_training)
    health = {}
    for number, stage in enumerate(stages, 1):
        health[f"cluster_entropy_{number}"] = stage["entropy"]
        health[f"clusters_in_use_{number}"] = stage["in_use"] / stage["clusters"]
    return health


def draw_curves(log_history: list[dict], path: str | Path):
    """Draws every number of a log over the steps, numbers of one kind (`eval_`, stages) together, to a PNG if any."""
    from matplotlib.figure import Figure  # slow to import, and only needed in the end

    curves = _curves(log_history)
    if not curves:
        return
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    for place, (title, lines) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        for name, points in lines.items():
            axes.plot(*zip(*points), marker="." if len(points) < 30 else None, label=name)
        axes.set_title(title)
        axes.set_xlabel("step")
        if len(lines) > 1:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=80)


def _curves(log_history: list[dict]) -> dict[str, dict[str, list[tuple]]]:
    """Points (step, value) of each line of each plot."""
    curves = defaultdict(lambda: defaultdict(list))
    for entry in log_history:
        if "train_runtime" in entry:  # the whole run's totals
            continue
        for name, value in entry.items():
            own_speed = name.startswith("eval_") and name.endswith(("_runtime", "_per_second"))
            if name in ("step", "epoch") or own_speed or not isinstance(value, int | float):
                continue
            title = name.removeprefix("eval_").rstrip("0123456789").rstrip("_") or name
            if title.startswith("learning_rate"):
                title = "learning_rate"
            curves[title][name].append((entry["step"], value))
    return curves
