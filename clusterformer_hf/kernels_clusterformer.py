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
Recurrent cross-attention clustering (Eq. 3) in Triton: the same mathematics as the plain path in
`clustering_clusterformer.py`, which is its oracle in the tests and its fallback elsewhere.

No (N, K) table reaches the memory of the device, forward or backward: a tile of pixels is assigned in registers and
summed at once, and the backward pass assigns it again. Small maps take one launch for all iterations, `cluster_kernel`;
large ones are split, and an iteration is two: `sum_kernel` and `update_kernel`. Backward it is always two. Nothing is
added atomically, so results are the same in every run.

"Place" is (4, K) here: means and variances of the centres' positions, rows first.
"""

from contextlib import nullcontext
from inspect import signature
from types import SimpleNamespace

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU that it knows: the plain path
    triton, tl = None, SimpleNamespace(constexpr=None)


# Bounds of both paths. Of a cluster's extent (one standard deviation), as a share of the image's side.
MIN_EXTENT, MAX_EXTENT = 0.02, 0.5
# Least mass that an M-step divides by, in pixels: a centre without pixels becomes zero and its gradient stays finite.
MIN_MASS = 1e-6
# Least norm that a feature is divided by, as in `F.normalize`.
MIN_NORM = 1e-12
# Pixels of a tile, by the dtype of the keys. Tiles of 64 read out of bounds on Hopper with Triton 3.6.
BLOCK_PIXELS = {torch.float32: 16, torch.bfloat16: 32, torch.float16: 32}
# With as many centres or channels the programs fit the shared memory (99 KiB) and the registers of any Ampere GPU.
MAX_CENTERS, MAX_CHANNELS = 128, 64
# A head's pixels are split among programs, which takes two launches an iteration, if their tiles are more than these:
# then for so many programs on each processor of the device.
MAX_TILES, PROGRAMS_PER_PROCESSOR = 32, 4


def kernel(function):
    if triton is None:
        return function
    # One program for all sizes; strides stay, whose divisibility makes loads wide.
    sizes = {"N", "num_heads", "tiles", "num_splits", "num_iterations"}
    return triton.jit(function, do_not_specialize=[name for name in signature(function).parameters if name in sizes])


@kernel
def load_matrix(pointer, rows, columns, num_rows, num_columns, stride):
    """Rows of a matrix with contiguous columns; 0 outside."""
    mask = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@kernel
def load_four(pointer, k, K):
    """The rows of a matrix (4, K); 0 outside."""
    return (
        tl.load(pointer + k, mask=k < K, other=0.0),
        tl.load(pointer + K + k, mask=k < K, other=0.0),
        tl.load(pointer + 2 * K + k, mask=k < K, other=0.0),
        tl.load(pointer + 3 * K + k, mask=k < K, other=0.0),
    )


@kernel
def store_four(pointer, k, K, a, b, c, d):
    tl.store(pointer + k, a, mask=k < K)
    tl.store(pointer + K + k, b, mask=k < K)
    tl.store(pointer + 2 * K + k, c, mask=k < K)
    tl.store(pointer + 3 * K + k, d, mask=k < K)


@kernel
def load_place(place, k, K):
    """Mean and variance along rows and columns, (BLOCK_K) each; variances of 1 outside."""
    mean_y, mean_x, variance_y, variance_x = load_four(place, k, K)
    return mean_y, mean_x, tl.where(k < K, variance_y, 1.0), tl.where(k < K, variance_x, 1.0)


@kernel
def load_pixels(pixels, n, N):
    """Row, column and own variance along both of pixels (4, N), as columns (BLOCK_N, 1)."""
    y = tl.load(pixels + n, mask=n < N, other=0.0)[:, None]
    x = tl.load(pixels + N + n, mask=n < N, other=0.0)[:, None]
    own_y = tl.load(pixels + 2 * N + n, mask=n < N, other=0.0)[:, None]
    own_x = tl.load(pixels + 3 * N + n, mask=n < N, other=0.0)[:, None]
    return y, x, own_y, own_x


@kernel
def load_temperatures(logit_scale, spatial_weight, h):
    """Temperature of a head's cosine and half the weight of its Gaussian, as the plain path makes them."""
    temperature = tl.exp(tl.load(logit_scale + h).to(tl.float32))
    spatial = 0.0
    if spatial_weight is not None:
        raw = tl.load(spatial_weight + h).to(tl.float32)
        spatial = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(raw)))
    return temperature, 0.5 * spatial


@kernel
def load_bias(center_bias, b, k, K):
    """0 at centres, -inf at surplus ones and outside."""
    bias = tl.where(k < K, 0.0, float("-inf"))
    if center_bias is not None:
        bias += tl.load(center_bias + b * K + k, mask=k < K, other=0.0)
    return bias


