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
"""Behaviour of the model classes: outputs, padding, sizes, saving, gradients, precision, clustering."""

import math

import pytest
import torch
import torch.nn.functional as F

from clusterformer_hf import (
    ClusterFormerBackbone,
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerModel,
    clustering_clusterformer,
    modeling_clusterformer,
)
from clusterformer_hf.configuration_clusterformer import as_pair
from clusterformer_hf.metrics.clusters import cluster_statistics
from clusterformer_hf.modeling_clusterformer import mean_over_pixels, mean_under_assignments


NANO = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 2, 1],
    "num_attention_heads": [1, 2, 3, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "center_grid": [4, 4, [3, 4], 2],
    "num_labels": 5,
}
RELEASED = {
    **NANO,
    "center_grid": [3, 3, 3, 3],
    "window_grid": [4, 2, 1, 1],
    "classifier_pooling": "stages",
    "clustering": "release",
}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def nano_config(**kwargs) -> ClusterFormerConfig:
    return ClusterFormerConfig(**{**NANO, **kwargs})


def nano_classifier(**kwargs) -> ClusterFormerForImageClassification:
    torch.manual_seed(0)
    return ClusterFormerForImageClassification(nano_config(initializer_range=0.2, **kwargs)).eval()


def images(*size, seed=0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs", [{}, RELEASED, {**RELEASED, "clustering": "release_flash"}], ids=["ours", "oct", "nov"]
)
def test_documented_shapes(kwargs):
    model = nano_classifier(**kwargs).clusterformer
    with torch.no_grad():
        outputs = model(images(2, 3, 64, 96), output_hidden_states=True, output_cluster_assignments=True)
    assert outputs.last_hidden_state.shape == (2, 32, 2, 3)
    assert outputs.pooler_output.shape == (2, 32)
    sizes = [(16, 24), (16, 24), (8, 12), (4, 6), (2, 3)]
    assert [tuple(state.shape) for state in outputs.hidden_states] == [
        (2, channels, *size) for channels, size in zip([8, 8, 16, 24, 32], sizes)
    ]
    num_centers = [9, 9, 9, 9] if kwargs else [16, 16, 12, 4]
    assert [tuple(centers.shape) for centers in outputs.cluster_centers] == [
        (2, k, channels) for k, channels in zip(num_centers, [8, 16, 24, 32])
    ]
    assert [tuple(assignments.shape) for assignments in outputs.cluster_assignments] == [
        (2, heads, k, *size) for heads, k, size in zip([1, 2, 3, 4], num_centers, sizes[1:])
    ]
    for assignments in outputs.cluster_assignments:
        torch.testing.assert_close(assignments.sum(dim=2), torch.ones_like(assignments[:, :, 0]))


def test_outputs_follow_their_switches():
    model = nano_classifier()
    pixel_values = images(2, 3, 64, 64)
    with torch.no_grad():
        plain = model(pixel_values)
        assert set(plain) == {"logits"}
        assert set(model(pixel_values, output_hidden_states=True)) == {"logits", "hidden_states"}
        asked = model(pixel_values, output_cluster_assignments=True)
        assert set(asked) == {"logits", "cluster_centers", "cluster_assignments"}
        as_tuple = model(pixel_values, return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain.logits)
        model.config.output_cluster_assignments = True
        assert "cluster_assignments" in model(pixel_values)
        base = model.clusterformer(pixel_values, output_cluster_assignments=False)
    # Batched pipelines index every entry by image, so the centres are there as an attribute alone.
    assert set(base) == {"last_hidden_state", "pooler_output"} and len(base.cluster_centers) == 4


@pytest.mark.parametrize("sr_ratios", [[1, 1, 1, 1], [4, 2, 1, 1]])
def test_centers_are_the_means_of_their_pixels(sr_ratios):
    model = nano_classifier(sr_ratios=sr_ratios).clusterformer.double()
    with torch.no_grad():
        outputs = model(images(2, 3, 64, 64).double(), output_hidden_states=True, output_cluster_assignments=True)
    for stage in (3, 4) if sr_ratios[0] > 1 else (1, 2, 3, 4):
        pixels = outputs.hidden_states[stage].flatten(2)
        weights = outputs.cluster_assignments[stage - 1].flatten(3)
        heads = weights.shape[1]
        expected = torch.einsum("bhkn,bhdn->bkhd", weights, pixels.unflatten(1, (heads, -1)))
        expected = (expected / weights.sum(-1).mT[..., None]).flatten(2)
        torch.testing.assert_close(outputs.cluster_centers[stage - 1], expected)


