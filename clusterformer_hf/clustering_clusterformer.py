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
"""The mathematics of ClusterFormer: recurrent cross-attention clustering and feature dispatching.

[`ClusterFormerRecurrentClustering`] is the paper's Eq. 3, 5 and 6 with clusters that live in feature and position.
[`ClusterFormerReleasedClustering`] is the authors' released code, for converted checkpoints.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.utils.generic import maybe_autocast

from .configuration_clusterformer import ClusterFormerConfig, as_pair
from .kernels_clusterformer import MAX_EXTENT, MIN_EXTENT, MIN_MASS, MIN_NORM, can_cluster, cluster


# Elements of the groups that a released form clusters at a time on the CPU.
GROUP_CHUNK = 2**19
# Elements of the (N, K) tables of the heads that are clustered at a time on the CPU, and of those that are kept for the
# backward pass at most.
HEAD_CHUNK = 2**21
# How far a pixel's logits may differ: its shares by a factor of 2e-22. With pixels' weights and gradients they stay in
# the range of float32.
LOGIT_RANGE = 50


def runs_eagerly_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether the fastest way for a CPU may be chosen by the sizes, which a compiled or exported graph must not do."""
    return tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def gaussian_tables(place, positions, spatial_weight) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The logs of the centres' Gaussians along the rows and along the columns of a map: at a pixel their sum. The Gaussian
    is separable, and two tables are exact where its expansion in moments cancels.

    Args:
        place (`tuple[torch.Tensor, torch.Tensor]`):
            Mean and variance of each centre's position, `(batch, heads, 2, K)`, rows first.
        positions (`tuple[torch.Tensor, torch.Tensor]`):
            Positions of the rows (1 or batch, height) and of the columns (1 or batch, width).
        spatial_weight (`torch.Tensor` of shape `(heads, 1, 1)` or `None`):
            How much position counts beside features; `None` leaves it out.

    Returns:
        `(1 or batch, 1 or heads, height, K)` and `(1 or batch, 1 or heads, width, K)`.
    """
    mean, variance = place
    weight = torch.zeros_like(variance) if spatial_weight is None else -0.5 * spatial_weight / variance
    rows, columns = (
        (position[:, None, :, None] - mean[:, :, axis, None]).square() * weight[:, :, axis, None]
        for axis, position in enumerate(positions)
    )
    return rows, columns


def expectation(keys, queries, tables, center_mask=None, weights=None) -> torch.Tensor:
    """
    E-step: every pixel distributes itself over the centres by feature and position.

    Args:
        keys (`torch.Tensor` of shape `(batch, heads, height * width, d)`): Pixel features.
        queries (`torch.Tensor` of shape `(batch, heads, K, d)`): Centre features, scaled by the temperature.
        tables (`tuple[torch.Tensor, torch.Tensor]`): See [`gaussian_tables`].
        center_mask (`torch.Tensor` of shape `(batch, 1, 1, K)`, *optional*): 0 at centres, -inf at surplus ones.
        weights (`torch.Tensor` of shape `(batch, 1 or heads, height * width, 1)`, *optional*):
            How much a pixel counts, 1 if not given; a boolean mask of the real pixels, or weights in [0, 1].

    Returns:
        `torch.Tensor` of shape `(batch, heads, height * width, K)` that sums to a pixel's weight over K.
    """
    rows, columns = tables if center_mask is None else (tables[0] + center_mask, tables[1])
    rows, columns = (table.expand(*keys.shape[:2], -1, -1) for table in (rows, columns))
    gaussian = (rows[:, :, :, None] + columns[:, :, None]).flatten(2, 3).flatten(0, 1)
    # In place where that is possible: fresh memory for every table costs the CPU as much as the product.
    keeps_tables = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    out = None if keeps_tables else gaussian
    logits = torch.baddbmm(gaussian, keys.flatten(0, 1), queries.flatten(0, 1).mT, out=out)
    if not keeps_tables and keys.device.type == "cpu":
        limit_range(logits.unflatten(0, keys.shape[:2]), center_mask)
        out = None  # a CPU's softmax takes up to twice as long in place
    assignments = torch.softmax(logits, dim=-1, out=out).unflatten(0, keys.shape[:2])
    weighted = None if keeps_tables else assignments
    return assignments if weights is None else torch.mul(assignments, weights.to(assignments.dtype), out=weighted)


def limit_range(logits: torch.Tensor, center_mask: torch.Tensor | None):
    """
    Raises the logits (batch, heads, N, K) that are far below their pixel's largest, but those of surplus centres. If
    exponentials leave the range of float32, a CPU takes three times as long for all of a table.
    """
    torch.maximum(logits, logits.amax(dim=-1, keepdim=True) - LOGIT_RANGE, out=logits)
    if center_mask is not None:
        logits.masked_fill_(center_mask != 0, float("-inf"))


def sum_assigned(assignments, values, map_size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The sums over pixels that an M-step needs, under assignments (batch, heads, height * width, K): of the values,
    (batch, heads, K, d), and of the assignments of each row, (batch, heads, height, K), and column, (batch, heads,
    width, K).
    """
    grid = assignments.unflatten(2, map_size)
    return assignments.mT @ values, grid.sum(dim=3), grid.sum(dim=2)


