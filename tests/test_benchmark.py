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
"""The benchmark script: it runs, and what it measures is what it says. No test looks at a time."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    ResNetConfig,
    SwinConfig,
    SwinForImageClassification,
)

from clusterformer_hf import (
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    ClusterFormerForUniversalSegmentation,
)


SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark")


def nano_classifiers() -> dict:
    """The contestants with few channels and one block a stage."""
    nano = {"depths": [1, 1], "num_labels": 10}
    ours = ClusterFormerConfig(
        hidden_sizes=[16, 32], num_attention_heads=[1, 2], mlp_ratios=[2, 2], center_grid=[3, 3], **nano
    )
    swin = SwinConfig(image_size=32, embed_dim=16, num_heads=[1, 2], window_size=2, **nano)
    convnext = ConvNextConfig(hidden_sizes=[16, 32], num_stages=2, **nano)
    return {
        "ClusterFormer-T": lambda: ClusterFormerForImageClassification(ours),
        "Swin-T": lambda: SwinForImageClassification(swin),
        "ConvNeXt-T": lambda: ConvNextForImageClassification(convnext),
    }


def nano_released(form: str) -> nn.Module:
    config = ClusterFormerConfig.released_tiny(
        clustering=form,
        depths=[1] * 4,
        hidden_sizes=[8, 8, 8, 8],
        num_attention_heads=[1, 1, 2, 2],
        center_grid=[3] * 4,
    )
    return ClusterFormerForImageClassification(config)


def nano_decoder(**kwargs) -> ClusterFormerConfig:
    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "center_grid": [3] * 4}
    decoder = {"decoder_hidden_size": 16, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "decoder_layers": 1}
    return ClusterFormerConfig(num_labels=5, **sizes, **decoder, **kwargs)


def nano_detectors() -> dict:
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8] * 4,
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 9, "num_labels": 5}
    deformable_detr = DeformableDetrConfig(backbone_config=backbone, **small)
    return {
        "ClusterFormer-T": lambda: ClusterFormerForObjectDetection(nano_decoder()),
        "Deformable DETR-R50": lambda: DeformableDetrForObjectDetection(deformable_detr),
    }


def nano_segmenters() -> dict:
    backbone = SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1] * 4,
        num_heads=[1, 2, 2, 4],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    maskformer = MaskFormerConfig(backbone_config=backbone, num_labels=5)
    maskformer.decoder_config.decoder_layers = 1
    return {
        "ClusterFormer-T": lambda: ClusterFormerForUniversalSegmentation(nano_decoder()),
        "MaskFormer-Swin-T": lambda: MaskFormerForInstanceSegmentation(maskformer),
    }


def test_runs_end_to_end(benchmark, monkeypatch, tmp_path, capsys):
    """All sections but `compilation` on small models: every table is printed and written, with positive numbers."""
    models = nano_classifiers()
    monkeypatch.setattr(benchmark, "NUM_LABELS", 10)
    monkeypatch.setattr(benchmark, "CLASSIFIERS", models)
    monkeypatch.setattr(benchmark, "clusterformer", models["ClusterFormer-T"])
    monkeypatch.setattr(benchmark, "released", nano_released)
    monkeypatch.setattr(benchmark, "DETECTORS", nano_detectors())
    monkeypatch.setattr(benchmark, "SEGMENTERS", nano_segmenters())
    monkeypatch.setattr(benchmark, "LOADED_DIGITS", 120)
    monkeypatch.setattr(benchmark, "LOADED_BATCH_SIZE", 2)
    monkeypatch.setattr(benchmark, "GROWTH_SIDES", (32, 64))
    monkeypatch.delitem(benchmark.SECTIONS, "compilation")
    output = tmp_path / "results.json"
    flags = "--sizes 32 64 --batch_sizes 1 2 --training_size 32 --training_batch_size 2 --released_sizes 128"
    flags += " --detection_sizes 64x96 --segmentation_sizes 64x64 --segmentation_training_size 64x64"
    flags += f" --rounds 1 --min_seconds 0 --devices cpu --output {output}"
    results = benchmark.main(flags.split())

    assert json.loads(output.read_text()) == results
    (run,) = results["runs"]
    assert run["machine"]["threads"] == torch.get_num_threads()
    assert run["machine"]["torch"] == torch.__version__
    assert [table["section"] for table in run["tables"]] == (
        ["inference"] * 4
        + ["growth"]
        + ["training"]
        + ["loading"]
        + ["detection"]
        + ["segmentation"] * 2
        + ["released"] * 2
        + ["start_up"] * 2
    )
    printed = capsys.readouterr().out
    for table in run["tables"]:
        assert f"## {table['title']}\n" in printed
        for row in table["rows"]:
            assert all(value > 0 for key, value in row.items() if key not in ("model", "measured")), row
    tables = {table["title"]: table for table in run["tables"]}
    loader, growth = tables.pop("training from files"), tables.pop("growth from 32 x 32 to 64 x 64, batch 1")
    imports, loading = tables.pop("import"), tables.pop("from_pretrained")
    for table in tables.values():
        assert table["rows"][0]["speed_of_first"] == table["rows"][0]["memory_of_first"] == 1
    assert all(table["largest_difference"] < 1e-3 for table in tables.values() if table["section"] == "released")
    for table in (run["tables"][0], growth, loading):
        assert [row["model"] for row in table["rows"]] == ["ClusterFormer-T", "Swin-T", "ConvNeXt-T"]
    assert all(1 < row["memory_growth"] < 5 for row in growth["rows"])  # 4 times the pixels
    assert [row["measured"] for row in imports["rows"]] == ["Swin of Transformers", "clusterformer_hf after it"]

    alone = {row["measured"]: row for row in loader["rows"]}
    assert list(alone) == ["loader alone", "model alone", "both together"]
    slower = min(alone[name]["samples_per_second"] for name in ("loader alone", "model alone"))
    assert all(row["of_slower"] == row["samples_per_second"] / slower for row in loader["rows"])
    assert "data workers: 1, model on one thread: to overlap, each needs an idle core for itself" in printed


@pytest.mark.slow
def test_compiled_models_run_beside_eager_ones(benchmark, monkeypatch, capsys):
    """Two batch sizes, and a model that leaves the graph once."""
    models = {"ours": nano_classifiers()["ClusterFormer-T"], "broken": BreaksGraph}
    monkeypatch.setattr(benchmark, "CLASSIFIERS", models)
    monkeypatch.setattr(benchmark, "COMPILED_SIDE", 32)
    flags = "--sections compilation --batch_sizes 1 2 --rounds 1 --min_seconds 0 --devices cpu"
    (run,) = benchmark.main(flags.split())["runs"]
    assert [table["title"] for table in run["tables"]] == [f"torch.compile, 32 x 32, batch {size}" for size in (1, 2)]
    for table in run["tables"]:
        assert {row["model"]: row["graph_breaks"] for row in table["rows"]} == {"ours": 0, "broken": 1}
        assert all(row["compiled_speed"] > 0 for row in table["rows"])
    assert "| graph breaks |" in capsys.readouterr().out


def test_ratios_are_against_the_first(benchmark, monkeypatch):
    """Twice as fast in half the memory reads as 2 and 0.5."""
    monkeypatch.setattr(benchmark, "peak_memory", lambda run, device: {"fast": 10.0, "slow": 20.0}[run()])
    monkeypatch.setattr(benchmark, "interleaved_medians", lambda runs, *_: ([0.5, 1.0, 0.25], 1))
    contestants = [benchmark.Contestant(name, lambda name=name: name, gmacs=4.0) for name in ("fast", "slow")]
    settings = benchmark.Settings(benchmark.BenchmarkArguments(), torch.device("cpu"), torch.float32)
    result = benchmark.table("title", contestants, settings, batch_size=8)
    peak = 2048**3 / 1e9 / 0.25
    assert result["product_gflops"] == pytest.approx(2 * peak)
    assert result["rows"][1]["speed_of_first"] == 2
    assert result["rows"][1]["memory_of_first"] == 0.5
    assert result["rows"][1]["images_per_second"] == 8
    assert result["rows"][0]["peak_share"] == pytest.approx(8.0 / peak)


def test_gmacs_equal_a_hand_count(benchmark):
    """ConvNeXt-T at 64 x 64: stem, a 7x7 depthwise and two pointwise layers a block, 2x2 downsampling, classifier."""
    sizes, depths, side = [96, 192, 384, 768], [3, 3, 9, 3], 16
    macs = side**2 * 96 * 3 * 4**2
    for stage, (dim, depth) in enumerate(zip(sizes, depths)):
        if stage > 0:
            side //= 2
            macs += side**2 * dim * sizes[stage - 1] * 2**2
        macs += depth * side**2 * (7**2 * dim + 2 * 4 * dim**2)
    macs += 768 * 1000
    assert benchmark.forward_gmacs(benchmark.convnext().eval(), torch.randn(1, 3, 64, 64)) == pytest.approx(
        macs / 1e9, rel=1e-12
    )


class BreaksGraph(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        doubled = 2 * images
        torch._dynamo.graph_break()
        return doubled + 1


class Attention(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(images, images[..., :5, :], images[..., :5, :])


def test_gmacs_count_attention(benchmark):
    """Two products for each head, which the CPU's fused operator hides from the counter."""
    gmacs = benchmark.forward_gmacs(Attention(), torch.randn(2, 3, 16, 32))
    assert gmacs == pytest.approx(2 * 2 * 3 * 16 * 5 * 32 / 1e9)


