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
"""The iterations of a model's clusterings: how assignments sharpen and where the centres move."""

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .clustering_clusterformer import ClusterFormerRecurrentClustering
from .modeling_clusterformer import ClusterFormerEncoder


@dataclass
class StageIterations:
    """
    The last clustering of a stage for one image, after 0, 1, ..., T iterations, on the image's real area.

    Args:
        assignments (`torch.Tensor` of shape `(T + 1, heads, K, height, width)`):
            The share of every pixel in every cluster, in [0, 1]. The last are the model's `cluster_assignments`; the
            first are those of the centres as they were pooled.
        places (`torch.Tensor` of shape `(T + 1, heads, K, 2)`):
            Row and column of every centre in [0, 1] of the image's sides; `nan` where it has none. In the released
            forms, whose centres have no place, the mean of their pixels'.
    """

    assignments: torch.Tensor
    places: torch.Tensor


@torch.no_grad()
def trace_clusters(model: PreTrainedModel, inputs: dict, index: int = 0) -> tuple[ModelOutput, list[StageIterations]]:
    """
    Runs a model and repeats, in the last block of each stage, its clustering with fewer iterations. What comes before
    the block is that of the whole model throughout.

    Args:
        model (`PreTrainedModel`): Any ClusterFormer, or a model with one as its backbone, in evaluation mode.
        inputs (`dict[str, torch.Tensor]`): What the model takes, on its device.
        index (`int`): Which image of the batch.

    Returns:
        The model's outputs, with cluster assignments where it gives them, and the iterations of each stage.

    Raises:
        `ValueError`: if there is no ClusterFormer in the model.
    """
    encoder = next((module for module in model.modules() if isinstance(module, ClusterFormerEncoder)), None)
    if encoder is None:
        raise ValueError(f"There is no ClusterFormer in {type(model).__name__}.")
    clusterings, calls = [stage.layers[-1].clustering for stage in encoder.stages], {}
    hooks = [
        clustering.register_forward_pre_hook(lambda module, args: calls.update({module: args}))
        for clustering in clusterings
    ]
    try:
        outputs = model(**inputs, output_cluster_assignments=True)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, [_iterations(clustering, calls[clustering], index) for clustering in clusterings]


def _iterations(clustering, args: tuple, index: int) -> StageIterations:
    is_recurrent = isinstance(clustering, ClusterFormerRecurrentClustering)
    steps = []
    for number in range(clustering.num_iterations + 1):
        shortened = copy.copy(clustering)  # shares the weights
        shortened.num_iterations = number
        steps.append((_recurrent_step if is_recurrent else _released_step)(shortened, *args, index))
    return StageIterations(*(torch.stack(parts) for parts in zip(*steps)))


def _recurrent_step(clustering, features, geometry, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Assignments (heads, K, height, width) and places (heads, K, 2)."""
    clusters = clustering.cluster(features, geometry)
    assignments = clustering.assign(features, clusters, geometry, sampled=False)
    assignments = assignments[index].mT.unflatten(-1, geometry.map_size)
    height, width = geometry.sizes[index if len(geometry.sizes) > 1 else 0].tolist()
    means = clusters[1]
    places = means[index if len(means) > 1 else 0].mT.expand(*assignments.shape[:2], 2)
    if geometry.center_mask is not None:
        surplus = geometry.center_mask[index, 0, 0] != 0
        places = places.masked_fill(surplus[:, None], torch.nan)
    return assignments[..., :height, :width].float().cpu(), places.float().cpu()


def _released_step(clustering, features, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    nearest = clustering(features)[1][index].flatten(1)
    height, width = features.shape[-2:]
    num_centers = clustering.center_grid[0] * clustering.center_grid[1]
    assignments = torch.nn.functional.one_hot(nearest, num_centers).mT.float()
    rows, columns = ((torch.arange(side, device=features.device) + 0.5) / side for side in (height, width))
    positions = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    places = assignments @ positions / assignments.sum(dim=-1, keepdim=True)  # nan without pixels
    return assignments.unflatten(-1, (height, width)).cpu(), places.cpu()