class UnitVectors(torch.autograd.Function):
    """
    `F.normalize` over the last dimension, with a gradient that passes over the memory four times instead of nine: a
    detector's training step takes 0.94 of the time on a CPU.
    """

    @staticmethod
    def forward(ctx, vectors):
        norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(MIN_NORM)
        units = vectors / norm
        ctx.save_for_backward(units, norm)
        return units

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        units, norm = ctx.saved_tensors
        along = (gradient * units).sum(dim=-1, keepdim=True)
        return gradient.addcmul(units, along, value=-1).div_(norm)


def unit_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (..., d) divided by their norms."""
    return UnitVectors.apply(vectors) if runs_eagerly_on_cpu(vectors) else F.normalize(vectors, dim=-1)


class ClusterSums(torch.autograd.Function):
    """
    [`sum_assigned`] of [`expectation`]. The backward pass computes the assignments again, some heads at a time: the (N,
    K) tables of all layers and iterations would be a third of the memory of training. Small ones, no larger than the
    keys and values, are kept: a small detector's training step takes 0.92 of the time.
    """

    @staticmethod
    def forward(ctx, keys, values, queries, rows, columns, center_mask, weights):
        inputs, assignments = (keys, values, queries, rows, columns, center_mask, weights), None
        num_centers, head_dim = queries.shape[2:]
        if num_centers <= 2 * head_dim and keys[..., 0].numel() * num_centers <= HEAD_CHUNK:
            assignments = expectation(keys, queries, (rows, columns), center_mask, weights)
        ctx.save_for_backward(*inputs, assignments)
        parts = zip(*(ClusterSums.forward_of_heads(*chunk) for chunk in in_chunks(*inputs, assignments)))
        return tuple(join_heads(part) for part in parts)

    @staticmethod
    def forward_of_heads(keys, values, queries, rows, columns, center_mask, weights, assignments=None):
        if assignments is None:
            assignments = expectation(keys, queries, (rows, columns), center_mask, weights)
        return sum_assigned(assignments, values, (rows.shape[2], columns.shape[2]))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        chunks = in_chunks(*ctx.saved_tensors, *gradients)
        parts = zip(*(ClusterSums.backward_of_heads(*chunk) for chunk in chunks))
        *of_inputs, of_weights = (join_heads(part) for part in parts)
        return *of_inputs, None, of_weights if ctx.needs_input_grad[-1] else None

    @staticmethod
    def backward_of_heads(
        keys, values, queries, rows, columns, center_mask, weights, assignments, of_sums, of_rows, of_columns
    ):
        shape = keys.shape[:2]
        if assignments is None:
            assignments = expectation(keys, queries, (rows, columns), center_mask, weights)
        assignments, of_sums = assignments.flatten(0, 1), of_sums.flatten(0, 1)
        gradient = (of_rows[:, :, :, None] + of_columns[:, :, None]).flatten(2, 3).flatten(0, 1)
        gradient.baddbmm_(values.flatten(0, 1), of_sums.mT).mul_(assignments)
        of_weights = gradient.sum(dim=-1, keepdim=True)
        if weights is not None:
            weights = weights.to(keys.dtype).expand(*shape, -1, -1).flatten(0, 1)
            # Of a weight too small for this, as at padded pixels, the gradient is lost; a sigmoid's or a mask's is 0.
            of_weights /= weights.clamp_min(torch.finfo(weights.dtype).tiny)
        gradient.addcmul_(assignments, of_weights, value=-1)  # of the logits, by the softmax
        of_values = assignments @ of_sums
        grid = gradient.unflatten(0, shape).unflatten(2, (rows.shape[2], columns.shape[2]))
        of_keys, of_queries = gradient @ queries.flatten(0, 1), gradient.mT @ keys.flatten(0, 1)
        of_keys, of_values, of_queries, of_weights = (
            tensor.unflatten(0, shape) for tensor in (of_keys, of_values, of_queries, of_weights)
        )
        return of_keys, of_values, of_queries, grid.sum(dim=3), grid.sum(dim=2), of_weights


def in_chunks(keys, *tensors) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """Splits (batch, heads, ...) by heads, on the CPU into so many that their (N, K) tables stay in the cache."""
    num_heads, elements = keys.shape[1], keys.shape[0] * keys.shape[2] * tensors[1].shape[2]
    size = min(max(HEAD_CHUNK // max(elements, 1), 1), num_heads) if keys.device.type == "cpu" else num_heads
    for start in range(0, num_heads, size):
        yield tuple(
            tensor if tensor is None or tensor.shape[1] != num_heads else tensor[:, start : start + size]
            for tensor in (keys, *tensors)
        )


def join_heads(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def sum_pixels(
    keys, values, queries, tables, center_mask=None, weights=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    E-step and the sums of the M-step behind it: arguments of [`expectation`], results of [`sum_assigned`]. Weights that
    are learned are given for each head.
    """
    rows, columns = (table.expand(*keys.shape[:2], -1, -1) for table in tables)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return ClusterSums.forward_of_heads(keys, values, queries, rows, columns, center_mask, weights)
    return ClusterSums.apply(keys, values, queries, rows, columns, center_mask, weights)