def test_contestants_train_alike(benchmark):
    """None drops anything: stochastic depth and dropout are off in all."""
    builders = [*benchmark.CLASSIFIERS.values(), *benchmark.SEGMENTERS.values()]
    with torch.device("meta"):
        modules = [module for build in builders for module in build().modules()]
    for name in ("p", "drop_prob", "dropout", "activation_dropout", "attention_dropout"):
        rates = [getattr(module, name, 0) for module in modules]
        assert not [rate for rate in rates if isinstance(rate, float) and rate > 0], name


def test_maskformer_trains_every_layer(benchmark):
    """With the auxiliary losses of the others its loss is larger."""
    config = nano_segmenters()["MaskFormer-Swin-T"]().config
    config.decoder_config.decoder_layers = 3
    model = MaskFormerForInstanceSegmentation(config).eval()
    mask = torch.zeros(1, 64, 64)
    mask[:, :32, :32] = 1
    labels = {"mask_labels": [mask], "class_labels": [torch.tensor([1])]}
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        loss = model(images, **labels).loss
        auxiliary_loss = benchmark.with_auxiliary_loss(lambda: model)(images, **labels).loss
    assert auxiliary_loss > 2 * loss > 0


def test_gmacs_of_the_feed_forward_networks_are_contained(benchmark):
    """Ours at 64 x 64 counts its feed-forward networks and convolutions and less than as much again."""
    sizes, depths, side = [96, 192, 384, 768], [2, 2, 6, 2], 16
    macs = side**2 * 96 * 5 * 4**2
    for stage, (dim, depth) in enumerate(zip(sizes, depths)):
        if stage > 0:
            side //= 2
            macs += side**2 * dim * sizes[stage - 1] * 3**2
        macs += depth * side**2 * 2 * 4 * dim**2
    assert (
        macs / 1e9
        < benchmark.forward_gmacs(benchmark.clusterformer().eval(), torch.randn(1, 3, 64, 64))
        < 2 * macs / 1e9
    )