def test_the_classifier_reads_the_centers():
    """Normed centres weighted by their mass give the pooled output, so the logits split into one share for each."""
    model = nano_classifier().double()
    with torch.no_grad():
        outputs = model.clusterformer(images(2, 3, 64, 96).double(), output_cluster_assignments=True)
        normed = model.clusterformer.hidden_states_norms["stage4"](outputs.last_hidden_state).flatten(2)
        weights = outputs.cluster_assignments[-1].flatten(3)  # (batch, heads, K, N)
        centers = torch.einsum("bhkn,bhdn->bhkd", weights, normed.unflatten(1, (4, -1))) / weights.sum(-1)[..., None]
        share = weights.sum(-1) / weights.shape[-1]
        pooled = torch.einsum("bhk,bhkd->bhd", share, centers).flatten(1)
    torch.testing.assert_close(pooled, outputs.pooler_output)


def test_backbone_returns_the_normed_stage_maps():
    torch.manual_seed(0)
    backbone = ClusterFormerBackbone(nano_config(out_features=["stem", "stage2", "stage4"])).eval()
    pixel_values = images(2, 3, 64, 64)
    with torch.no_grad():
        outputs = backbone(pixel_values, output_hidden_states=True)
        assert "hidden_states" not in backbone(pixel_values)
    assert backbone.channels == [8, 16, 32]
    for name, index, feature_map in zip(("stem", "stage2", "stage4"), (0, 2, 4), outputs.feature_maps):
        torch.testing.assert_close(feature_map, backbone.hidden_states_norms[name](outputs.hidden_states[index]))
        torch.testing.assert_close(feature_map.mean(dim=1), torch.zeros_like(feature_map[:, 0]), rtol=0, atol=1e-5)


# ---- sizes and padding -----------------------------------------------------------------------------------------------


def pad_into_batch(pixel_values, size, filling=float("nan")):
    """The image beside another one that fills `size`, with garbage as padding."""
    _, channels, height, width = pixel_values.shape
    batch = torch.full((2, channels, *size), filling, dtype=pixel_values.dtype)
    batch[0, :, :height, :width] = pixel_values[0]
    batch[1] = images(channels, *size, seed=7)
    mask = torch.zeros(2, *size, dtype=torch.long)
    mask[0, :height, :width], mask[1] = 1, 1
    return batch, mask


def center_grids(config, size):
    """Rows and columns of centres of each stage for an image of `size`."""
    for stage, ratio in enumerate(config.sr_ratios):
        cell = config.patch_size * 2**stage * ratio
        yield tuple(min(entry, math.ceil(side / cell)) for entry, side in zip(as_pair(config.center_grid[stage]), size))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("sr_ratios", [[1, 1, 1, 1], [2, 1, 1, 1], [4, 2, 1, 1]])
