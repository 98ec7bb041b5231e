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
"""The comparisons of learning: they run, go on where they stopped, and their contestants are of one size and learn."""

import importlib
import json
from pathlib import Path

import pytest
import torch


SCRIPTS = Path(__file__).parents[1] / "scripts"
FLAGS = ["--seeds", "0", "--cpu_minutes", "0.001", "--size", "64", "--num_train", "8", "--num_test", "3"]
FLAGS += ["--batch_size", "2", "--num_evaluations", "1"]


@pytest.fixture(params=["compare_detectors", "compare_segmenters"])
def script(request, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module(request.param)


def test_runs_and_does_not_repeat_what_is_done(script, tmp_path, monkeypatch, capsys):
    flags = [*FLAGS, "--models", "clusterformer", "--output", str(tmp_path / "runs.json")]
    if hasattr(script, "METRICS"):
        flags += ["--scenes", str(tmp_path / "scenes")]
    script.main(flags)
    (run,) = json.loads((tmp_path / "runs.json").read_text())
    assert run["curve"][-1]["samples"] >= 2 and run["curve"][-1]["cpu_minutes"] >= 0.001
    assert 0 <= run["curve"][-1]["AP50"] <= 1
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[-1].startswith(f"| clusterformer | {run['parameters'] / 1e6:.2f}M | ")

    with monkeypatch.context() as patch:
        patch.setattr(script, "train", None)
        script.main(flags)
    assert capsys.readouterr().out.splitlines()[-3:] == table

    # A run of another learning rate is not today's.
    models = script.MODELS["panoptic"] if hasattr(script, "METRICS") else script.MODELS
    build, _, *more = models["clusterformer"]
    monkeypatch.setitem(models, "clusterformer", (build, 2e-3, *more))
    script.main(flags)
    first, second = json.loads((tmp_path / "runs.json").read_text())
    assert first["config"] == second["config"] and second["learning_rate"] == 2e-3
    assert "| clusterformer | " in capsys.readouterr().out.splitlines()[-1]


def test_semantic_task_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("compare_segmenters")
    flags = ["--task", "semantic", "--models", "clusterformer", "segformer", "--scenes", str(tmp_path / "scenes")]
    script.main([*FLAGS, *flags, "--output", str(tmp_path / "runs.json")])
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [run["model"] for run in runs] == ["clusterformer", "segformer"]
    for run in runs:
        assert run["curve"][-1]["samples"] >= 2 and 0 <= run["curve"][-1]["mIoU"] <= 1
    assert capsys.readouterr().out.splitlines()[-4].startswith("| model | parameters | samples seen | seeds | mIoU |")


def test_a_budget_of_samples_is_the_same_for_all(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("compare_detectors")
    flags = ["--models", "clusterformer", "rt_detr", "--output", str(tmp_path / "runs.json"), "--samples", "6"]
    script.main([*FLAGS, *flags, "--num_evaluations", "2", "--dataloader_num_workers", "1"])
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [[point["samples"] for point in run["curve"]] for run in runs] == [[4, 6], [4, 6]]
    for flags, message in (
        (["--device", "cuda"], "--device cuda needs --samples"),
        (["--samples", "3", "--num_evaluations", "2"], "--samples 3 are fewer than a batch of 2 for each of 2"),
        (["--num_train", "1"], "--num_train 1 scenes make no batch of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main([*FLAGS, *flags])


def test_unknown_models_are_named(script):
    with pytest.raises(ValueError, match="yolo.*clusterformer"):
        script.main(["--models", "yolo"])


def test_contestants_are_of_one_size(script):
    """No peer has fewer than three quarters of our parameters or more than twice as many."""
    tasks = script.MODELS.values() if hasattr(script, "METRICS") else [script.MODELS]
    for models in tasks:
        sizes = {name: entry[0](64).num_parameters() for name, entry in models.items()}
        for name, size in sizes.items():
            assert 0.75 < size / sizes["clusterformer"] < 2, (name, sizes)


def test_peers_learn_from_every_layer(script):
    """
    A training step of each contestant has a finite loss and gradients. Not everywhere: DETR's first layer starts from
    queries that are zero, and its last has the only loss.
    """
    script_is_detection = not hasattr(script, "METRICS")
    box = {"class_labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:40, 20:40] = 1
    for task, models in {"detection": script.MODELS}.items() if script_is_detection else script.MODELS.items():
        for name, entry in models.items():
            labels = {
                "detection": {"labels": [box] * 2},
                "panoptic": {"mask_labels": [mask] * 2, "class_labels": [torch.tensor([3])] * 2},
                "semantic": {"labels": mask.long().expand(2, -1, -1)},
            }[task]
            model = entry[0](64).train()
            loss = model(pixel_values=torch.randn(2, 3, 64, 64), **labels).loss
            loss.backward()
            trained = [p for p in model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
            assert torch.isfinite(loss), name
            assert len(trained) > 0.8 * len(list(model.parameters())), name


def test_peers_start_from_values_to_learn_from(script):
    """Norms of one, which RT-DETR's are not in transformers, and matrices by the number of their inputs."""
    for models in script.MODELS.values() if hasattr(script, "METRICS") else [script.MODELS]:
        for name in models.keys() - {"clusterformer"}:
            for part, weight in models[name][0](64).named_parameters():
                if weight.ndim == 1 and part.endswith("weight"):
                    assert (weight == 1).all(), (name, part)
                elif part.endswith("weight") and weight.numel() > 2000 and weight.any():
                    assert weight.std() * weight[0].numel() ** 0.5 > 0.4, (name, part)


def test_queries_of_peers_differ_where_they_are_evaluated(script):
    """Without dropout, which hides in training that they are alike. As transformers draws them: below 0.002."""
    torch.manual_seed(0)
    models = script.MODELS["panoptic"] if hasattr(script, "METRICS") else script.MODELS
    with_learned_queries = {"detr", "deformable_detr", "maskformer", "mask2former"} & models.keys()
    assert len(with_learned_queries) == 2
    for name in with_learned_queries:
        model = models[name][0](64).eval()
        layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
        assert layers and all(layer.dropout == 0 for layer in layers), name
        with torch.no_grad():
            outputs = model(pixel_values=torch.randn(1, 3, 64, 64))
        queries = outputs.get("last_hidden_state", outputs.get("transformer_decoder_last_hidden_state"))[0]
        assert queries.shape == (36, 96) and queries.std(dim=0).mean() > 0.004, name


def test_every_detector_sees_the_same_pictures(monkeypatch):
    """Whatever random numbers its model drew before; in another epoch they are others."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    scenes = importlib.import_module("compare_detectors").Scenes("train", 4, 64)
    first = scenes[3]["pixel_values"]
    torch.rand(5)
    assert torch.equal(scenes[3]["pixel_values"], first)
    scenes.epoch = 1
    assert not torch.equal(scenes[3]["pixel_values"], first)


def test_runs_of_other_tasks_and_curves_are_not_mixed(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    arguments = importlib.import_module("compare_segmenters").Arguments
    fields = [{}, {"task": "semantic"}, {"num_evaluations": 3}, {"samples": 1000}]
    settings = [arguments(**own).settings() for own in fields]
    assert not any(one.items() <= other.items() for one in settings for other in settings if one is not other)