@kernel
def load_weight(pixel_weights, n, N):
    """How much each pixel of a tile counts; 0 outside."""
    weight = (n < N).to(tl.float32)
    if pixel_weights is not None:
        weight = tl.load(pixel_weights + n, mask=n < N, other=0.0)
    return weight


@kernel
def unit_queries(c, weight, bias, d, D, PRECISION: tl.constexpr, MIN_NORM: tl.constexpr):
    """Queries of unit length of centres (BLOCK_K, BLOCK_D), and their length before."""
    w = load_matrix(weight, d, d, D, D, D).to(tl.float32)
    offset = tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    u = tl.dot(c, tl.trans(w), input_precision=PRECISION) + offset[None, :]
    norm = tl.maximum(tl.sqrt(tl.sum(u * u, axis=1)), MIN_NORM)
    return u / norm[:, None], norm


@kernel
def unit_keys(keys, n, d, N, D, stride, MIN_NORM: tl.constexpr):
    """Keys of a tile of pixels in float32, of unit length, and their length before."""
    features = load_matrix(keys, n, d, N, D, stride).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(features * features, axis=1)), MIN_NORM)
    return features / norm[:, None], norm


@kernel
def assign(unit, queries, dy, dx, rate_y, rate_x, bias, PRECISION: tl.constexpr):
    """E-step of a tile, (BLOCK_N, BLOCK_K), which sums to 1 over K."""
    logits = tl.dot(unit, tl.trans(queries.to(unit.dtype)), input_precision=PRECISION)
    logits += bias[None, :] - dy * dy * rate_y[None, :] - dx * dx * rate_x[None, :]
    exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return exponentials / tl.sum(exponentials, axis=1)[:, None]


