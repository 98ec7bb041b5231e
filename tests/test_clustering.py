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
"""The clustering mathematics against naive transcriptions of the paper's equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from clusterformer_hf import ClusterFormerConfig, clustering_clusterformer
from clusterformer_hf.clustering_clusterformer import (
    ClusterFormerRecurrentClustering,
    expectation,
    gaussian_tables,
    maximization,
    stage_geometry,
    sum_assigned,
    sum_pixels,
    unit_vectors,
)


def make_clustering(dim=12, heads=3, grid=(3, 2), ratio=1, **kwargs):
    config = ClusterFormerConfig(
        depths=[1], hidden_sizes=[dim], num_attention_heads=[heads], mlp_ratios=[2], center_grid=[list(grid)],
        sr_ratios=[ratio], **kwargs,
    )  # fmt: skip
    clustering = ClusterFormerRecurrentClustering(config, 0).double()
    with torch.no_grad():
        clustering.logit_scale.fill_(math.log(10.0)).add_(0.3 * torch.randn_like(clustering.logit_scale))
        if clustering.spatial_weight is not None:
            clustering.spatial_weight.fill_(0.5).add_(0.3 * torch.randn_like(clustering.spatial_weight))
    return clustering


def naive_update(clustering, features, grid, num_iterations):
    """Eq. 3, 5 and 6 for one image, head by head and pixel by pixel."""
    height, width, dim = features.shape
    heads = clustering.num_heads
    pooled = F.adaptive_avg_pool2d(features.permute(2, 0, 1)[None], grid)[0].flatten(1).T
    positions = torch.tensor(
        [[(row + 0.5) / height, (col + 0.5) / width] for row in range(height) for col in range(width)],
        dtype=features.dtype,
    )
    mean = torch.tensor(
        [[(row + 0.5) / grid[0], (col + 0.5) / grid[1]] for row in range(grid[0]) for col in range(grid[1])],
        dtype=features.dtype,
    )
    std = torch.tensor([0.5 / grid[0], 0.5 / grid[1]], dtype=features.dtype).expand_as(mean)
    keys, values = clustering.key_value(features.flatten(0, 1)).chunk(2, dim=-1)
    updates = []
    for head in range(heads):
        part = slice(head * dim // heads, (head + 1) * dim // heads)
        centers, mu, sigma = pooled[:, part], mean, std
        centers = centers + clustering.center_fc2(F.gelu(clustering.center_fc1(centers)))
        for _ in range(num_iterations):
            cosine = F.cosine_similarity(clustering.query(centers)[None], keys[:, None, part], dim=-1)
            logits = clustering.logit_scale[head].exp().squeeze() * cosine
            if clustering.spatial_weight is not None:
                distance = ((positions[:, None] - mu) / sigma).square().sum(-1)
                logits = logits - 0.5 * F.softplus(clustering.spatial_weight[head]).squeeze() * distance
            weights = logits.softmax(dim=-1)
            weights = weights / weights.sum(dim=0)
            centers, mu = weights.T @ values[:, part], weights.T @ positions
            variance = torch.stack([(weights[:, k, None] * (positions - mu[k]) ** 2).sum(0) for k in range(len(mu))])
            variance = variance + torch.tensor([1 / height, 1 / width], dtype=torch.float64) ** 2 / 12  # a pixel's own
            sigma = variance.sqrt().clamp(0.02, 0.5)
        pixels = features.flatten(0, 1)[:, part]
        similarity = F.cosine_similarity(pixels[:, None], centers[None], dim=-1)
        updates.append(similarity @ centers / len(centers))
    return clustering.projection(torch.cat(updates, dim=-1)).unflatten(0, (height, width))


@pytest.mark.parametrize("spatial_clustering", [True, False])
@pytest.mark.parametrize("num_iterations", [1, 3])
@pytest.mark.parametrize("size", [(7, 9), (3, 2)])  # many and few pixels: both routes of the dispatch
def test_recurrent_clustering_equals_the_equations(size, num_iterations, spatial_clustering):
    torch.manual_seed(0)
    clustering = make_clustering(num_iterations=num_iterations, spatial_clustering=spatial_clustering)
    features = torch.randn(2, *size, 12, dtype=torch.float64)
    geometry = stage_geometry(size, (3, 2), 1, None, features)
    update, *_ = clustering(features, geometry)
    expected = torch.stack([naive_update(clustering, image, (3, 2), num_iterations) for image in features])
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-12)


def test_sample_ratio_clusters_the_averaged_map():
    """With `sr_ratios` the clusters are those of the averaged map alone."""
    torch.manual_seed(0)
    features = torch.randn(1, 8, 12, 12, dtype=torch.float64)
    averaged = F.avg_pool2d(features.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    clustering = make_clustering(ratio=2)
    clusters = clustering.cluster(features, stage_geometry((8, 12), (3, 2), 2, None, features))
    expected = clustering.cluster(averaged, stage_geometry((4, 6), (3, 2), 1, None, features))
    for actual, wanted in zip(clusters, expected):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_two_blobs_are_found():
    """Pixels of two features in two halves end up in different clusters, whose places are the halves' centres."""
    rows = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)[None]
    keys = torch.eye(2, dtype=torch.float64).repeat_interleave(50, dim=0)[None, None]
    centers, mean = torch.tensor([[[[0.6, 0.4], [0.4, 0.6]]]]).double(), torch.full((1, 1, 2, 2), 0.5).double()
    variance = torch.full_like(mean, 0.25)
    for _ in range(5):
        tables = gaussian_tables((mean, variance), (rows, rows), torch.ones(1, 1, 1).double())
        weights = expectation(keys, 10 * centers, tables)
        sums = sum_assigned(weights, keys, (10, 10))
        centers, mean, variance = maximization(sums, (rows, rows), torch.tensor([[0.1, 0.1]]))
    torch.testing.assert_close(weights[0, 0].argmax(-1), torch.arange(2).repeat_interleave(50))
    torch.testing.assert_close(mean[0, 0].mT, torch.tensor([[0.25, 0.5], [0.75, 0.5]]).double(), rtol=0, atol=1e-3)


