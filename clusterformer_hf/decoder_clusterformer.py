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
The cluster decoder of the detection and segmentation models: a feature pyramid, and layers that cluster its pixels.

The encoder's last centres are the decoder's first. A layer assigns the pixels of all levels to the centres and moves
the centres to their pixels, in feature and position; boxes and masks are read from that assignment.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import maybe_autocast

from .clustering_clusterformer import (
    ClusterFormerQuery,
    StageGeometry,
    expectation,
    pixels_of_map,
    split_heads,
    stage_geometry,
    sum_pixels,
    takes_kernels,
    unit_vectors,
)
from .configuration_clusterformer import ClusterFormerConfig, as_pair
from .kernels_clusterformer import MAX_EXTENT, MIN_EXTENT, MIN_MASS, cluster


# Class logits of surplus centres: a score of 6e-9, and a class loss that stays small where one must be matched.
SURPLUS_LOGIT = -19.0
# Of edges: how fast the exponential grows in an extent, how many extents it is taken to, and the log of its mean in an
# evenly filled box, which ends at the root of 3 extents.
EDGE_RATE, MAX_EDGE_DEVIATION = 2.0, 4.0
EVEN_EDGE = math.log(math.sinh(EDGE_RATE * 3**0.5) / (EDGE_RATE * 3**0.5))
# Extents that a place is told to be off at most: of a cluster without pixels it is far.
MAX_OFFSET = 8.0


