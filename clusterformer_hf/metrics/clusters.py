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
"""How well a model clusters: sharp assignments, distinct centres, no idle ones."""

import math

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput


def cluster_statistics(outputs: ModelOutput) -> list[dict[str, float]]:
    """
    Statistics of each stage, means over the images (and heads) of a batch without padding.

    Args:
        outputs (`ModelOutput`): Of any ClusterFormer model called with `output_cluster_assignments=True`.

    Returns:
        For each stage a dict with
        - `positions`: pixels of its map, and `clusters`: centres of its map, K.
        - `entropy`: entropy of a pixel's assignment over log K, in [0, 1]; 0 is a hard assignment. 0 for K = 1.
        - `cosine`: mean pairwise cosine of an image's centres, in [-1, 1]; 1 is a collapse to one centre.
        - `in_use`: centres that are the first choice of at least one pixel, in [1, K].

    Raises:
        `ValueError`: if `outputs` holds no assignments.
    """
    if outputs.get("cluster_assignments") is None:
        raise ValueError("The model must be called with output_cluster_assignments=True.")
    return [
        stage_statistics(assignments.float(), centers.float())
        for assignments, centers in zip(outputs.cluster_assignments, outputs.cluster_centers)
    ]


def stage_statistics(assignments: torch.Tensor, centers: torch.Tensor) -> dict[str, float]:
    """The statistics of one stage from (batch, heads, K, height, width) and (batch, K, channels)."""
    num_centers = centers.shape[1]
    entropy = torch.special.entr(assignments).sum(dim=2).mean() / math.log(max(num_centers, 2))
    directions = F.normalize(centers, dim=-1)
    cosines = (directions @ directions.mT).sum(dim=(1, 2)) - directions.square().sum(dim=(1, 2))
    winners = F.one_hot(assignments.argmax(dim=2).flatten(2), num_centers).amax(dim=2).sum(dim=-1)
    return {
        "positions": assignments.shape[-2] * assignments.shape[-1],
        "clusters": num_centers,
        "entropy": entropy.item(),
        "cosine": cosines.mean().item() / max(num_centers * (num_centers - 1), 1),
        "in_use": winners.float().mean().item(),
    }