def test_extent_of_a_bar_of_pixels():
    """n whole pixels in a row give the variance of a bar of their length, which boxes are read from: length^2 / 12."""
    weights = torch.zeros(1, 1, 10, 1, dtype=torch.float64)
    weights[:, :, 3:7] = 1
    rows = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)[None]
    column = torch.full((1, 1), 0.5, dtype=torch.float64)
    sums = sum_assigned(weights, weights, (10, 1))
    _, mean, variance = maximization(sums, (rows, column), torch.tensor([[0.1, 1.0]]).double())
    torch.testing.assert_close(mean.flatten(), torch.tensor([0.5, 0.5]).double())
    torch.testing.assert_close((12 * variance).sqrt().flatten(), torch.tensor([0.4, 1.0]).double())


def test_maximization_survives_an_empty_cluster():
    """A centre without pixels becomes zero and gives finite gradients."""
    weights = torch.zeros(1, 1, 4, 2, dtype=torch.float64)
    weights[..., 0] = 1
    weights.requires_grad_()
    positions = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    sums = sum_assigned(weights, torch.randn(1, 1, 4, 3).double(), (2, 2))
    centers, mean, variance = maximization(sums, (positions, positions), torch.tensor([[0.5, 0.5]]))
    assert centers[0, 0, 1].abs().max() == 0
    (centers.sum() + mean.sum() + variance.sum()).backward()
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("num_centers, chunk, num_calls", [(5, 2**21, 1), (5, 2 * 2 * 12 * 5, 4), (9, 2**21, 2)])
@pytest.mark.parametrize("weighting", [None, "mask", "weights"])
def test_sums_have_the_gradients_of_assignments(weighting, num_centers, chunk, num_calls, monkeypatch):
    """`sum_pixels` keeps small assignments for its backward pass; others it computes again, some heads at once."""
    monkeypatch.setattr(clustering_clusterformer, "HEAD_CHUNK", chunk)
    calls = []
    monkeypatch.setattr(clustering_clusterformer, "expectation", lambda *a: calls.append(1) or expectation(*a))
    shapes = {"keys": (2, 3, 12, 4), "values": (2, 3, 12, 4), "queries": (2, 3, num_centers, 4)}
    shapes |= {"rows": (1, 3, 3, num_centers), "columns": (2, 1, 4, num_centers)}
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]
    mask = center_mask = None
    if weighting == "mask":
        center_mask = torch.zeros(2, 1, 1, num_centers, dtype=torch.float64)
        center_mask[1, ..., 3:] = float("-inf")
        mask = torch.arange(12)[None, None, :, None] < torch.tensor([12, 7]).view(2, 1, 1, 1)
    elif weighting == "weights":
        inputs.append(torch.rand(2, 3, 12, 1, dtype=torch.float64, requires_grad=True))

    def plain(keys, values, queries, rows, columns, weights=mask):
        return sum_assigned(expectation(keys, queries, (rows, columns), center_mask, weights), values, (3, 4))

    def with_own_gradient(keys, values, queries, rows, columns, weights=mask):
        return sum_pixels(keys, values, queries, (rows, columns), center_mask, weights)

    weights = [torch.randn_like(tensor) for tensor in plain(*inputs)]
    gradients = []
    for function in (plain, with_own_gradient):
        sums = function(*inputs)
        loss = sum((tensor * weight).sum() for tensor, weight in zip(sums, weights))
        gradients.append((*sums, *torch.autograd.grad(loss, inputs)))
    assert len(calls) == num_calls
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(with_own_gradient, inputs)


