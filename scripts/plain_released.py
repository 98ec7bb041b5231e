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
The clustering of the released ClusterFormer written out step by step, with every tensor that its formulas name.

[`ClusterFormerReleasedClustering`] computes the same without the (groups, K, N, d) tensor. This one is its yardstick,
for numbers in the tests and for time and memory in `benchmark.py`. The parameters' names are the same:

    for stage in range(config.num_stages):
        for layer in model.encoder.stages[stage].layers:
            plain = PlainReleasedClustering(config, stage)
            plain.load_state_dict(layer.clustering.state_dict())
            layer.clustering = plain
"""

import torch
from torch import nn


class PlainReleasedClustering(nn.Module):
    """
    Token mixer of the released code, in the form that `config.clustering` names (`release` or `release_flash`).

    Args:
        config (`ClusterFormerConfig`): Of a released form.
        stage_idx (`int`): Stage, counted from 0.
    """

    def __init__(self, config, stage_idx: int):
        super().__init__()
        dim, self.heads = config.hidden_sizes[stage_idx], config.num_attention_heads[stage_idx]
        self.head_dim = config.head_dims[stage_idx]
        self.form, self.iterations = config.clustering, config.num_iterations
        if self.form not in ("release", "release_flash"):
            raise ValueError(f"`clustering` must be a released form, got {self.form!r}.")
        centers, windows = config.center_grid[stage_idx], config.window_grid[stage_idx]
        self.center_rows, self.center_columns = (centers, centers) if isinstance(centers, int) else centers
        self.window_rows, self.window_columns = (windows, windows) if isinstance(windows, int) else windows
        inner = self.heads * self.head_dim
        self.point = nn.Conv2d(dim, inner, 1)
        self.key = nn.Conv2d(dim, inner, 1)
        self.value = nn.Conv2d(dim, inner, 1)
        self.query = nn.Conv2d(self.head_dim, self.head_dim, 1)
        self.projection = nn.Conv2d(inner, dim, 1)
        self.sim_alpha = nn.Parameter(torch.ones(1))
        self.sim_beta = nn.Parameter(torch.zeros(1))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            features (`torch.Tensor` of shape `(batch, dim, height, width)`): Normed feature map.

        Returns:
            The update of the map, in its shape, and the index of each pixel's centre, (batch, heads, height, width).
        """
        batch, _, height, width = features.shape
        d, heads, num_centers = self.head_dim, self.heads, self.center_rows * self.center_columns

        # 1. Heads.
        points = self.point(features).reshape(batch * heads, d, height, width)
        keys = self.key(features).reshape(batch * heads, d, height, width)
        values = self.value(features).reshape(batch * heads, d, height, width)

        # 2. Windows: the buffer is cut into consecutive pieces, not the map into rectangles.
        groups, rows, columns = batch * heads, height, width
        if self.window_rows > 1 and self.window_columns > 1:
            groups *= self.window_rows * self.window_columns
            rows, columns = height // self.window_rows, width // self.window_columns
        points = points.reshape(groups, d, rows, columns)
        keys = keys.reshape(groups, d, rows, columns)
        values = values.reshape(groups, d, rows, columns)

        # 3. First centres and centre features.
        grid = (self.center_rows, self.center_columns)
        centers = nn.functional.adaptive_avg_pool2d(points, grid)  # (G, d, rows, columns)
        center_features = nn.functional.adaptive_avg_pool2d(values, grid).reshape(groups, num_centers, d)

        # 4. and 5. T iterations, all on reinterpreted memory.
        iterate = self.iterate_flash if self.form == "release_flash" else self.iterate
        centers = iterate(centers, keys, values)

        # 6. Similarity of every centre to every point; a point keeps its most similar centre.
        centers = centers.reshape(groups, d, num_centers).transpose(1, 2)  # (G, K, d)
        points = points.reshape(groups, d, rows * columns).transpose(1, 2)  # (G, N, d)
        centers = centers / centers.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        points = points / points.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        similarity = torch.sigmoid(self.sim_beta + self.sim_alpha * (centers @ points.transpose(1, 2)))  # (G, K, N)
        nearest = similarity.argmax(dim=1, keepdim=True)  # (G, 1, N)
        mask = torch.zeros_like(similarity).scatter(1, nearest, 1.0)
        similarity = similarity * mask

        # 7. Aggregate and dispatch, both through (G, K, N, d).
        values = values.reshape(groups, rows * columns, d)
        total = (values[:, None] * similarity[..., None]).sum(dim=2) + center_features  # (G, K, d)
        mean = total / (mask.sum(dim=2)[..., None] + 1.0)
        update = (mean[:, :, None] * similarity[..., None]).sum(dim=1)  # (G, N, d)
        update = update.reshape(batch, heads * d, height, width)
        return self.projection(update), nearest.reshape(batch, heads, height, width)

    def iterate(self, centers: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`release`: softmax over the centres, no scale, no division by the mass."""
        groups, d = keys.shape[:2]
        keys, values = keys.reshape(groups, -1, d), values.reshape(groups, -1, d)
        for _ in range(self.iterations):
            queries = self.query(centers).reshape(groups, -1, d)
            assignment = torch.softmax(queries @ keys.transpose(1, 2), dim=1)  # (G, K, N)
            centers = (assignment @ values).reshape(centers.shape)
        return centers

    def iterate_flash(self, centers: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`release_flash`: scaled softmax over the points; the heads come from the groups, in memory order."""
        groups, d = keys.shape[:2]
        queries = centers.reshape(groups // self.heads, -1, self.heads, d)
        keys = keys.reshape(groups // self.heads, -1, self.heads, d)
        values = values.reshape(groups // self.heads, -1, self.heads, d)
        for _ in range(self.iterations):
            logits = torch.einsum("gkhd,gnhd->ghkn", queries, keys) / d**0.5
            queries = torch.einsum("ghkn,gnhd->gkhd", logits.softmax(dim=-1), values)
        return queries.reshape(centers.shape)


__all__ = ["PlainReleasedClustering"]