class ClusterFormerSmoothing(nn.Conv2d):
    """
    A depthwise 3x3 convolution beside the identity. A dense one took a fifth of a detector's training step, and with it
    two layers came to an AP of .721 instead of .736 in twelve minutes.
    """

    def __init__(self, dim: int):
        super().__init__(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + super().forward(features)


class ClusterFormerFeaturePyramid(nn.Module):
    """
    Feature pyramid (https://arxiv.org/abs/1612.03144): 1x1 laterals, a top-down path, 3x3 smoothing.

    Norms are taken pixel by pixel and the path down repeats pixels: both know nothing of an image's padding.
    """

    def __init__(self, config: ClusterFormerConfig, stages: list[str]):
        super().__init__()
        sizes = {stage: config.hidden_sizes[config.stage_names.index(stage) - 1] for stage in stages}
        dim = config.decoder_hidden_size
        self.stages = stages
        self.norms = nn.ModuleDict({s: nn.LayerNorm(size, eps=config.layer_norm_eps) for s, size in sizes.items()})
        self.laterals = nn.ModuleDict({stage: nn.Linear(size, dim) for stage, size in sizes.items()})
        self.smoothings = nn.ModuleDict({stage: ClusterFormerSmoothing(dim) for stage in sizes})

    def forward(self, hidden_states: list[torch.Tensor], masks: list[torch.Tensor | None]) -> list[torch.Tensor]:
        """
        Args:
            hidden_states (`list[torch.Tensor]`): The stages' maps (batch, channels, height, width), finest first.
            masks (`list[torch.Tensor]`): Real pixels of each map, (batch, height, width, 1), or `None`.

        Returns:
            `list[torch.Tensor]` of maps `(batch, decoder_hidden_size, height, width)`, finest first.
        """
        merged, levels = None, []
        for stage, features, mask in reversed(list(zip(self.stages, hidden_states, masks))):
            lateral = self.laterals[stage](self.norms[stage](features.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            if merged is not None:
                height, width = lateral.shape[-2:]
                lateral = lateral + F.interpolate(merged, scale_factor=2.0, mode="nearest")[..., :height, :width]
            merged = lateral if mask is None else lateral * mask.permute(0, 3, 1, 2).to(lateral.dtype)
            levels.append(self.smoothings[stage](merged))
        return levels[::-1]


class ClusterFormerPixelEmbeddings(nn.Module):
    """
    The pixels that masks are made of: the finest stage's map and, repeated, the pyramid's finest level, in
    `mask_feature_size` channels.
    """

    def __init__(self, config: ClusterFormerConfig, channels: int):
        super().__init__()
        dim = config.mask_feature_size
        self.norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.lateral = nn.Linear(channels, dim)
        self.reduction = nn.Linear(config.decoder_hidden_size, dim)
        self.smoothing = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, hidden_state: torch.Tensor, level: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            hidden_state (`torch.Tensor` of shape `(batch, channels, height, width)`): The stage's map.
            level (`torch.Tensor` of shape `(batch, decoder_hidden_size, ceil(height / 2), ceil(width / 2))`).
            mask (`torch.Tensor` of shape `(batch, height, width, 1)`, *optional*): Real pixels.

        Returns:
            `torch.Tensor` of shape `(batch, mask_feature_size, height, width)`.
        """
        height, width = hidden_state.shape[-2:]
        lateral = self.lateral(self.norm(hidden_state.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        reduced = self.reduction(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        pixels = lateral + F.interpolate(reduced, scale_factor=2.0, mode="nearest")[..., :height, :width]
        return self.smoothing(pixels if mask is None else pixels * mask.permute(0, 3, 1, 2).to(pixels.dtype))


class PyramidGeometry:
    """
    Where the pixels of all levels lie, in [0, 1] of each image's real area, and which are real.

    Args:
        levels (`list[StageGeometry]`): The levels, finest first.
    """

    def __init__(self, levels: list[StageGeometry]):
        self.map_sizes = [level.map_size for level in levels]
        self.positions = [level.positions(sampled=False) for level in levels]
        extents = [1 / level.sizes.to(level.dtype) for level in levels]
        self.pixels = torch.cat([pixels_of_map(*level) for level in zip(self.positions, extents)], dim=-1)
        # Of the rows and of the columns of all levels, (1 or batch, 1, length, 1) each.
        self.axis_positions, self.axis_variances = [], []
        for axis, positions in enumerate(zip(*self.positions)):
            sides = [extent[:, axis, None].expand_as(level) for extent, level in zip(extents, positions)]
            self.axis_positions.append(torch.cat(positions, dim=1)[:, None, :, None])
            # A pixel's own variance, a twelfth of its squared side, is part of a cluster's, as in the encoder.
            self.axis_variances.append(torch.cat(sides, dim=1)[:, None, :, None].square() / 12)
        masks = [level.mask.flatten(1, 2)[:, None] for level in levels if level.mask is not None]
        self.mask = torch.cat(masks, dim=2) if masks else None  # (batch, 1, N, 1)

    def zero_padding(self, pixels: torch.Tensor) -> torch.Tensor:
        """The pixels of all levels, (batch, heads, N, d), with zeros at padded ones."""
        return pixels if self.mask is None else pixels * self.mask.to(pixels.dtype)

    def split(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The pixels of each level: (batch, heads, N, d) of all -> (batch, heads, height * width, d) each."""
        return list(pixels.split([height * width for height, width in self.map_sizes], dim=2))

    def split_axis(self, table: torch.Tensor, axis: int) -> list[torch.Tensor]:
        """The rows (axis 0) or columns of each level: (batch, heads, length, K) of all -> the same of each level."""
        return list(table.split([size[axis] for size in self.map_sizes], dim=2))


class ClusterFormerPyramidEmbeddings(nn.Module):
    """
    Embeds where the pixels of a pyramid lie: linear maps of the sines of their row and column, and a learned vector for
    each level.
    """

    def __init__(self, config: ClusterFormerConfig, num_levels: int):
        super().__init__()
        dim = config.decoder_hidden_size
        self.row = nn.Linear(dim // 2, dim, bias=False)
        self.column = nn.Linear(dim // 2, dim, bias=False)
        self.level = nn.Embedding(num_levels, dim)

    def forward(self, geometry: PyramidGeometry) -> torch.Tensor:
        """Returns `(1 or batch, N, decoder_hidden_size)`."""
        dtype, dim = self.level.weight.dtype, self.level.embedding_dim
        levels = self.level(torch.arange(self.level.num_embeddings, device=geometry.positions[0][0].device))
        embeddings = []
        for positions, level in zip(geometry.positions, levels):
            rows, columns = (sine_embedding(position, dim // 2).to(dtype) for position in positions)
            rows, columns = self.row(rows) + level, self.column(columns)
            embeddings.append((rows[:, :, None] + columns[:, None]).flatten(1, 2))
        return torch.cat(embeddings, dim=1)


def sine_embedding(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Sines and cosines of positions in [0, 1] at wavelengths from 2 down to 2 / 256: (...) -> (..., dim)."""
    exponents = torch.linspace(0, 8, dim // 2, device=positions.device, dtype=positions.dtype)
    angles = positions[..., None] * math.pi * 2.0**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ClusterFormerPixelProjections(nn.Module):
    """
    Keys, values and weights of a pyramid's pixels. As the iterations of Eq. 3 share keys and values, so do the layers:
    three such learn as much in the same time as two with projections of their own, six are an eighth faster.

    The weights are learned beside the paper, for clusters that are objects: how much a pixel counts in the M-step of
    each layer and head, so that background may count for nothing.
    """

    def __init__(self, config: ClusterFormerConfig):
        super().__init__()
        dim, self.num_heads = config.decoder_hidden_size, config.decoder_attention_heads
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.pixel_weight = nn.Linear(dim, config.decoder_layers * self.num_heads)

    def forward(
        self, features, embeddings, geometry: PyramidGeometry
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """
        Args:
            features (`torch.Tensor` of shape `(batch, N, dim)`): Pixels of all levels.
            embeddings (`torch.Tensor` of shape `(1 or batch, N, dim)`): Of the pixels' positions and levels.
            geometry (`PyramidGeometry`): Which pixels are real.

        Returns:
            Keys of norm 1 and values, (batch, heads, N, d) each, and for each layer the pixels' weights (batch, heads,
            N, 1) in float32 or better: in (0, 1) at real pixels and 0 at padded ones.
        """
        placed = features + embeddings
        keys, values = (split_heads(pixels, self.num_heads) for pixels in (self.key(placed), self.value(features)))
        weights = self.pixel_weight(placed)
        with maybe_autocast(keys.device.type, enabled=False):
            dtype = torch.promote_types(keys.dtype, torch.float32)
            keys = unit_vectors(keys.to(dtype)).to(keys.dtype)
            # The gradient of a light pixel's weight leaves the range of float16.
            weights = geometry.zero_padding(weights.to(dtype).sigmoid().mT.contiguous()[..., None])
        # Contiguous, or in float32 the products of every layer would copy them again.
        return keys.contiguous(), values.contiguous(), weights.split(self.num_heads, dim=1)


class ClusterFormerPartOffset(nn.Linear):
    """
    Where the heads' parts of a cluster lie, rows first, in units of its extent. Starts evenly around the cluster, the
    four parts of four heads in its corners.
    """

    def even_offsets(self) -> torch.Tensor:
        num_heads = self.out_features // 2
        if num_heads == 1:
            return torch.zeros(2)
        angles = math.pi * (0.25 + 2 * torch.arange(num_heads) / num_heads)
        directions = torch.stack([angles.sin(), angles.cos()], dim=-1)
        return (0.8 * directions / directions.abs().amax(dim=-1, keepdim=True)).flatten()


class ClusterFormerPyramidClustering(nn.Module):
    """
    Recurrent cross-attention clustering (Eq. 3) of a pyramid's pixels, in feature and position as in the encoder. The
    pixels of all levels are clustered together.

    Beside the paper each head learns a part of the cluster that it starts from. With that and with the weights of
    [`ClusterFormerPixelProjections`] two layers took 76,000 digit scenes to an AP of .806 instead of 128,000. A centre
    is told where its heads' pixels lie in relation to each other and to its place before, and where they end, beside
    the mean of their values.
    """

    def __init__(self, config: ClusterFormerConfig):
        super().__init__()
        dim, self.num_heads = config.decoder_hidden_size, config.decoder_attention_heads
        head_dim = dim // self.num_heads
        self.num_iterations = config.decoder_num_iterations
        self.center = nn.Linear(dim, dim)
        self.query = ClusterFormerQuery(head_dim, head_dim)  # shared by the heads and the iterations
        self.part_offset = ClusterFormerPartOffset(dim, 2 * self.num_heads)
        self.part_scale = nn.Parameter(torch.empty(self.num_heads, 1, 1))  # log of a part's share of the variance
        self.projection = nn.Linear(dim, dim)
        self.moments = nn.Linear(num_relative_features(config), dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(self.num_heads, 1, 1))  # log of the temperature
        self.spatial_weight = nn.Parameter(torch.empty(self.num_heads, 1, 1))

    def forward(
        self,
        centers,
        mean,
        variance,
        keys,
        values,
        weights,
        geometry: PyramidGeometry,
        center_mask=None,
        output_assignments: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor] | None]:
        """
        Args:
            centers (`torch.Tensor` of shape `(batch, K, dim)`): Centres with the embedding of their place.
            mean, variance (`torch.Tensor` of shape `(batch, K, 2)`): Of their positions in [0, 1], rows first.
            keys, values, weights (`torch.Tensor`): Of the pixels, see [`ClusterFormerPixelProjections.forward`].
            geometry (`PyramidGeometry`): Positions of the pixels.
            center_mask (`torch.Tensor` of shape `(batch, 1, 1, K)`, *optional*): 0 at centres, -inf at surplus ones.
            output_assignments (`bool`): Whether to return the last assignments.

        Returns:
            The centres' update (batch, K, dim), the mean and variance of all heads' weighted pixels (batch, K, 2), in
            relation to these the heads' own and those before, and the edges of heads and whole (batch, K, 9 * heads +
            8; see [`relative_features`]), and the last assignments of each level (batch, heads, height * width, K),
            whose sum over K is the weight of a pixel.
        """
        offset, own_centers = self.part_offset(centers), split_heads(self.center(centers), self.num_heads)
        with maybe_autocast(keys.device.type, enabled=False):
            dtype = torch.promote_types(keys.dtype, torch.float32)
            before = mean.to(dtype), variance.to(dtype)
            clusters = own_centers.to(dtype), *self.parts(*before, offset.to(dtype))
            weights = weights.to(dtype)  # sharding in 16 bits casts what a layer is given
            (means, *moments), marginals, assignments = self.iterate(
                keys, values, weights, clusters, geometry, center_mask, output_assignments
            )
            mass = mass_of(marginals)[..., None]
            share = mass / mass.sum(dim=1, keepdim=True)
            whole = mixture_moments(share, *moments)
            relative = relative_features(share, moments, whole, before, marginals, geometry).to(centers.dtype)
        update = means.transpose(1, 2).flatten(2).to(centers.dtype)
        return self.projection(update) + self.moments(relative), *whole, relative, assignments

    def iterate(
        self, keys, values, weights, clusters, geometry, center_mask, output_assignments: bool
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor], list[torch.Tensor] | None]:
        """
        The T E- and M-steps; the last one's centres, means and variances, its marginals as for [`maximization`], and
        its assignments.
        """
        num_iterations, assignments = self.num_iterations, None
        if takes_kernels(keys.transpose(1, 2), clusters[0].shape[2], self.query) and num_iterations > 1:
            # But for the last, whose marginals kernels do not make.
            clusters = self.cluster_in_kernels(keys, values, weights, clusters, geometry, center_mask)
            num_iterations = 1
        pixels = [geometry.split(pixels.to(weights.dtype)) for pixels in (keys, values)]
        weights = geometry.split(weights)
        for _ in range(num_iterations):
            queries, tables = self.expectation_inputs(clusters, geometry)
            levels = [
                (*level, queries, table, center_mask, weight) for *level, table, weight in zip(*pixels, tables, weights)
            ]
            values_of_levels, *marginals = zip(*(sum_pixels(*level) for level in levels))
            marginals = [torch.cat(of_levels, dim=2) for of_levels in marginals]
            clusters = maximization(sum(values_of_levels), marginals, geometry)
        if output_assignments:
            assignments = [expectation(of_keys, *others) for of_keys, _, *others in levels]
        return clusters, marginals, assignments

    def cluster_in_kernels(self, keys, values, weights, clusters, geometry, center_mask) -> tuple[torch.Tensor, ...]:
        """All E- and M-steps but the last; returns centres, means and variances as [`maximization`]."""
        centers, mean, variance = clusters
        centers, place, *_ = cluster(
            keys.transpose(1, 2),
            values.transpose(1, 2),
            centers.contiguous(),
            torch.cat([mean, variance], dim=-1).mT.contiguous(),
            self.query.weight,
            self.query.bias,
            self.logit_scale,
            self.spatial_weight,
            geometry.pixels,
            weights[..., 0],
            None if center_mask is None else center_mask.flatten(1),
            self.num_iterations - 1,
        )
        return centers, *place.mT.chunk(2, dim=-1)

    def parts(self, mean, variance, offset) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mean and variance, (batch, heads, K, 2), of the heads' parts of clusters of (batch, K, 2), for offsets (batch,
        K, heads * 2).
        """
        # Contiguous, or all tables made of it would lie in the order of its memory, and be copied.
        offset = split_heads(offset, self.num_heads).contiguous()
        mean, variance = mean[:, None] + offset * variance.sqrt()[:, None], variance[:, None]
        variance = variance * self.part_scale.to(variance.dtype).exp()
        return mean, variance.clamp(MIN_EXTENT**2, MAX_EXTENT**2)

    def expectation_inputs(self, clusters, geometry) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """
        What [`expectation`] takes: the queries, and for each level the logs of the centres' Gaussians along its rows,
        (batch, heads, height, K), and its columns, (batch, heads, width, K).
        """
        centers, mean, variance = clusters
        queries = F.normalize(self.query(centers), dim=-1) * self.logit_scale.to(centers.dtype).exp()
        weight = -0.5 * F.softplus(self.spatial_weight.to(mean.dtype))[..., None] / variance[:, :, None]
        rows, columns = (
            (positions - mean[:, :, None, :, axis]).square() * weight[..., axis]
            for axis, positions in enumerate(geometry.axis_positions)
        )
        return queries, list(zip(geometry.split_axis(rows, 0), geometry.split_axis(columns, 1)))


def maximization(values, marginals, geometry: PyramidGeometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    M-step over all levels: means of the pixels' values and positions under the assignments.

    Args:
        values (`torch.Tensor` of shape `(batch, heads, K, d)`): Sums of the values of all pixels.
        marginals (`list[torch.Tensor]`): Mass of the rows, (batch, heads, length, K), and of the columns of all levels.

    Returns:
        Centres (batch, heads, K, d), means and variances of their positions (batch, heads, K, 2).
    """
    mass = mass_of(marginals)
    means, variances = [], []
    for marginal, positions, own in zip(marginals, geometry.axis_positions, geometry.axis_variances):
        mean = (marginal * positions).sum(dim=2) / mass
        deviation = (positions - mean[:, :, None]).square() + own
        means.append(mean)
        variances.append((marginal * deviation).sum(dim=2) / mass)
    variance = torch.stack(variances, dim=-1).clamp(MIN_EXTENT**2, MAX_EXTENT**2)
    return values / mass[..., None], torch.stack(means, dim=-1), variance


def mass_of(marginals: list[torch.Tensor]) -> torch.Tensor:
    """Mass (batch, heads, K) of clusters with these rows and columns: the sum of either."""
    return marginals[0].sum(dim=2).clamp_min(MIN_MASS)


def num_relative_features(config: ClusterFormerConfig) -> int:
    """Numbers of [`relative_features`]: nine of each head, four of the whole and four of its place before."""
    return 9 * config.decoder_attention_heads + 8


def relative_features(share, moments, whole, before, marginals, geometry: PyramidGeometry) -> torch.Tensor:
    """
    What a centre is told of the place of its pixels, in units of their extent.

    Args:
        share (`torch.Tensor` of shape `(batch, heads, K, 1)`): Of each head in the mass.
        moments (`list[torch.Tensor]`): Mean and variance of each head's pixels, (batch, heads, K, 2) each.
        whole, before (`tuple[torch.Tensor, torch.Tensor]`):
            Mean and variance, (batch, K, 2) each: of all heads' pixels, and as they were before the layer.
        marginals (`list[torch.Tensor]`): See [`maximization`].

    Returns:
        `(batch, K, 9 * heads + 8)`: for each head its [`relative_place`] and the log of its share; the place before;
        and the [`edges`] of each head and of all.
    """
    of_whole = [moment[:, None] for moment in whole]
    heads = torch.cat([relative_place(*moments, *of_whole), share.clamp_min(MIN_MASS).log()], dim=-1)
    marginals = [torch.cat([of_axis, of_axis.sum(dim=1, keepdim=True)], dim=1) for of_axis in marginals]
    all_edges = edges(marginals, geometry, *(torch.cat(both, dim=1) for both in zip(moments, of_whole)))
    heads, all_edges = (numbers.transpose(1, 2).flatten(2) for numbers in (heads, all_edges))
    return torch.cat([heads, relative_place(*before, *whole), all_edges], dim=-1)


def relative_place(mean, variance, whole_mean, whole_variance) -> torch.Tensor:
    """Offset and log of the extent in units of the whole's extent, rows first: (..., 2) each -> (..., 4)."""
    extent = whole_variance.sqrt()
    offset = ((mean - whole_mean) / extent).clamp(-MAX_OFFSET, MAX_OFFSET)
    return torch.cat([offset, (variance.sqrt() / extent).log()], dim=-1)


def edges(marginals, geometry: PyramidGeometry, mean, variance) -> torch.Tensor:
    """
    Where clusters end: the logs of the means of exp(2 z) and exp(-2 z) along rows and columns, z being a pixel's
    deviation in units of the cluster's extent, less what they are in an evenly filled box of many pixels. An object
    ends where its mass ends, however little of it is there, which mean and variance do not tell.

    Args:
        marginals (`list[torch.Tensor]`): See [`maximization`].
        mean, variance (`torch.Tensor` of shape `(batch, heads, K, 2)`): Of the same mass.

    Returns:
        `(batch, heads, K, 4)`: along rows at their ends and starts, then along columns.
    """
    mass, results = mass_of(marginals), []
    for axis, (marginal, positions) in enumerate(zip(marginals, geometry.axis_positions)):
        deviation = (positions - mean[:, :, None, :, axis]) / variance[:, :, None, :, axis].sqrt()
        exponent = EDGE_RATE * deviation.clamp(-MAX_EDGE_DEVIATION, MAX_EDGE_DEVIATION)
        sums = [(marginal * (sign * exponent).exp()).sum(dim=2) for sign in (1, -1)]
        # At least 1 by convexity, but in a cluster without pixels.
        results += [(of_side / mass).clamp_min(1).log() - EVEN_EDGE for of_side in sums]
    return torch.stack(results, dim=-1)


def mixture_moments(share, mean, variance) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean and variance of position of all heads' pixels together, (batch, K, 2) each, of the heads' shares of the mass
    (batch, heads, K, 1) and of their means and variances (batch, heads, K, 2).
    """
    total_mean = (share * mean).sum(dim=1)
    total_variance = (share * (variance + (mean - total_mean[:, None]).square())).sum(dim=1)
    return total_mean, total_variance


class ClusterFormerCenterAttention(nn.Module):
    """Self-attention among the centres."""

    def __init__(self, config: ClusterFormerConfig):
        super().__init__()
        dim, self.num_heads = config.decoder_hidden_size, config.decoder_attention_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.projection = nn.Linear(dim, dim)

    def forward(self, centers, embeddings, center_mask=None) -> torch.Tensor:
        """Centres and embeddings of their places, (batch, K, dim) each; returns the centres' update."""
        placed = centers + embeddings
        queries, keys = split_heads(self.query(placed), self.num_heads), split_heads(self.key(placed), self.num_heads)
        values = split_heads(self.value(centers), self.num_heads)
        mask = None if center_mask is None else center_mask.to(queries.dtype)
        update = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.projection(update.transpose(1, 2).flatten(2))


class ClusterFormerDecoderLayer(GradientCheckpointingLayer):
    """Clustering of the pixels, self-attention among the centres and a feed-forward network, a norm after each."""

    def __init__(self, config: ClusterFormerConfig):
        super().__init__()
        dim = config.decoder_hidden_size
        self.clustering = ClusterFormerPyramidClustering(config)
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = ClusterFormerCenterAttention(config)
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(dim, config.decoder_ffn_dim)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.decoder_ffn_dim, dim)
        self.norm3 = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(
        self,
        centers,
        center_embeddings,
        mean,
        variance,
        keys,
        values,
        weights,
        geometry,
        center_mask,
        output_assignments,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor] | None]:
        """See [`ClusterFormerPyramidClustering.forward`]; returns the centres in place of their update."""
        update, *moments, assignments = self.clustering(
            centers + center_embeddings,
            mean,
            variance,
            keys,
            values,
            weights,
            geometry,
            center_mask,
            output_assignments,
        )
        centers = self.norm1(centers + update)
        centers = self.norm2(centers + self.attention(centers, center_embeddings, center_mask))
        centers = self.norm3(centers + self.fc2(self.activation(self.fc1(centers))))
        return centers, *moments, assignments


class ClusterFormerBoxDelta(nn.Linear):
    """Last layer of a box head. Starts at zero: the first boxes are the moments."""


class ClusterFormerClassHead(nn.Linear):
    """Class logits for a sigmoid; starts at a probability of 0.01, as focal losses want."""


class ClusterFormerBoxHead(nn.Module):
    """
    The box of a centre: read from the moments of its pixels and refined by an MLP.

    The refinement is added in logit space, which keeps boxes in [0, 1], in steps of the box's own size: small and large
    boxes are refined alike (class-free AP50 .455 against .366 after 250 steps on digit scenes, without the sigmoid).
    After a layer the MLP also sees how the heads' moments differ, as heads come to lie on different parts of an object,
    where their pixels end and where the box was before.
    """

    def __init__(self, config: ClusterFormerConfig, follows_layer: bool):
        super().__init__()
        dim = config.decoder_hidden_size
        self.fc1 = nn.Linear(dim, dim)
        self.parts = nn.Linear(num_relative_features(config), dim, bias=False) if follows_layer else None
        self.fc2 = nn.Linear(dim, dim)
        self.activation = nn.ReLU()
        self.delta = ClusterFormerBoxDelta(dim, 4)

    def forward(self, centers, mean, variance, relative=None) -> torch.Tensor:
        """
        Centres (batch, K, dim), moments (batch, K, 2) and, after a layer, those in relation to them and the edges
        (batch, K, 9 * heads + 8; see [`relative_features`]); returns (batch, K, 4) of cx, cy, w, h in [0, 1].
        """
        hidden = self.fc1(centers)
        if self.parts is not None:
            hidden = hidden + self.parts(relative)
        delta = self.delta(self.activation(self.fc2(self.activation(hidden))))
        base = moments_to_boxes(mean, variance).clamp(1e-3, 1 - 1e-3)
        center, size = base.detach().split(2, dim=-1)
        # To first order a step moves the centre by its share of the size and scales the size by its exponential.
        step = torch.cat([size / (center * (1 - center)).clamp_min(0.02), 1 / (1 - size).clamp_min(0.05)], dim=-1)
        return (base.logit() + step * delta.to(base.dtype)).sigmoid()


def moments_to_boxes(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """The box with these moments if filled evenly: (..., 2) each, rows first -> (..., 4) of cx, cy, w, h."""
    return torch.cat([mean.flip(-1), (12 * variance).sqrt().flip(-1)], dim=-1)


def boxes_to_moments(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of position, (..., 2) each, of evenly filled boxes (..., 4), the extent in its bounds."""
    center, size = boxes.flip(-1).split(2, dim=-1)[::-1]
    return center, (size.square() / 12).clamp(MIN_EXTENT**2, MAX_EXTENT**2)


class ClusterFormerMaskHead(nn.Module):
    """
    The mask of a centre, as its cluster lives in feature and position: its embedding's dot product with every pixel's,
    less a weight of its own times the log of a Student's t in position, which falls off more slowly than a Gaussian
    where a centre has not found its extent yet.
    """

    def __init__(self, config: ClusterFormerConfig):
        super().__init__()
        dim = config.decoder_hidden_size
        self.fc1 = nn.Linear(dim, dim)
        self.fc2 = nn.Linear(dim, dim)
        self.fc3 = nn.Linear(dim, config.mask_feature_size)
        self.spatial_weight = nn.Linear(dim, 1)
        self.activation = nn.ReLU()

    def forward(self, centers, boxes, pixels: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor]):
        """
        Args:
            centers (`torch.Tensor` of shape `(batch, K, dim)`).
            boxes (`torch.Tensor` of shape `(batch, K, 4)`): Of the centres, cx, cy, w, h in [0, 1].
            pixels (`torch.Tensor` of shape `(batch, mask_feature_size, height, width)`).
            positions: Of the pixels' rows, (1 or batch, height), and columns, (1 or batch, width), in [0, 1].

        Returns:
            Logits `(batch, K, height, width)`.
        """
        hidden = self.activation(self.fc2(self.activation(self.fc1(centers))))
        logits = (self.fc3(hidden) @ pixels.flatten(2)).unflatten(2, pixels.shape[-2:])
        mean, variance = boxes_to_moments(boxes)
        rows, columns = (
            (position[:, None] - mean[..., axis, None]).square() / (2 * variance[..., axis, None])
            for axis, position in enumerate(positions)
        )
        distance = (rows[..., None] + columns[..., None, :]).log1p().to(logits.dtype)
        return torch.addcmul(logits, F.softplus(self.spatial_weight(hidden))[..., None], distance, value=-1)


@dataclass
class DecoderOutput:
    """
    Args:
        centers (`tuple[torch.Tensor]`): (batch, K, dim) at the start and after each layer.
        boxes (`tuple[torch.Tensor]`): Of these centres, (batch, K, 4) as cx, cy, w, h in [0, 1].
        assignments (`tuple[tuple[torch.Tensor]]`, *optional*):
            Of each layer and level, (batch, heads, K, height, width).
        surplus (`torch.Tensor` of shape `(batch, K, 1)`, *optional*): True at centres that an image does not have.
        pixels (`torch.Tensor` of shape `(batch, mask_feature_size, height, width)`, *optional*): For masks.
        pixel_positions (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Of their rows and columns, in [0, 1].
        pixel_mask (`torch.Tensor` of shape `(batch, 1, height, width)`, *optional*): The real ones.
    """

    centers: tuple[torch.Tensor, ...]
    boxes: tuple[torch.Tensor, ...]
    assignments: tuple[tuple[torch.Tensor, ...], ...] | None
    surplus: torch.Tensor | None
    pixels: torch.Tensor | None = None
    pixel_positions: tuple[torch.Tensor, torch.Tensor] | None = None
    pixel_mask: torch.Tensor | None = None


class ClusterFormerDecoder(nn.Module):
    """
    Clusters the pixels of the three coarsest stages layer by layer, starting from the encoder's last centres at the
    cells that these were pooled from. A layer starts from the boxes of the layer before.

    With `predict_boxes` these boxes are refined, else they are the moments alone; with `predict_masks` the next finer
    stage gives the pixels that masks are made of.
    """

    num_levels = 3

    def __init__(self, config: ClusterFormerConfig, predict_boxes: bool = False, predict_masks: bool = False):
        super().__init__()
        dim, heads = config.decoder_hidden_size, config.decoder_attention_heads
        if dim % heads != 0 or dim % 4 != 0:
            raise ValueError(
                f"`decoder_hidden_size={dim}` must be a multiple of `decoder_attention_heads={heads}`, and of 4 for "
                "the sines and cosines of rows and columns."
            )
        if config.clustering != "recurrent":
            raise ValueError(
                f"Detection and segmentation need clustering='recurrent', got {config.clustering!r}: the centres of "
                "the released forms have no place in the image to start from."
            )
        if config.num_stages < self.num_levels + predict_masks:
            raise ValueError(
                f"The decoder needs {self.num_levels + predict_masks} stages, and `depths={config.depths}` has "
                f"{config.num_stages}."
            )
        self.config = config
        self.pyramid = ClusterFormerFeaturePyramid(config, config.stage_names[-self.num_levels :])
        self.pixel_embeddings = None
        if predict_masks:
            self.pixel_embeddings = ClusterFormerPixelEmbeddings(config, config.hidden_sizes[-self.num_levels - 1])
        self.embeddings = ClusterFormerPyramidEmbeddings(config, self.num_levels)
        self.pixel_projections = ClusterFormerPixelProjections(config)
        self.center_norm = nn.LayerNorm(config.hidden_sizes[-1], eps=config.layer_norm_eps)
        self.center_projection = nn.Linear(config.hidden_sizes[-1], dim)
        self.place_fc1 = nn.Linear(4, dim)
        self.place_fc2 = nn.Linear(dim, dim)
        self.activation = ACT2FN[config.hidden_act]
        self.layers = nn.ModuleList(ClusterFormerDecoderLayer(config) for _ in range(config.decoder_layers))
        num_heads = config.decoder_layers + 1 if predict_boxes else 0
        self.box_heads = nn.ModuleList(ClusterFormerBoxHead(config, follows_layer=i > 0) for i in range(num_heads))

    def forward(
        self, hidden_states, cluster_centers, sizes: torch.Tensor | None, output_assignments: bool = False
    ) -> DecoderOutput:
        """
        Args:
            hidden_states (`tuple[torch.Tensor]`): The encoder's maps (batch, channels, height, width), finest first.
            cluster_centers (`torch.Tensor` of shape `(batch, K, channels)`): The encoder's last centres.
            sizes (`torch.Tensor` of shape `(batch, 2)`, *optional*): Real height and width of padded images.
            output_assignments (`bool`): Whether to return the assignments, which are large.
        """
        num_maps = self.num_levels if self.pixel_embeddings is None else self.num_levels + 1
        maps, geometries = hidden_states[-num_maps:], self.level_geometries(hidden_states[-num_maps:], sizes)
        of_levels = slice(-self.num_levels, None)
        levels = self.pyramid(maps[of_levels], [geometry.mask for geometry in geometries[of_levels]])
        for_masks = {}
        if self.pixel_embeddings is not None:
            grid = geometries[0]
            for_masks["pixels"] = self.pixel_embeddings(maps[0], levels[0], grid.mask)
            for_masks["pixel_positions"] = grid.positions(sampled=False)
            for_masks["pixel_mask"] = None if grid.mask is None else grid.mask.permute(0, 3, 1, 2)

        geometry, start = PyramidGeometry(geometries[of_levels]), geometries[-1]
        features = torch.cat([level.flatten(2).mT for level in levels], dim=1)
        keys, values, weights_of_layers = self.pixel_projections(features, self.embeddings(geometry), geometry)
        centers = self.center_projection(self.center_norm(cluster_centers))
        mean, variance = (tensor[:, 0].expand(centers.shape[0], -1, -1) for tensor in (start.mean, start.variance))
        all_centers, all_boxes, all_assignments = (centers,), (self.read_boxes(0, centers, mean, variance),), ()
        for i, (layer, weights) in enumerate(zip(self.layers, weights_of_layers)):
            place = all_boxes[-1].detach()
            mean, variance = boxes_to_moments(place)
            place_embeddings = self.place_fc2(self.activation(self.place_fc1(place.to(centers.dtype))))
            centers, mean, variance, relative, assignments = layer(
                centers,
                place_embeddings,
                mean,
                variance,
                keys,
                values,
                weights,
                geometry,
                start.center_mask,
                output_assignments,
            )
            all_centers += (centers,)
            all_boxes += (self.read_boxes(i + 1, centers, mean, variance, relative),)
            if output_assignments:
                sizes = geometry.map_sizes
                all_assignments += (tuple(level.mT.unflatten(3, size) for level, size in zip(assignments, sizes)),)
        surplus = None if start.center_mask is None else start.center_mask[:, 0].mT != 0
        all_assignments = all_assignments if output_assignments else None
        return DecoderOutput(all_centers, all_boxes, all_assignments, surplus, **for_masks)

    def level_geometries(self, maps: tuple[torch.Tensor, ...], sizes: torch.Tensor | None) -> list[StageGeometry]:
        """Positions and padding of each map and, of the last, the cells of the centres."""
        geometries = []
        for stage_idx, features in enumerate(maps, start=self.config.num_stages - len(maps)):
            stride = self.config.patch_size * 2**stage_idx
            level_sizes = None if sizes is None else -(-sizes // stride)
            grid, ratio = as_pair(self.config.center_grid[stage_idx]), self.config.sr_ratios[stage_idx]
            geometries.append(stage_geometry(features.shape[-2:], grid, ratio, level_sizes, features))
        return geometries

    def read_boxes(self, i: int, centers, *moments) -> torch.Tensor:
        return self.box_heads[i](centers, *moments) if self.box_heads else moments_to_boxes(*moments[:2])