@kernel
def sum_tiles(
    keys, values, pixels, pixel_weights, queries, mean_y, mean_x, rate_y, rate_x, bias, first_tile, tiles, N, D,
    key_n, value_n, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    MIN_NORM: tl.constexpr,
):  # fmt: skip
    """
    E-step, and the sums of the M-step over some tiles of a head's pixels: of the values, (BLOCK_K, BLOCK_D), of the
    pixels' offsets from the centre, of their squares with a pixel's own variance, and of the mass.
    """
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    mass = tl.zeros((BLOCK_K,), tl.float32)
    first_y, first_x, second_y, second_x = mass, mass, mass, mass
    for tile in range(tiles):
        n = (first_tile + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        unit, _ = unit_keys(keys, n, d, N, D, key_n, MIN_NORM)
        v = load_matrix(values, n, d, N, D, value_n)
        y, x, own_y, own_x = load_pixels(pixels, n, N)
        dy, dx = y - mean_y[None, :], x - mean_x[None, :]
        a = assign(unit.to(v.dtype), queries, dy, dx, rate_y, rate_x, bias, PRECISION)
        a *= load_weight(pixel_weights, n, N)[:, None]
        total += tl.dot(tl.trans(a.to(v.dtype)), v, input_precision=PRECISION)
        mass += tl.sum(a, axis=0)
        first_y += tl.sum(a * dy, axis=0)
        first_x += tl.sum(a * dx, axis=0)
        second_y += tl.sum(a * (dy * dy + own_y), axis=0)
        second_x += tl.sum(a * (dx * dx + own_x), axis=0)
    return total, first_y, first_x, second_y, second_x, mass


@kernel
def move_axis(mean, first, second, mass, safe, MIN_VARIANCE: tl.constexpr, MAX_VARIANCE: tl.constexpr):
    """M-step along one axis: the new mean and variance, of sums of offsets from the old mean."""
    new_mean = (mean * mass + first) / safe
    step = new_mean - mean
    variance = (second - step * (2 * first - step * mass)) / safe
    return new_mean, tl.minimum(tl.maximum(variance, MIN_VARIANCE), MAX_VARIANCE)


@kernel
def cluster_kernel(
    keys, values, centers, place, query_weight, query_bias, logit_scale, spatial_weight, pixels, pixel_weights,
    center_bias, new_centers, new_place, new_mass, old_centers, old_places, old_masses, num_iterations,
    N, K, D, num_heads, tiles, num_splits, key_b, key_n, key_h, value_b, value_n, value_h, pixels_b, weights_b,
    weights_h, place_b, place_h,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    MIN_NORM: tl.constexpr, MIN_MASS: tl.constexpr, MIN_VARIANCE: tl.constexpr, MAX_VARIANCE: tl.constexpr,
):  # fmt: skip
    """All iterations of a head whose pixels are not split."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // num_heads, row % num_heads
    rows = tl.num_programs(0).to(tl.int64)
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    temperature, half = load_temperatures(logit_scale, spatial_weight, h)
    bias = load_bias(center_bias, b, k, K)
    if pixel_weights is not None:
        pixel_weights += b * weights_b + h * weights_h
    keys += b * key_b + h * key_h
    values += b * value_b + h * value_h
    c = load_matrix(centers + row * K * D, k, d, K, D, D).to(tl.float32)
    mean_y, mean_x, variance_y, variance_x = load_place(place + b * place_b + h * place_h, k, K)
    at = k[:, None] * D + d[None, :]
    inside = (k[:, None] < K) & (d[None, :] < D)
    mass = tl.zeros((BLOCK_K,), tl.float32)
    for i in range(num_iterations):
        queries, _ = unit_queries(c, query_weight, query_bias, d, D, PRECISION, MIN_NORM)
        total, first_y, first_x, second_y, second_x, mass = sum_tiles(
            keys, values, pixels + b * pixels_b, pixel_weights, queries * temperature, mean_y, mean_x,
            half / variance_y, half / variance_x, bias, 0, tiles, N, D, key_n, value_n,
            BLOCK_N, BLOCK_K, BLOCK_D, PRECISION, MIN_NORM,
        )  # fmt: skip
        safe = tl.maximum(mass, MIN_MASS)
        c = total / safe[:, None]
        mean_y, variance_y = move_axis(mean_y, first_y, second_y, mass, safe, MIN_VARIANCE, MAX_VARIANCE)
        mean_x, variance_x = move_axis(mean_x, first_x, second_x, mass, safe, MIN_VARIANCE, MAX_VARIANCE)
        if i < num_iterations - 1:
            out = i * rows + row
            tl.store(old_centers + out * K * D + at, c, mask=inside)
            store_four(old_places + out * 4 * K, k, K, mean_y, mean_x, variance_y, variance_x)
            tl.store(old_masses + out * K + k, mass, mask=k < K)
    tl.store(new_centers + row * K * D + at, c, mask=inside)
    store_four(new_place + row * 4 * K, k, K, mean_y, mean_x, variance_y, variance_x)
    tl.store(new_mass + row * K + k, mass, mask=k < K)


@kernel
def sum_kernel(
    keys, values, centers, place, query_weight, query_bias, logit_scale, spatial_weight, pixels, pixel_weights,
    center_bias, sums, moments, N, K, D, num_heads, tiles, num_splits,
    key_b, key_n, key_h, value_b, value_n, value_h, pixels_b, weights_b, weights_h, place_b, place_h,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    MIN_NORM: tl.constexpr,
):  # fmt: skip
    """`sum_tiles` for one of the splits of a head's pixels: the sums (K, D), and (5, K) of all others."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // num_heads, row % num_heads
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    temperature, half = load_temperatures(logit_scale, spatial_weight, h)
    if pixel_weights is not None:
        pixel_weights += b * weights_b + h * weights_h
    c = load_matrix(centers + row * K * D, k, d, K, D, D).to(tl.float32)
    mean_y, mean_x, variance_y, variance_x = load_place(place + b * place_b + h * place_h, k, K)
    queries, _ = unit_queries(c, query_weight, query_bias, d, D, PRECISION, MIN_NORM)
    total, first_y, first_x, second_y, second_x, mass = sum_tiles(
        keys + b * key_b + h * key_h, values + b * value_b + h * value_h, pixels + b * pixels_b, pixel_weights,
        queries * temperature, mean_y, mean_x, half / variance_y, half / variance_x, load_bias(center_bias, b, k, K),
        split * tiles, tiles, N, D, key_n, value_n, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION, MIN_NORM,
    )  # fmt: skip
    part = row * num_splits + split
    inside = (k[:, None] < K) & (d[None, :] < D)
    tl.store(sums + part * K * D + k[:, None] * D + d[None, :], total, mask=inside)
    moments += part * 5 * K
    store_four(moments, k, K, first_y, first_x, second_y, second_x)
    tl.store(moments + 4 * K + k, mass, mask=k < K)


@kernel
def update_kernel(
    sums, moments, place, new_centers, new_place, new_mass, K, D, num_heads, num_splits, place_b, place_h,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, MIN_MASS: tl.constexpr,
    MIN_VARIANCE: tl.constexpr, MAX_VARIANCE: tl.constexpr,
):  # fmt: skip
    """M-step: features, places and extents of a head's centres from the sums of all its splits."""
    row = tl.program_id(0).to(tl.int64)
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    mass = tl.zeros((BLOCK_K,), tl.float32)
    first_y, first_x, second_y, second_x = mass, mass, mass, mass
    for split in range(num_splits):
        part = row * num_splits + split
        total += load_matrix(sums + part * K * D, k, d, K, D, D)
        mass += tl.load(moments + part * 5 * K + 4 * K + k, mask=k < K, other=0.0)
        a, b, c, e = load_four(moments + part * 5 * K, k, K)
        first_y, first_x, second_y, second_x = first_y + a, first_x + b, second_y + c, second_x + e
    safe = tl.maximum(mass, MIN_MASS)
    old = place + (row // num_heads) * place_b + (row % num_heads) * place_h
    mean_y, mean_x, _, _ = load_place(old, k, K)
    mean_y, variance_y = move_axis(mean_y, first_y, second_y, mass, safe, MIN_VARIANCE, MAX_VARIANCE)
    mean_x, variance_x = move_axis(mean_x, first_x, second_x, mass, safe, MIN_VARIANCE, MAX_VARIANCE)
    inside = (k[:, None] < K) & (d[None, :] < D)
    tl.store(new_centers + row * K * D + k[:, None] * D + d[None, :], total / safe[:, None], mask=inside)
    tl.store(new_mass + row * K + k, mass, mask=k < K)
    store_four(new_place + row * 4 * K, k, K, mean_y, mean_x, variance_y, variance_x)


@kernel
def backward_kernel(
    keys, values, centers, place, query_weight, query_bias, logit_scale, spatial_weight, pixels, pixel_weights,
    center_bias, new_centers, new_place, new_mass, of_centers, of_place, of_keys, of_values, of_weights,
    of_queries, of_moments, N, K, D, num_heads, tiles, num_splits,
    key_b, key_n, key_h, value_b, value_n, value_h, pixels_b, weights_b, weights_h, place_b, place_h,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    MIN_NORM: tl.constexpr, MIN_MASS: tl.constexpr, MIN_VARIANCE: tl.constexpr, MAX_VARIANCE: tl.constexpr,
    IS_LAST: tl.constexpr, IS_FIRST: tl.constexpr, OF_DTYPE: tl.constexpr,
):  # fmt: skip
    """
    From the gradients of an iteration's new centres to those of its pixels, added up over the iterations from the last
    to the first, and to the sums over pixels for those of queries, (K, D), and places, (4, K).
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // num_heads, row % num_heads
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    temperature, half = load_temperatures(logit_scale, spatial_weight, h)
    if pixel_weights is not None:
        pixel_weights += b * weights_b + h * weights_h
    keys += b * key_b + h * key_h
    values += b * value_b + h * value_h
    c = load_matrix(centers + row * K * D, k, d, K, D, D).to(tl.float32)
    queries, _ = unit_queries(c, query_weight, query_bias, d, D, PRECISION, MIN_NORM)
    queries = (queries * temperature).to(OF_DTYPE)
    mean_y, mean_x, variance_y, variance_x = load_place(place + b * place_b + h * place_h, k, K)
    rate_y, rate_x = half / variance_y, half / variance_x
    bias = load_bias(center_bias, b, k, K)

    # The gradient of an assignment is a constant of its centre, and linear in value and place of its pixel.
    mass = tl.load(new_mass + row * K + k, mask=k < K, other=1.0)
    safe = tl.maximum(mass, MIN_MASS)
    of_c = load_matrix(of_centers + row * K * D, k, d, K, D, D) / safe[:, None]
    constant = -tl.sum(of_c * load_matrix(new_centers + row * K * D, k, d, K, D, D), axis=1)
    of_c = of_c.to(OF_DTYPE)
    new_y, new_x, new_variance_y, new_variance_x = load_place(new_place + row * 4 * K, k, K)
    of_y, of_x, of_variance_y, of_variance_x = load_four(of_place + row * 4 * K, k, K)
    is_free_y = (new_variance_y > MIN_VARIANCE) & (new_variance_y < MAX_VARIANCE)
    is_free_x = (new_variance_x > MIN_VARIANCE) & (new_variance_x < MAX_VARIANCE)
    of_variance_y = tl.where(is_free_y, of_variance_y / safe, 0.0)
    of_variance_x = tl.where(is_free_x, of_variance_x / safe, 0.0)
    constant -= of_variance_y * new_variance_y + of_variance_x * new_variance_x
    # Where the mass is held at its least, it is a constant, and means are no means, about which offsets add up to 0.
    is_massive = mass > MIN_MASS
    missing = 2.0 * (safe - mass) / safe
    of_y = of_y / safe - of_variance_y * new_y * missing
    of_x = of_x / safe - of_variance_x * new_x * missing
    origin_y, origin_x = tl.where(is_massive, new_y, 0.0), tl.where(is_massive, new_x, 0.0)
    constant = tl.where(is_massive, constant, 0.0)

    q_total = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    total_y = tl.zeros((BLOCK_K,), tl.float32)
    total_x, total_variance_y, total_variance_x = total_y, total_y, total_y
    for tile in range(tiles):
        n = (split * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        unit, norm = unit_keys(keys, n, d, N, D, key_n, MIN_NORM)
        v = load_matrix(values, n, d, N, D, value_n)
        y, x, own_y, own_x = load_pixels(pixels + b * pixels_b, n, N)
        dy, dx = y - mean_y[None, :], x - mean_x[None, :]
        a = assign(unit.to(v.dtype), queries, dy, dx, rate_y, rate_x, bias, PRECISION)
        weight = load_weight(pixel_weights, n, N)
        v = v.to(OF_DTYPE)
        gradient = tl.dot(v, tl.trans(of_c), input_precision=PRECISION) + constant[None, :]
        ey, ex = y - new_y[None, :], x - new_x[None, :]
        gradient += of_y[None, :] * (y - origin_y[None, :]) + of_variance_y[None, :] * (ey * ey + own_y)
        gradient += of_x[None, :] * (x - origin_x[None, :]) + of_variance_x[None, :] * (ex * ex + own_x)
        of_weight = tl.sum(a * gradient, axis=1)
        a *= weight[:, None]  # 0 outside
        gradient = a * (gradient - of_weight[:, None])  # of the logits, by the softmax

        inside = (n[:, None] < N) & (d[None, :] < D)
        at = (row * N + n[:, None]) * D + d[None, :]
        of_v = tl.dot(a.to(OF_DTYPE), of_c, input_precision=PRECISION)
        of_k = tl.dot(gradient.to(OF_DTYPE), queries, input_precision=PRECISION)
        if not IS_LAST:
            of_v += tl.load(of_values + at, mask=inside, other=0.0)
            of_k += tl.load(of_keys + at, mask=inside, other=0.0)
        if IS_FIRST:  # through the normalisation of the keys
            of_k = (of_k - unit * tl.sum(unit * of_k, axis=1)[:, None]) / norm[:, None]
        tl.store(of_values + at, of_v, mask=inside)
        tl.store(of_keys + at, of_k, mask=inside)
        if of_weights is not None:
            if not IS_LAST:
                of_weight += tl.load(of_weights + row * N + n, mask=n < N, other=0.0)
            tl.store(of_weights + row * N + n, of_weight, mask=n < N)
        q_total += tl.dot(tl.trans(gradient.to(OF_DTYPE)), unit.to(OF_DTYPE), input_precision=PRECISION)
        total_y += tl.sum(gradient * dy, axis=0)
        total_x += tl.sum(gradient * dx, axis=0)
        total_variance_y += tl.sum(gradient * dy * dy, axis=0)
        total_variance_x += tl.sum(gradient * dx * dx, axis=0)
    part = row * num_splits + split
    inside = (k[:, None] < K) & (d[None, :] < D)
    tl.store(of_queries + part * K * D + k[:, None] * D + d[None, :], q_total, mask=inside)
    store_four(of_moments + part * 4 * K, k, K, total_y, total_x, total_variance_y, total_variance_x)


@kernel
def backward_update_kernel(
    of_queries, of_moments, centers, place, query_weight, query_bias, logit_scale, spatial_weight,
    of_centers, of_place, of_query_weight, of_query_bias, of_scales, K, D, num_heads, num_splits, place_b, place_h,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, MIN_NORM: tl.constexpr,
    IS_LAST: tl.constexpr,
):  # fmt: skip
    """
    From the sums of `backward_kernel` to the gradients of an iteration's old centres and their places, and, added up
    over the iterations, to each head's of the query projection, the log of the temperature and the spatial weight.
    """
    row = tl.program_id(0).to(tl.int64)
    h = row % num_heads
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    of_q = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    of_y = tl.zeros((BLOCK_K,), tl.float32)
    of_x, of_variance_y, of_variance_x = of_y, of_y, of_y
    for split in range(num_splits):
        part = row * num_splits + split
        of_q += load_matrix(of_queries + part * K * D, k, d, K, D, D)
        a, b, e, f = load_four(of_moments + part * 4 * K, k, K)
        of_y, of_x, of_variance_y, of_variance_x = of_y + a, of_x + b, of_variance_y + e, of_variance_x + f

    temperature, half = load_temperatures(logit_scale, spatial_weight, h)
    c = load_matrix(centers + row * K * D, k, d, K, D, D).to(tl.float32)
    unit, norm = unit_queries(c, query_weight, query_bias, d, D, PRECISION, MIN_NORM)
    along = tl.sum(of_q * unit, axis=1)
    of_u = (of_q - along[:, None] * unit) * (temperature / norm)[:, None]
    w = load_matrix(query_weight, d, d, D, D, D).to(tl.float32)
    inside = (k[:, None] < K) & (d[None, :] < D)
    of_c = tl.dot(of_u, w, input_precision=PRECISION)
    tl.store(of_centers + row * K * D + k[:, None] * D + d[None, :], of_c, mask=inside)

    _, _, variance_y, variance_x = load_place(place + (row // num_heads) * place_b + h * place_h, k, K)
    rate_y, rate_x = half / variance_y, half / variance_x
    store_four(
        of_place + row * 4 * K, k, K, 2 * rate_y * of_y, 2 * rate_x * of_x,
        rate_y * of_variance_y / variance_y, rate_x * of_variance_x / variance_x,
    )  # fmt: skip

    of_w = tl.dot(tl.trans(of_u), c, input_precision=PRECISION)
    of_b = tl.sum(of_u, axis=0)
    of_logit_scale = temperature * tl.sum(along, axis=0)
    # Through softplus, whose derivative is 1 - exp(-softplus).
    of_spatial = -0.5 * tl.sum(of_variance_y / variance_y + of_variance_x / variance_x, axis=0)
    of_spatial *= 1.0 - tl.exp(-2.0 * half)
    weights_inside = (d[:, None] < D) & (d[None, :] < D)
    of_query_weight += row * D * D + d[:, None] * D + d[None, :]
    of_query_bias += row * D + d
    of_scales += row * 2
    if not IS_LAST:
        of_w += tl.load(of_query_weight, mask=weights_inside, other=0.0)
        of_b += tl.load(of_query_bias, mask=d < D, other=0.0)
        of_logit_scale += tl.load(of_scales)
        of_spatial += tl.load(of_scales + 1)
    tl.store(of_query_weight, of_w, mask=weights_inside)
    tl.store(of_query_bias, of_b, mask=d < D)
    tl.store(of_scales, of_logit_scale)
    tl.store(of_scales + 1, of_spatial)


class Launch:
    """Sizes, strides and blocks that the kernels of one clustering share."""

    def __init__(self, keys, values, centers, pixels, pixel_weights):
        if keys.stride(-1) != 1 or values.stride(-1) != 1 or not centers.is_contiguous():
            raise ValueError("Channels of `keys` and `values`, and `centers`, must be contiguous.")
        if pixel_weights is not None and pixel_weights.stride(-1) != 1:
            raise ValueError("`pixel_weights` of one head must be contiguous.")
        batch_size, num_pixels, self.num_heads, self.channels = keys.shape
        self.num_centers, self.rows = centers.shape[2], batch_size * self.num_heads
        block_pixels = BLOCK_PIXELS[keys.dtype]
        blocks = triton.cdiv(num_pixels, block_pixels)
        self.splits = 1
        if blocks > MAX_TILES:
            programs = PROGRAMS_PER_PROCESSOR * num_processors(keys.device)
            self.splits = min(blocks, triton.cdiv(programs, max(self.rows, 1)))
        tiles = triton.cdiv(blocks, self.splits)
        self.splits = triton.cdiv(blocks, tiles)
        self.sizes = (num_pixels, self.num_centers, self.channels, self.num_heads, tiles, self.splits)
        self.strides = (*keys.stride()[:3], *values.stride()[:3], stride_of(pixels, 0))
        self.strides += (0, 0) if pixel_weights is None else (stride_of(pixel_weights, 0), stride_of(pixel_weights, 1))
        self.blocks = {
            "BLOCK_K": max(16, triton.next_power_of_2(self.num_centers)),
            "BLOCK_D": max(16, triton.next_power_of_2(self.channels)),
        }
        precision = "ieee" if keys.dtype == torch.float32 else "tf32"
        self.for_pixels = {"BLOCK_N": block_pixels, **self.blocks, "PRECISION": precision, "MIN_NORM": MIN_NORM}
        self.for_pixels |= {"num_warps": 4, "num_stages": 1}
        self.bounds = {"MIN_VARIANCE": MIN_EXTENT**2, "MAX_VARIANCE": MAX_EXTENT**2}

    def partial_sums(self, num_moments: int, device: torch.device) -> tuple[Tensor, Tensor]:
        shape, like = (self.rows, self.splits), {"dtype": torch.float32, "device": device}
        return (
            torch.empty(*shape, self.num_centers, self.channels, **like),
            torch.empty(*shape, num_moments, self.num_centers, **like),
        )


def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def on_device_of(tensor: Tensor):
    """Triton launches on the current device, whatever that of its arguments."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def stride_of(tensor: Tensor, dim: int) -> int:
    """0 along a dimension that is to be repeated."""
    return 0 if tensor.shape[dim] == 1 else tensor.stride(dim)


def place_strides(place: Tensor) -> tuple[int, int]:
    return stride_of(place, 0), stride_of(place, 1)


def empty_clusters(centers: Tensor, *leading: int) -> list[Tensor]:
    """Uninitialised centres, places and masses for centres (batch, heads, K, d)."""
    *rows, num_centers, channels = centers.shape
    shapes = [(num_centers, channels), (4, num_centers), (num_centers,)]
    return [torch.empty(*leading, *rows, *shape, dtype=torch.float32, device=centers.device) for shape in shapes]


@torch.library.custom_op("clusterformer::cluster", mutates_args=())
def cluster(
    keys: Tensor,
    values: Tensor,
    centers: Tensor,
    place: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    logit_scale: Tensor,
    spatial_weight: Tensor | None,
    pixels: Tensor,
    pixel_weights: Tensor | None,
    center_bias: Tensor | None,
    num_iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """
    T E- and M-steps of Eq. 3.

    Args:
        keys, values (`torch.Tensor` of shape `(batch, N, heads, d)`):
            Pixels, in float32, bfloat16 or float16, channels contiguous. Keys are normalised here.
        centers (`torch.Tensor` of shape `(batch, heads, K, d)`): First centres, contiguous.
        place (`torch.Tensor` of shape `(1 or batch, 1 or heads, 4, K)`):
            Means and variances of their positions, rows first; the last two dimensions contiguous, float32.
        query_weight, query_bias (`torch.Tensor` of shape `(d, d)` and `(d,)`): The projection of centres to queries.
        logit_scale (`torch.Tensor` of shape `(heads, 1, 1)`): Log of the temperature.
        spatial_weight (`torch.Tensor` of shape `(heads, 1, 1)`, *optional*):
            What the softplus of weighs the Gaussian in position; without it position is left out.
        pixels (`torch.Tensor` of shape `(1 or batch, 4, N)`):
            Row and column of each pixel, and its own variance along both, which is part of a cluster's. This and what
            follows in float32, and contiguous, as are the parameters above.
        pixel_weights (`torch.Tensor` of shape `(batch, 1 or heads, N)`, *optional*):
            How much a pixel counts; only the last dimension need be contiguous.
        center_bias (`torch.Tensor` of shape `(batch, K)`, *optional*): 0 at centres, -inf at surplus ones.
        num_iterations (`int`): T.

    Returns:
        In float32 the last centres, their place (batch, heads, 4, K) and their mass (batch, heads, K), and the same
        three of the iterations before, (T - 1, ...) each, for the backward pass. Gradients reach the last centres and
        their place alone: those of masses and of the history are not taken.
    """
    inputs = (query_weight, query_bias, logit_scale, spatial_weight, pixels, pixel_weights, center_bias)
    with on_device_of(keys):
        return launch_forward(keys, values, centers, place, inputs, num_iterations)


def launch_forward(keys, values, centers, place, inputs, num_iterations) -> tuple[Tensor, ...]:
    *_, pixels, pixel_weights, _ = inputs
    launch = Launch(keys, values, centers, pixels, pixel_weights)
    last, history = empty_clusters(centers), empty_clusters(centers, num_iterations - 1)
    if launch.splits == 1:
        cluster_kernel[(launch.rows,)](
            keys, values, centers, place, *inputs, *last, *history, num_iterations, *launch.sizes, *launch.strides,
            *place_strides(place), **launch.for_pixels, MIN_MASS=MIN_MASS, **launch.bounds,
        )  # fmt: skip
        return *last, *history
    sums, moments = launch.partial_sums(5, keys.device)
    centers = centers.to(torch.float32)
    for i in range(num_iterations):
        strides = place_strides(place)
        sum_kernel[(launch.rows, launch.splits)](
            keys, values, centers, place, *inputs, sums, moments, *launch.sizes, *launch.strides, *strides,
            **launch.for_pixels,
        )  # fmt: skip
        new = last if i == num_iterations - 1 else [tensor[i] for tensor in history]
        update_kernel[(launch.rows,)](
            sums, moments, place, *new, launch.num_centers, launch.channels, launch.num_heads, launch.splits, *strides,
            **launch.blocks, MIN_MASS=MIN_MASS, **launch.bounds,
        )  # fmt: skip
        centers, place, _ = new
    return *last, *history


@cluster.register_fake
def _(keys, values, centers, *others):
    return *empty_clusters(centers), *empty_clusters(centers, others[-1] - 1)


@torch.library.custom_op("clusterformer::cluster_backward", mutates_args=())
def cluster_backward(
    of_centers: Tensor,
    of_place: Tensor,
    all_centers: list[Tensor],
    all_places: list[Tensor],
    all_masses: list[Tensor],
    keys: Tensor,
    values: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    logit_scale: Tensor,
    spatial_weight: Tensor | None,
    pixels: Tensor,
    pixel_weights: Tensor | None,
    center_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """
    The gradients of [`cluster`], in float32: of keys and values (batch, heads, N, d), of the pixels' weights (batch,
    heads, N; empty without weights), of the first centres and of their place (batch, heads, 4, K), and of each row's
    (batch * heads) query weights, query bias, and logit scale and spatial weight (2).
    """
    inputs = (query_weight, query_bias, logit_scale, spatial_weight, pixels, pixel_weights, center_bias)
    with on_device_of(keys):
        return launch_backward((of_centers, of_place), (all_centers, all_places, all_masses), keys, values, inputs)


def launch_backward(of_clusters, all_clusters, keys, values, inputs) -> tuple[Tensor, ...]:
    (of_centers, of_place), (all_centers, all_places, all_masses) = of_clusters, all_clusters
    *parameters, pixels, pixel_weights, _ = inputs
    launch = Launch(keys, values, all_centers[0], pixels, pixel_weights)
    gradients = empty_gradients(keys, all_centers[0], pixel_weights)
    of_keys, of_values, of_weights, *of_clusters, of_query_weight, of_query_bias, of_scales = gradients
    of_queries, of_moments = launch.partial_sums(4, keys.device)
    # A scaled gradient over a small mass leaves the range of float16.
    of_dtype = tl.bfloat16 if keys.dtype == torch.bfloat16 else tl.float32
    for i in reversed(range(len(all_masses))):
        is_last, strides = i == len(all_masses) - 1, place_strides(all_places[i])
        backward_kernel[(launch.rows, launch.splits)](
            keys, values, all_centers[i], all_places[i], *inputs,
            all_centers[i + 1], all_places[i + 1], all_masses[i], of_centers, of_place, of_keys, of_values,
            None if pixel_weights is None else of_weights, of_queries, of_moments, *launch.sizes, *launch.strides,
            *strides, **launch.for_pixels, MIN_MASS=MIN_MASS, **launch.bounds, IS_LAST=is_last, IS_FIRST=i == 0,
            OF_DTYPE=of_dtype,
        )  # fmt: skip
        of_centers, of_place = of_clusters
        backward_update_kernel[(launch.rows,)](
            of_queries, of_moments, all_centers[i], all_places[i], *parameters, of_centers, of_place, of_query_weight,
            of_query_bias, of_scales, launch.num_centers, launch.channels, launch.num_heads, launch.splits, *strides,
            **launch.blocks, PRECISION="tf32x3", MIN_NORM=MIN_NORM, IS_LAST=is_last,
        )  # fmt: skip
    return gradients


def empty_gradients(keys: Tensor, centers: Tensor, pixel_weights: Tensor | None) -> tuple[Tensor, ...]:
    (batch_size, num_pixels, num_heads, channels), rows = keys.shape, keys.shape[0] * keys.shape[2]
    shapes = [(batch_size, num_heads, num_pixels, channels)] * 2
    shapes.append((0,) if pixel_weights is None else (batch_size, num_heads, num_pixels))
    shapes += [tuple(centers.shape), (batch_size, num_heads, 4, centers.shape[2])]
    shapes += [(rows, channels, channels), (rows, channels), (rows, 2)]
    return tuple(torch.empty(shape, dtype=torch.float32, device=keys.device) for shape in shapes)


@cluster_backward.register_fake
def _(of_centers, of_place, all_centers, all_places, all_masses, keys, values, *others):
    return empty_gradients(keys, all_centers[0], others[-2])


def save_for_backward(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, of_centers, of_place, *_):
    *inputs, last_centers, last_place, last_mass, centers, places, masses = ctx.saved_tensors
    keys, values, first_centers, first_place, *parameters, pixels, pixel_weights, center_bias = inputs
    of_keys, of_values, of_weights, of_first, of_first_place, of_weight, of_bias, of_scales = cluster_backward(
        zeros_if_none(of_centers, last_centers),
        zeros_if_none(of_place, last_place),
        [first_centers, *centers.unbind(), last_centers],
        [first_place, *places.unbind(), last_place],
        [*masses.unbind(), last_mass],
        keys,
        values,
        *parameters,
        pixels,
        pixel_weights,
        center_bias,
    )
    query_weight, query_bias, logit_scale, spatial_weight = parameters
    of_scales = of_scales.unflatten(0, keys.shape[::2]).sum(dim=0)
    return (
        of_keys.transpose(1, 2).to(keys.dtype),
        of_values.transpose(1, 2).to(values.dtype),
        of_first.to(first_centers.dtype),
        of_first_place.sum_to_size(first_place.shape),
        of_weight.sum(dim=0).to(query_weight.dtype),
        of_bias.sum(dim=0).to(query_bias.dtype),
        of_scales[:, 0].view_as(logit_scale).to(logit_scale.dtype),
        None if spatial_weight is None else of_scales[:, 1].view_as(spatial_weight).to(spatial_weight.dtype),
        None,
        None if pixel_weights is None else of_weights.sum_to_size(pixel_weights.shape),
        None,
        None,
    )


def zeros_if_none(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


cluster.register_autograd(backward, setup_context=save_for_backward)


@torch.compiler.assume_constant_result
def has_kernels(device: torch.device) -> bool:
    """For NVIDIA GPUs from Ampere on."""
    return triton is not None and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def can_cluster(keys: Tensor, num_centers: int) -> bool:
    """Whether there is a kernel for pixels (batch, N, ..., d) and so many centres, and a device to run it."""
    return (
        keys.device.type == "cuda"
        and keys.dtype in BLOCK_PIXELS
        and num_centers <= MAX_CENTERS
        and keys.shape[-1] <= MAX_CHANNELS
        and not torch.jit.is_tracing()
        and has_kernels(keys.device)
    )