def maximization(sums, positions, pixel_extent) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    M-step: features, places and extents become the means of their pixels.

    Args:
        sums (`tuple[torch.Tensor, torch.Tensor, torch.Tensor]`): See [`sum_assigned`].
        positions: See [`gaussian_tables`].
        pixel_extent (`torch.Tensor` of shape `(1 or batch, 2)`):
            Height and width of a pixel. A pixel is a square, no point: its own variance, a twelfth of its squared side,
            is part of a cluster's, so that n pixels in a row have the variance of a bar n pixels long.

    Returns:
        Centres (batch, heads, K, d), means and variances of their positions (batch, heads, 2, K).
    """
    values, *marginals = sums
    mass = marginals[0].sum(dim=2, keepdim=True).clamp_min(MIN_MASS)
    means, squares = [], []
    for marginal, position in zip(marginals, positions):
        position = position[:, None, :, None]
        means.append((marginal * position).sum(dim=2, keepdim=True) / mass)
        squares.append((marginal * (position - means[-1]).square()).sum(dim=2, keepdim=True))
    own = pixel_extent.square()[:, None, :, None] / 12
    variance = torch.addcdiv(own, torch.cat(squares, dim=2), mass).clamp(MIN_EXTENT**2, MAX_EXTENT**2)
    return values / mass.mT, torch.cat(means, dim=2), variance


def split_heads(features: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(batch, N, heads * d) -> (batch, heads, N, d), a view."""
    return features.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class StageGeometry:
    """
    Where the pixels and the first centres of one stage lie, in [0, 1] along each side of an image's real area. Computed
    once a stage and shared by its blocks.

    Args:
        map_size (`tuple[int, int]`): Height and width of the feature map.
        center_grid (`tuple[int, int]`): Rows and columns of first centres, capped by the sampled map.
        sr_ratio (`int`): Side of the cells that the map is averaged over before clustering.
        sizes (`torch.Tensor` of shape `(batch, 2)`, *optional*):
            Height and width of each image's real area on this map, where the batch is padded.
        dtype (`torch.dtype`): Of the features; positions are in float32 or better.
        device (`torch.device`): Of the features.
    """

    def __init__(self, map_size, center_grid, sr_ratio, sizes, dtype, device):
        self.map_size, self.ratio = tuple(map_size), sr_ratio
        self.sample_size = tuple((side - 1) // sr_ratio + 1 for side in map_size)
        self.mask = pixel_mask_from_sizes(sizes, self.map_size)
        features_dtype, dtype = dtype, torch.promote_types(dtype, torch.float32)
        self.sizes = torch.tensor([self.map_size], device=device) if sizes is None else sizes
        self.sample_extent = sr_ratio / self.sizes.to(dtype)
        sample_sizes = -(-self.sizes // sr_ratio)
        self.sample_mask = None if sizes is None else pixel_mask_from_sizes(sample_sizes, self.sample_size)

        grid = tuple(min(entry, side) for entry, side in zip(center_grid, self.sample_size))
        grid_sizes = sample_sizes.clamp(max=torch.tensor(grid, device=device))
        bins = [torch.arange(length, device=device)[None] for length in grid]
        counts = grid_sizes.unsqueeze(-1).unbind(dim=1)
        self.mean = grid_of_pairs(*((index + 0.5).to(dtype) / count for index, count in zip(bins, counts)))[:, None]
        variance = (0.5 / grid_sizes.to(dtype)).square().clamp(MIN_EXTENT**2, MAX_EXTENT**2)
        self.variance = variance[:, None, None].expand_as(self.mean)  # (1 or batch, 1, K, 2), as the means
        self.num_centers = grid_sizes.prod(dim=-1).to(dtype)[:, None, None, None]
        self.center_mask = None
        if sizes is not None:
            valid = grid_of_pairs(*(index < count for index, count in zip(bins, counts))).all(dim=-1)[:, None, None]
            self.center_mask = torch.zeros_like(valid, dtype=dtype).masked_fill(~valid, float("-inf"))
        self.pooling = [
            averaging_matrix(
                bins[axis], counts[axis], sample_sizes[:, axis, None], self.sample_size[axis], features_dtype
            )
            for axis in range(2)
        ]
        self.dtype = dtype
        self.sample_positions = self.positions(sampled=True)
        # As the kernels take them.
        self.sample_pixels = pixels_of_map(self.sample_positions, self.sample_extent)
        self.sample_weights = None if sizes is None else self.sample_mask.flatten(1)[:, None].to(dtype)
        self.center_bias = None if sizes is None else self.center_mask.flatten(1)
        self.place = torch.cat([self.mean, self.variance], dim=-1).mT.contiguous()

    def sample(self, features: torch.Tensor) -> torch.Tensor:
        """Averages (batch, height, width, channels) over the real pixels of each `sr_ratio`-sided cell."""
        if self.ratio == 1:
            return features
        pool = {"kernel_size": self.ratio, "ceil_mode": True, "count_include_pad": False}
        features = features if self.mask is None else features * self.mask.to(features.dtype)
        sampled = F.avg_pool2d(features.permute(0, 3, 1, 2), **pool).permute(0, 2, 3, 1)
        if self.mask is not None:
            share = F.avg_pool2d(self.mask.to(features.dtype).permute(0, 3, 1, 2), **pool).permute(0, 2, 3, 1)
            sampled = sampled / share.clamp_min(torch.finfo(share.dtype).tiny)
        return sampled

    def pool(self, sample: torch.Tensor) -> torch.Tensor:
        """Adaptive average pooling of the sampled map to the centre grid: (batch, K, channels)."""
        rows, columns = (matrix.to(sample.dtype) for matrix in self.pooling)
        batch_size, height, width, channels = sample.shape
        sample = (rows @ sample.flatten(2)).reshape(batch_size, rows.shape[1], width, channels)
        return (columns[:, None] @ sample).flatten(1, 2)

    def positions(self, sampled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the (sampled) map's rows, (1 or batch, height), and columns, (1 or batch, width)."""
        side, step = (self.sample_size, self.ratio) if sampled else (self.map_size, 1)
        sizes = self.sizes.to(self.dtype)
        positions = []
        for axis in range(2):
            start = torch.arange(side[axis], device=sizes.device, dtype=self.dtype)[None] * step
            size = sizes[:, axis, None]
            # A cell at the border of an image is smaller: its place is the mean of its own pixels.
            positions.append((start + torch.minimum(start + step, size)) / (2 * size))
        return tuple(positions)


def stage_geometry(map_size, center_grid, sr_ratio, sizes, features) -> StageGeometry:
    """The geometry of features; without padding it is a constant of the map's size, and kept."""
    arguments = tuple(map_size), center_grid, sr_ratio, sizes, features.dtype, features.device
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(features) is not torch.Tensor
    return StageGeometry(*arguments) if is_traced or sizes is not None else kept_geometry(*arguments)


@lru_cache(maxsize=64)
def kept_geometry(*arguments) -> StageGeometry:
    with torch.inference_mode(False), torch.no_grad():  # or training could not use what inference has made
        return StageGeometry(*arguments)


def pixels_of_map(positions, pixel_extent) -> torch.Tensor:
    """
    Row and column of each pixel, and its own variance along both (see [`maximization`]), (1 or batch, 4, N), of the
    positions of rows and columns and of the extent of a pixel.
    """
    rows, columns = positions
    shape = (rows.shape[0], rows.shape[1], columns.shape[1])
    own = (pixel_extent.square() / 12)[:, :, None, None].expand(-1, -1, *shape[1:])
    grid = torch.stack([rows[:, :, None].expand(shape), columns[:, None].expand(shape)], dim=1)
    return torch.cat([grid, own], dim=1).flatten(2)


def averaging_matrix(bins, count, side, length, dtype) -> torch.Tensor:
    """Rows of adaptive average pooling: (1 or batch, bins, length), `count` bins over the first `side` pixels."""
    start, end = bins * side // count, -(-(bins + 1) * side // count)
    pixels = torch.arange(length, device=bins.device)
    inside = (pixels >= start[..., None]) & (pixels < end[..., None]) & (bins < count)[..., None]
    return inside.to(dtype) / (end - start)[..., None]


def grid_of_pairs(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """All (row, column) pairs of (batch, R) and (batch, C), row by row: (batch, R * C, 2)."""
    shape = (max(rows.shape[0], columns.shape[0]), rows.shape[1], columns.shape[1])
    return torch.stack([rows[:, :, None].expand(shape), columns[:, None].expand(shape)], dim=-1).flatten(1, 2)


def pixel_mask_from_sizes(sizes: torch.Tensor | None, map_size: tuple[int, int]) -> torch.Tensor | None:
    """Boolean (batch, height, width, 1), true on each image's own area in the top left; `None` for `None`."""
    if sizes is None:
        return None
    rows, columns = (
        torch.arange(side, device=sizes.device)[None] < sizes[:, axis, None] for axis, side in enumerate(map_size)
    )
    return (rows[:, :, None] & columns[:, None])[..., None]


class ClusterFormerQuery(nn.Linear):
    """Centres to queries, in the centres' dtype, which may exceed the weights'."""

    def forward(self, centers: torch.Tensor) -> torch.Tensor:
        return F.linear(centers, self.weight.to(centers.dtype), self.bias.to(centers.dtype))


def takes_kernels(keys: torch.Tensor, num_centers: int, query: ClusterFormerQuery) -> bool:
    """
    Whether pixels (batch, N, ..., d) are clustered in kernels. These read the weights of the query projection: where it
    is offloaded, quantised or has an adapter, the plain path calls it.
    """
    is_plain = type(query) is ClusterFormerQuery and query.weight.device == keys.device
    return is_plain and can_cluster(keys, num_centers)


class ClusterFormerRecurrentClustering(nn.Module):
    """
    Recurrent cross-attention clustering and feature dispatching (Eq. 3, 5 and 6), for each head on its own channels.

    A cluster has a feature, a place and an extent: the E-step adds the log of a Gaussian in position to the scaled
    cosine of query and key, the M-step re-estimates all three and divides by the centre's mass. With dot-product logits
    and no position the loop is known to collapse to identical centres.
    """

    def __init__(self, config: ClusterFormerConfig, stage_idx: int):
        super().__init__()
        dim, self.num_heads = config.hidden_sizes[stage_idx], config.num_attention_heads[stage_idx]
        head_dim = config.head_dims[stage_idx]
        self.num_iterations = config.num_iterations
        self.center_fc1 = nn.Linear(head_dim, head_dim)  # Eq. 5, shared by the heads
        self.center_fc2 = nn.Linear(head_dim, head_dim)
        self.activation = nn.GELU()
        self.query = ClusterFormerQuery(head_dim, head_dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.projection = nn.Linear(dim, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(self.num_heads, 1, 1))  # log of the temperature
        self.spatial_weight = nn.Parameter(torch.empty(self.num_heads, 1, 1)) if config.spatial_clustering else None

    def forward(
        self,
        features: torch.Tensor,
        geometry: StageGeometry,
        output_assignments: bool = False,
        output_sample_assignments: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            features (`torch.Tensor` of shape `(batch, height, width, dim)`): Normed feature map.
            geometry (`StageGeometry`): Positions, pooling and masks of the stage.
            output_assignments, output_sample_assignments (`bool`): Whether to return them.

        Returns:
            The update of the map, in its shape, and the assignments (batch, heads, N, K) of its pixels and of those of
            its sample to the final clusters.
        """
        clusters = self.cluster(features, geometry)
        assignments = self.assign(features, clusters, geometry, sampled=False) if output_assignments else None
        sample_assignments = None
        if output_sample_assignments:
            is_whole = output_assignments and geometry.ratio == 1
            sample_assignments = assignments if is_whole else self.assign(features, clusters, geometry, sampled=True)
        return self.dispatch(features, clusters[0], geometry), assignments, sample_assignments

    def cluster(self, features, geometry) -> tuple[torch.Tensor, ...]:
        """
        Centres from the pooled map (Eq. 5), then T E- and M-steps on its sample (Eq. 3): the final centres (batch,
        heads, K, d), means and variances (batch, heads, 2, K) of their positions in [0, 1].
        """
        sample = geometry.sample(features)
        keys_values = self.key_value(sample.flatten(1, 2)).unflatten(-1, (2, self.num_heads, -1))
        centers = split_heads(geometry.pool(sample), self.num_heads).contiguous()
        centers = centers + self.center_fc2(self.activation(self.center_fc1(centers)))

        with maybe_autocast(features.device.type, enabled=False):
            if self.num_iterations > 0 and takes_kernels(keys_values, centers.shape[2], self.query):
                return self.cluster_in_kernels(keys_values, centers, geometry)
            # Contiguous, or the products of every iteration would copy them again.
            keys, values = keys_values.to(geometry.dtype).permute(2, 0, 3, 1, 4).contiguous().unbind()
            keys, weights = unit_vectors(keys), self.expectation_weights(geometry.dtype)
            clusters = centers.to(geometry.dtype), geometry.mean.mT, geometry.variance.mT
            for _ in range(self.num_iterations):
                sums = sum_pixels(keys, values, *self.expectation_inputs(clusters, weights, geometry, sampled=True))
                clusters = maximization(sums, geometry.sample_positions, geometry.sample_extent)
        return clusters

    def cluster_in_kernels(self, keys_values, centers, geometry) -> tuple[torch.Tensor, ...]:
        """The T E- and M-steps of `cluster` for pixels (batch, N, 2, heads, d)."""
        centers, place, *_ = cluster(
            *keys_values.unbind(dim=2),
            centers.contiguous(),
            geometry.place,
            self.query.weight,
            self.query.bias,
            self.logit_scale,
            self.spatial_weight,
            geometry.sample_pixels,
            geometry.sample_weights,
            geometry.center_bias,
            self.num_iterations,
        )
        return centers, *place.chunk(2, dim=2)

    def expectation_weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Temperature and spatial weight in the E-step's dtype, the same in all iterations."""
        spatial_weight = None if self.spatial_weight is None else F.softplus(self.spatial_weight.to(dtype))
        return self.logit_scale.to(dtype).exp(), spatial_weight

    def expectation_inputs(self, clusters, weights, geometry, sampled: bool) -> tuple:
        """What [`expectation`] takes beside the keys: queries, tables and the masks of centres and of pixels."""
        (centers, *place), (temperature, spatial_weight) = clusters, weights
        queries = self.query(centers)
        queries = queries * (temperature / torch.linalg.vector_norm(queries, dim=-1, keepdim=True).clamp_min(MIN_NORM))
        positions = geometry.sample_positions if sampled else geometry.positions(sampled=False)
        tables = gaussian_tables(place, positions, spatial_weight)
        mask = geometry.sample_mask if sampled else geometry.mask
        return queries, tables, geometry.center_mask, None if mask is None else mask.flatten(1, 2)[:, None]

    def assign(self, features, clusters, geometry: StageGeometry, sampled: bool) -> torch.Tensor:
        """One E-step of the (sampled) map with the given clusters: (batch, heads, N, K), zero at padded pixels."""
        features = geometry.sample(features) if sampled else features
        keys = self.key_value(features.flatten(1, 2)).chunk(2, dim=-1)[0]
        with maybe_autocast(features.device.type, enabled=False):
            keys = unit_vectors(split_heads(keys, self.num_heads).to(geometry.dtype))
            weights = self.expectation_weights(geometry.dtype)
            return expectation(keys, *self.expectation_inputs(clusters, weights, geometry, sampled))

    def dispatch(self, features: torch.Tensor, centers: torch.Tensor, geometry: StageGeometry) -> torch.Tensor:
        """
        Eq. 6 and the output projection. The sum over the centres is bilinear in pixel and centres, so it is one (d, d)
        matrix a head: no (N, K) similarities.
        """
        directions = F.normalize(centers, dim=-1)
        if geometry.center_mask is not None:
            directions = directions * (geometry.center_mask.mT == 0).to(centers.dtype)
        mixing = (directions.mT @ centers / geometry.num_centers).to(features.dtype)
        pixels = unit_vectors(features.unflatten(-1, (self.num_heads, -1))).flatten(1, 2)
        if pixels.shape[1] > features.shape[-1]:
            # Many pixels: project the heads' matrices, side by side on a diagonal, and pass over the pixels once.
            diagonal = torch.eye(self.num_heads, device=mixing.device, dtype=mixing.dtype)[:, None, :, None]
            update = pixels.flatten(2) @ self.projection((mixing[:, :, :, None] * diagonal).flatten(3).flatten(1, 2))
        else:
            update = self.projection((pixels.transpose(1, 2) @ mixing).transpose(1, 2).flatten(2))
        return update.unflatten(1, features.shape[1:3])


class ClusterFormerReleasedQuery(nn.Conv2d):
    """A 1x1 convolution, computed as one product for each group."""

    def __init__(self, head_dim: int):
        super().__init__(head_dim, head_dim, kernel_size=1)

    def forward(self, centers: torch.Tensor) -> torch.Tensor:
        """(groups, d, K) in the same shape."""
        weight = self.weight.flatten(1).expand(len(centers), -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, centers)


class ClusterFormerReleasedClustering(nn.Module):
    """
    The token mixer of the authors' released code, in its October 2023 (`release`) and November 2023 (`release_flash`)
    forms. Both regroup memory rather than space: reshapes without the transpose that their names suggest, which trained
    weights depend on. Computed without any tensor of shape (groups, K, N, d).

    The regrouping makes many centres parallel, so that rounding alone decides between them. In float64, in which the
    two are compared, the operations therefore keep the released code's order, which chooses the same centres on the
    same machine; in other dtypes they take the order that runs along the memory.
    """

    def __init__(self, config: ClusterFormerConfig, stage_idx: int):
        super().__init__()
        dim, self.num_heads = config.hidden_sizes[stage_idx], config.num_attention_heads[stage_idx]
        head_dim = config.head_dims[stage_idx]
        self.flash = config.clustering == "release_flash"
        self.num_iterations = config.num_iterations
        self.center_grid = as_pair(config.center_grid[stage_idx])
        self.windows = as_pair(config.window_grid[stage_idx])
        self.point = nn.Conv2d(dim, self.num_heads * head_dim, kernel_size=1)
        self.key = nn.Conv2d(dim, self.num_heads * head_dim, kernel_size=1)
        self.value = nn.Conv2d(dim, self.num_heads * head_dim, kernel_size=1)
        self.query = ClusterFormerReleasedQuery(head_dim)  # without effect in `release_flash`
        self.projection = nn.Conv2d(self.num_heads * head_dim, dim, kernel_size=1)
        self.sim_alpha = nn.Parameter(torch.ones(1))
        self.sim_beta = nn.Parameter(torch.zeros(1))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            features (`torch.Tensor` of shape `(batch, dim, height, width)`): Normed feature map.

        Returns:
            The update of the map, in its shape, and the index of each pixel's centre, (batch, heads, height, width).
        """
        batch_size, _, height, width = features.shape
        grouped = [self.group(layer(features)) for layer in (self.point, self.key, self.value)]
        if runs_eagerly_on_cpu(features):
            pooling = self.pooling_matrix(grouped[0])
            chunks = zip(*(tensor.split(self.groups_at_a_time(tensor)) for tensor in grouped))
            parts = [self.cluster_and_dispatch(*chunk, pooling) for chunk in chunks]
            update, nearest = (torch.cat(part) for part in zip(*parts))
        else:
            update, nearest = self.cluster_and_dispatch(*grouped)
        update = update.reshape(batch_size, -1, height, width)
        return self.projection(update), nearest.reshape(batch_size, self.num_heads, height, width)

    def groups_at_a_time(self, grouped: torch.Tensor) -> int:
        """So many that their centres and assignments stay in the cache; the heads of `release_flash` stay together."""
        head_dim, num_pixels = grouped.shape[1], grouped.shape[2] * grouped.shape[3]
        num_centers = self.center_grid[0] * self.center_grid[1]
        elements = num_centers * head_dim + num_centers * num_pixels + num_pixels * head_dim
        return max(GROUP_CHUNK // (elements * self.num_heads), 1) * self.num_heads

    def pooling_matrix(self, grouped: torch.Tensor) -> torch.Tensor | None:
        """
        The adaptive average pooling of a map to a grid that is no smaller as a matrix, (K, height * width): the same
        bit by bit, since its cells are means of 1, 2 or 4 pixels, and 20 times as fast. `None` for larger maps.
        """
        sides = grouped.shape[2:]
        if any(side > entry for side, entry in zip(sides, self.center_grid)):
            return None
        rows, columns = (
            averaging_matrix(torch.arange(entry, device=grouped.device)[None], entry, side, side, grouped.dtype)[0]
            for side, entry in zip(sides, self.center_grid)
        )
        return torch.kron(rows, columns)

    def pool(self, features: torch.Tensor, pooling: torch.Tensor | None) -> torch.Tensor:
        """(groups, d, height, width) -> (groups, d, K)."""
        if pooling is None:
            return F.adaptive_avg_pool2d(features, self.center_grid).flatten(2)
        return F.linear(features.flatten(2), pooling)

    def cluster_and_dispatch(self, points, keys, values, pooling=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(groups, d, height, width) each; the update (groups, N, d) and the index of the centre (groups, N)."""
        num_groups, head_dim = points.shape[:2]
        center_features = self.pool(values, pooling).reshape(num_groups, -1, head_dim)
        keys, values = keys.reshape(num_groups, -1, head_dim), values.reshape(num_groups, -1, head_dim)
        centers = (self.attend if self.flash else self.recur)(points, keys, values, pooling)
        similarity, nearest = self.nearest_center(centers, points.flatten(2))
        return aggregate_and_dispatch(similarity, nearest, values, center_features), nearest

    def group(self, features: torch.Tensor) -> torch.Tensor:
        """(batch, heads * d, height, width) -> (groups, d, height / rows, width / columns), in memory order."""
        batch_size, channels, height, width = features.shape
        rows, columns = self.windows if min(self.windows) > 1 else (1, 1)
        num_groups = batch_size * self.num_heads * rows * columns
        return features.reshape(num_groups, channels // self.num_heads, height // rows, width // columns)

    def recur(self, points, keys, values, pooling) -> torch.Tensor:
        """T times softmax over the centres of query-key products, unscaled; the M-step does not divide by the mass."""
        if self.num_iterations == 0:  # asked for by `cluster_iterations` only
            return self.pool(points, pooling)
        num_groups, head_dim = points.shape[:2]
        if keeps_released_order(points) or pooling is None:
            queries = self.query(self.pool(points, pooling))
        else:  # fewer pixels than centres: project these
            queries = self.pool(self.query(points.flatten(2)), pooling)
        centers = None
        for _ in range(self.num_iterations):
            queries = queries if centers is None else self.query(centers)
            queries = queries.reshape(num_groups, -1, head_dim)
            if keeps_released_order(points):
                assignments = (queries @ keys.mT).softmax(dim=-2)
            else:
                assignments = (keys @ queries.mT).softmax(dim=-1).mT
            centers = (assignments @ values).reshape(num_groups, head_dim, -1)
        return centers

    def attend(self, points, keys, values, pooling) -> torch.Tensor:
        """T times ordinary attention of the centres over the pixels, heads taken from the groups in memory order."""
        centers = self.pool(points, pooling)
        num_groups, head_dim, num_centers = centers.shape
        shape = (num_groups // self.num_heads, -1, self.num_heads, head_dim)
        queries, keys, values = (tensor.reshape(shape).transpose(1, 2) for tensor in (centers, keys, values))
        attention = F.scaled_dot_product_attention
        if runs_eagerly_on_cpu(keys) and not keeps_released_order(keys) and keys.shape[2] <= num_centers:
            attention = attend_few
        for _ in range(self.num_iterations):
            queries = attention(queries, keys, values)
        return queries.transpose(1, 2).reshape(num_groups, head_dim, num_centers)

    def nearest_center(self, centers, points) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Sigmoid of the scaled cosine to the most similar centre and its index, (groups, N) each, of centres (groups, d,
        K) and points (groups, d, N).
        """
        if keeps_released_order(points):
            cosine = F.normalize(centers.mT, dim=-1) @ F.normalize(points.mT, dim=-1).mT
            similarity, nearest = (self.sim_beta + self.sim_alpha * cosine).sigmoid().max(dim=1)
            return similarity, nearest
        cosine = (points / column_norms(points)).to(points.dtype).mT @ centers / column_norms(centers)
        similarity, nearest = (self.sim_beta + self.sim_alpha * cosine).max(dim=-1)
        return similarity.sigmoid().to(points.dtype), nearest


def keeps_released_order(tensor: torch.Tensor) -> bool:
    """See [`ClusterFormerReleasedClustering`]."""
    return tensor.dtype == torch.float64


def column_norms(matrices: torch.Tensor) -> torch.Tensor:
    """(groups, d, N) -> (groups, 1, N), without zeros. `vector_norm` takes 20 times as long on the CPU."""
    return matrices.float().square().sum(dim=1, keepdim=True).clamp_min(MIN_NORM**2).sqrt()


def attend_few(queries, keys, values) -> torch.Tensor:
    """Attention over so few keys that the product of all queries and keys is small beside the queries."""
    logits = keys @ queries.mT * queries.shape[-1] ** -0.5
    return logits.softmax(dim=-2).mT @ values


def aggregate_and_dispatch(similarity, nearest, values, center_features) -> torch.Tensor:
    """
    Every centre becomes the mean of its own feature and its pixels' values, these weighted by similarity; every pixel
    receives its centre times its similarity.

    Args:
        similarity, nearest (`torch.Tensor` of shape `(groups, N)`): From `nearest_center`.
        values (`torch.Tensor` of shape `(groups, N, d)`).
        center_features (`torch.Tensor` of shape `(groups, K, d)`).

    Returns:
        `torch.Tensor` of shape `(groups, N, d)`.
    """
    num_groups, num_centers, head_dim = center_features.shape
    weighted = values * similarity[..., None]
    if nearest.shape[1] <= num_centers:
        # Few pixels: each sums over those of its own centre, and other centres need no feature.
        shared = (nearest[:, :, None] == nearest[:, None]).to(values.dtype)
        own = center_features.gather(1, nearest[..., None].expand(-1, -1, head_dim))
        mean = (own + shared @ weighted) / (1 + shared.sum(dim=-1, keepdim=True))
        return mean * similarity[..., None]
    offset = torch.arange(num_groups, device=nearest.device)[:, None] * num_centers
    index = (nearest + offset).flatten()
    total = center_features.flatten(0, 1).index_add(0, index, weighted.flatten(0, 1))
    count = similarity.new_ones(num_groups * num_centers).index_add(0, index, torch.ones_like(similarity).flatten())
    mean = total.index_select(0, index) / count.index_select(0, index)[:, None]
    return mean.unflatten(0, (num_groups, -1)) * similarity[..., None]