def test_peak_memory_counts_what_lives_at_once(benchmark):
    """Three products in a row: input and output of one live together, the others are gone."""
    tensor = torch.ones(2**18)  # 1 MiB
    assert benchmark.peak_memory(lambda: ((tensor * 2) * 3) * 4, tensor.device) == pytest.approx(2, rel=1e-3)


def test_peak_memory_of_training_counts_activations_and_gradients(benchmark):
    """A chain of 8 linear layers keeps its inputs for the backward pass; inference keeps none."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    images = torch.ones(1024, 256)  # 1 MiB, as every activation

    def step():
        model.zero_grad()
        model(images).sum().backward()

    training = benchmark.peak_memory(step, images.device)
    inference = benchmark.peak_memory(lambda: benchmark.forward(model, images), images.device)
    assert 8 <= training < 14
    assert inference == pytest.approx(2, rel=1e-2)


def test_contestants_take_turns(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "SHORTEST_TURN", 0)
    turns = []
    runs = [lambda name=name: turns.append(name) for name in "ABC"]
    medians, rounds = benchmark.interleaved_medians(runs, rounds=4, min_seconds=0)
    assert turns == list("ABC") * 4
    assert rounds == 4 and len(medians) == 3


def test_a_training_that_fails_is_shown(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "LOADED_DIGITS", 10)
    monkeypatch.setattr(benchmark.sys, "executable", "false")  # a program that fails
    settings = benchmark.Settings(benchmark.BenchmarkArguments(), torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="run_image_classification.py .*--measure_throughput.* failed:"):
        next(benchmark.loading(settings))


@pytest.mark.parametrize(
    ("flags", "named"), [("--sections speed", "speed"), ("--rounds 0", "0"), ("--dtype int8", "int8")]
)
def test_wrong_arguments_are_named(benchmark, flags, named):
    with pytest.raises(ValueError, match=named):
        benchmark.main(flags.split())