@pytest.mark.parametrize("size", [(64, 64), (71, 50), (33, 95)])
def test_padding_changes_nothing(size, sr_ratios, dtype, tolerance):
    """Also where the small image has fewer centres than its company: the surplus ones are masked."""
    torch.manual_seed(0)
    # Random weights of a deviation far from 0.02 make float32's own rounding exceed 1e-5 on noise.
    config = nano_config(sr_ratios=sr_ratios, initializer_range=0.02 if dtype == torch.float32 else 0.2)
    model = ClusterFormerForImageClassification(config).eval().to(dtype)
    alone = images(1, 3, *size).to(dtype)
    batch, mask = pad_into_batch(alone, (101, 128))
    switches = {"output_hidden_states": True, "output_cluster_assignments": True}
    close = {"rtol": 0, "atol": tolerance}
    with torch.no_grad():
        expected, actual = model(alone, **switches), model(batch, pixel_mask=mask, **switches)
    torch.testing.assert_close(actual.logits[:1], expected.logits, **close)
    for wanted, got in zip(expected.hidden_states, actual.hidden_states):
        torch.testing.assert_close(got[:1, :, : wanted.shape[-2], : wanted.shape[-1]], wanted, **close)

    grids = zip(center_grids(config, size), center_grids(config, batch.shape[-2:]))
    for stage, ((rows, columns), grid) in enumerate(grids):
        wanted, got = expected.cluster_centers[stage][0], actual.cluster_centers[stage][0].unflatten(0, grid)
        torch.testing.assert_close(got[:rows, :columns].flatten(0, 1), wanted, **close)
        assert got[rows:].abs().sum() + got[:, columns:].abs().sum() == 0
        wanted, got = expected.cluster_assignments[stage][0], actual.cluster_assignments[stage][0].unflatten(1, grid)
        height, width = wanted.shape[-2:]
        torch.testing.assert_close(got[:, :rows, :columns, :height, :width].flatten(1, 2), wanted, **close)
        assert got[..., height:, :].abs().sum() + got[..., width:].abs().sum() == 0


def test_gradients_through_padding_are_zero_and_finite():
    model = nano_classifier(center_grid=[4, 4, 4, 4]).train()
    batch, mask = pad_into_batch(images(1, 3, 40, 64), (128, 128), filling=1e30)
    batch.requires_grad_()
    model(batch, pixel_mask=mask, labels=torch.tensor([1, 2])).loss.backward()
    assert (batch.grad * (1 - mask[:, None])).abs().max() == 0
    assert batch.grad[0, :, :40, :64].abs().min(dim=0).values.gt(0).float().mean() > 0.9
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("size", [(32, 32), (37, 61), (4, 4), (5, 130)])
def test_any_size_works(size):
    with torch.no_grad():
        outputs = nano_classifier()(images(1, 3, *size), output_hidden_states=True)
    assert outputs.logits.isfinite().all()
    assert outputs.hidden_states[-1].shape[-2:] == tuple(math.ceil(side / 32) for side in size)


def test_batch_order_and_company_do_not_matter():
    model = nano_classifier()
    batch = images(4, 3, 64, 64)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        logits = model(batch).logits
        torch.testing.assert_close(model(batch[order]).logits, logits[order], rtol=0, atol=1e-5)
        torch.testing.assert_close(model(batch[1:2]).logits, logits[1:2], rtol=0, atol=1e-5)


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_sizes_of_the_paper():
    counts = {}
    for name in ("tiny", "small"):
        config = getattr(ClusterFormerConfig, name)(num_labels=1000)
        with torch.device("meta"):
            counts[name] = ClusterFormerForImageClassification(config).num_parameters()
    assert 27.5e6 < counts["tiny"] < 28.5e6
    assert 47e6 < counts["small"] < 49.5e6


@pytest.mark.parametrize("name, expected", [("released_tiny", 30_192_696), ("released_small", 51_508_176)])
def test_sizes_of_the_released_code(name, expected):
    with torch.device("meta"):
        model = ClusterFormerForImageClassification(getattr(ClusterFormerConfig, name)(num_labels=1000))
    assert model.clusterformer.num_parameters() == expected
    assert model.num_parameters() == expected + 1_441_000


def test_iterations_cost_no_parameters_and_matter():
    three, one = nano_classifier(), nano_classifier(num_iterations=1)
    assert three.num_parameters() == one.num_parameters()
    one.load_state_dict(three.state_dict())
    with torch.no_grad():
        assert (three(images(1, 3, 64, 64)).logits - one(images(1, 3, 64, 64)).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    "kwargs", [{}, {"spatial_clustering": False}, RELEASED], ids=["ours", "no position", "released"]
)
def test_gradients_reach_every_parameter(kwargs):
    model = nano_classifier(**kwargs).train()
    model(images(2, 3, 64, 64), labels=torch.tensor([0, 1])).loss.backward()
    missing = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert missing == []