def test_assignments_far_out_of_range():
    """Logits that differ by more than an exponential holds: as the softmax has it, but for shares of 2e-22."""
    torch.manual_seed(0)
    keys, queries = torch.randn(1, 2, 12, 4), torch.randn(1, 2, 5, 4)
    tables = -1000 * torch.rand(1, 2, 3, 5), -1000 * torch.rand(1, 2, 4, 5)
    center_mask = torch.tensor([0, 0, 0, 0, float("-inf")]).view(1, 1, 1, 5)
    with torch.no_grad():
        assignments = expectation(keys, queries, tables, center_mask)
    expected = expectation(keys.requires_grad_(), queries, tables, center_mask).detach()
    assert (expected[..., :4] == 0).any() and (assignments[..., :4] > 0).all()
    assert (assignments[..., 4] == 0).all()
    torch.testing.assert_close(assignments, expected, rtol=1e-6, atol=1e-21)


def test_sums_of_padded_batches_are_traced():
    """No branch depends on data: memory and operations are counted with tensors that have none."""
    torch.manual_seed(0)
    center_mask = torch.zeros(2, 1, 1, 5)
    center_mask[1, ..., 4] = float("-inf")
    shapes = (2, 2, 12, 4), (2, 2, 12, 4), (2, 2, 5, 4), (2, 2, 3, 5), (2, 2, 4, 5)
    inputs = *(torch.randn(shape) for shape in shapes), center_mask, torch.rand(2, 2, 12, 1)

    def sums(keys, values, queries, rows, columns, center_mask, weights):
        return sum_pixels(keys, values, queries, (rows, columns), center_mask, weights)

    with torch.no_grad():
        torch.testing.assert_close(make_fx(sums)(*inputs)(*inputs), sums(*inputs), rtol=0, atol=0)


def test_unit_vectors_are_normalised_with_the_same_gradient():
    vectors = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors[0, 0, 0] = 0  # without a direction, and without NaN
    cotangent = torch.randn(vectors.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for normalise in (unit_vectors, lambda vectors: F.normalize(vectors, dim=-1)):
        inputs = vectors.clone().requires_grad_()
        units = normalise(inputs)
        units.backward(cotangent)
        results.append((units.detach(), inputs.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)
    assert results[0][0][0, 0, 0].abs().sum() == 0


def test_cost_is_linear_in_pixels():
    """No tensor grows faster than the number of pixels: doubling both sides quadruples the multiplications."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    clustering = make_clustering(dim=32, heads=2, grid=(4, 4)).float()
    flops = []
    for side in (16, 32):
        features = torch.randn(1, side, side, 32)
        with FlopCounterMode(display=False) as counter:
            clustering(features, stage_geometry((side, side), (4, 4), 1, None, features))
        flops.append(counter.get_total_flops())
    assert 3.0 < flops[1] / flops[0] < 4.3