def test_initial_values():
    """Scales, temperatures and position weights start where the config and the paper's reading put them."""
    torch.manual_seed(0)
    model = ClusterFormerModel(nano_config(layer_scale_init_value=0.5))
    for stage in model.encoder.stages:
        for layer in stage.layers:
            assert layer.layer_scale1.eq(0.5).all() and layer.layer_scale2.eq(0.5).all()
            torch.testing.assert_close(
                layer.clustering.logit_scale.exp(), torch.full_like(layer.clustering.logit_scale, 10)
            )
            weight = F.softplus(layer.clustering.spatial_weight)
            torch.testing.assert_close(weight, torch.ones_like(weight))


@pytest.mark.parametrize("kwargs", [{}, RELEASED], ids=["ours", "released"])
def test_save_and_load_is_bit_exact(kwargs, tmp_path):
    model = nano_classifier(**kwargs)
    model.save_pretrained(tmp_path)
    loaded = ClusterFormerForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images(2, 3, 64, 64)).logits, model(images(2, 3, 64, 64)).logits)
    backbone, info = ClusterFormerBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        maps = backbone(images(2, 3, 64, 64)).feature_maps
        state = model.clusterformer(images(2, 3, 64, 64)).last_hidden_state
    assert torch.equal(maps[0], model.clusterformer.hidden_states_norms["stage4"](state))


# ---- precision, memory, compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, RELEASED], ids=["ours", "released"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(dtype, kwargs):
    model = nano_classifier(**kwargs)
    pixel_values = images(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values).logits
        with torch.autocast("cpu", dtype=dtype):
            mixed = model(pixel_values).logits
        half = model.to(dtype)(pixel_values.to(dtype)).logits
    # The released forms assign hard, so that single pixels can change sides.
    tolerance = 0.3 if kwargs else 0.05
    for logits in (mixed.float(), half.float()):
        assert logits.isfinite().all()
        assert (logits - expected).abs().max() < tolerance * expected.abs().max()


def test_released_heads_that_do_not_divide_the_channels():
    model = ClusterFormerModel(nano_config(**RELEASED | {"num_attention_heads": [3, 3, 3, 3], "head_dim": 4}))
    outputs = model(images(2, 3, 64, 64), output_cluster_assignments=True)
    assert [tuple(centers.shape) for centers in outputs.cluster_centers] == [
        (2, 9, channels) for channels in NANO["hidden_sizes"]
    ]


def test_padding_does_not_change_the_means_of_stages():
    model, alone = nano_classifier(classifier_pooling="stages"), images(1, 3, 71, 50)
    batch, mask = pad_into_batch(alone, (101, 128))
    with torch.no_grad():
        expected, actual = model(alone), model(batch, pixel_mask=mask)
    torch.testing.assert_close(actual.logits[:1], expected.logits, rtol=0, atol=1e-5)


def test_means_of_many_pixels_in_float16():
    """Neither their sum nor, of 65536 pixels, their number is in float16."""
    maps, sizes = torch.full((1, 2, 256, 256), 4.0, dtype=torch.float16), torch.tensor([[256, 256]])
    assert (mean_over_pixels(maps, sizes) == 4).all()
    features = torch.full((1, 4096, 2), 20.0)
    with torch.autocast("cpu", torch.float16):
        centers = mean_under_assignments(features, F.one_hot(torch.zeros(1, 1, 4096, dtype=torch.int64), 2).float())
    assert centers[0].tolist() == [[20, 20], [0, 0]]


def test_a_batch_without_pictures():
    with torch.no_grad():
        assert nano_classifier()(torch.zeros(0, 3, 64, 64)).logits.shape == (0, 5)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = nano_classifier().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(images(2, 3, 64, 64), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compile_without_graph_breaks(masked):
    model = nano_classifier()
    batch, mask = pad_into_batch(images(1, 3, 50, 64), (64, 96), filling=0.0)
    inputs = {"pixel_values": batch, **({"pixel_mask": mask} if masked else {})}
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
        torch.testing.assert_close(compiled.logits, model(**inputs).logits, rtol=0, atol=1e-5)


def test_compile_backbone_without_graph_breaks():
    torch.manual_seed(0)
    backbone = ClusterFormerBackbone(nano_config(out_features=STAGES)).eval()
    with torch.no_grad():
        compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")(images(1, 3, 64, 64))
        expected = backbone(images(1, 3, 64, 64))
    for actual, wanted in zip(compiled.feature_maps, expected.feature_maps):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind, dynamic",
    [
        ("classifier", True),
        ("backbone", False),
        pytest.param("classifier", False, marks=pytest.mark.slow),
        pytest.param("backbone", True, marks=pytest.mark.slow),
    ],
)
def test_torch_export(kind, dynamic):
    torch.manual_seed(0)
    model = (
        nano_classifier() if kind == "classifier" else ClusterFormerBackbone(nano_config(out_features=STAGES)).eval()
    )
    pixel_values = images(2, 3, 96, 128)
    dynamic_shapes = {"pixel_values": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)} if dynamic else None
    exported = torch.export.export(model, (), {"pixel_values": pixel_values}, dynamic_shapes=dynamic_shapes)
    program = exported.module()
    for inputs in (pixel_values, images(3, 3, 70, 90)) if dynamic else (pixel_values,):
        with torch.no_grad():
            actual, expected = program(pixel_values=inputs), model(inputs)
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)


def test_inference_on_the_cpu_takes_its_own_ways_to_the_same_result(monkeypatch):
    """In chunks, in place and with products in place of convolutions."""
    model = nano_classifier(sr_ratios=[2, 1, 1, 1]).double()
    pixel_values = images(2, 3, 90, 110).double()
    expected = model(pixel_values, output_cluster_assignments=True)  # keeps what a backward pass needs
    monkeypatch.setattr(modeling_clusterformer, "FEED_FORWARD_CHUNK", 100)
    monkeypatch.setattr(modeling_clusterformer, "LARGE_WEIGHT", 0)
    with torch.no_grad():
        actual = model(pixel_values, output_cluster_assignments=True)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-12)
    for got, wanted in zip(actual.cluster_assignments, expected.cluster_assignments):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["release", "release_flash"])
def test_released_groups_in_chunks_give_the_same_bit_by_bit(form, monkeypatch):
    """Rounding decides between parallel centres, so nothing less will do."""
    model = nano_classifier(**{**RELEASED, "clustering": form, "center_grid": [5, 5, 3, 3]}).double()
    pixel_values = images(2, 3, 64, 64).double()
    outputs = []
    for chunk in (2**30, 500):
        monkeypatch.setattr(clustering_clusterformer, "GROUP_CHUNK", chunk)
        with torch.no_grad():
            outputs.append(model(pixel_values, output_cluster_assignments=True))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for whole, chunked in zip(outputs[0].cluster_assignments, outputs[1].cluster_assignments):
        assert torch.equal(whole, chunked)


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (4, 4), (7, 10)])
def test_pooling_by_a_matrix_is_the_same_bit_by_bit(size):
    encoder = nano_classifier(**{**RELEASED, "center_grid": [10] * 4}).clusterformer.encoder
    clustering = encoder.stages[0].layers[0].clustering
    features = images(6, 8, *size).double()
    pooled = clustering.pool(features, clustering.pooling_matrix(features))
    assert torch.equal(pooled, F.adaptive_avg_pool2d(features, 10).flatten(2))


# ---- learning --------------------------------------------------------------------------------------------------------


def test_a_little_training_learns_and_does_not_collapse():
    """Learns which of four textures an image shows; the clusters stay sharp, distinct and in use."""
    torch.manual_seed(0)
    model = nano_classifier(center_grid=[4, 4, 2, 2], sr_ratios=[2, 1, 1, 1], num_labels=4).train()
    grid = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij"))
    waves = torch.tensor([[0.2, 0.0], [0.0, 0.2], [0.6, 0.6], [0.3, -0.3]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        labels = torch.randint(4, (16,))
        phase = 6.28 * torch.rand(16, 1, 1)
        texture = torch.sin((waves[labels][:, :, None, None] * grid).sum(dim=1) + phase)
        pixel_values = texture[:, None] + 0.3 * torch.randn(16, 3, 64, 64)
        loss = model(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    with torch.no_grad():
        statistics = cluster_statistics(model.eval()(pixel_values, output_cluster_assignments=True))
    for stage in statistics[:2]:
        assert stage["entropy"] < 0.6, statistics
        assert stage["cosine"] < 0.8, statistics
        assert stage["in_use"] > 0.5 * stage["clusters"], statistics
