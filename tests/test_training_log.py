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
"""What a training writes down beside its loss."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clusterformer_hf import ClusterFormerConfig, ClusterFormerForImageClassification
from clusterformer_hf.data.digit_scenes import write_digit_scenes
from clusterformer_hf.training_log import NUM_WATCHED, TrainingLog, clustering_health, draw_curves
from scripts.run_object_detection import main
from tests import nano


NANO = nano.BACKBONE | nano.DECODER | {"decoder_layers": 2}
PARTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory) -> Path:
    """A detector's training of four steps of two batches, logged to TensorBoard by default."""
    root = tmp_path_factory.mktemp("log")
    write_digit_scenes(root / "scenes", num_train=8, num_test=2, size=64)
    flags = [f"--dataset_name={root / 'scenes'}", f"--output_dir={root / 'out'}", "--do_train", "--do_eval"]
    flags += ["--max_steps=4", "--logging_steps=2", "--per_device_train_batch_size=2", "--total_train_batch_size=4"]
    flags += ["--use_cpu", "--backbone_learning_rate=1e-5", "--learning_rate=1e-4", "--disable_tqdm=true"]
    overrides = NANO | {"auxiliary_loss": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        main([*flags, f"--config_overrides={json.dumps(overrides)}"])
    return root / "out"


def test_logged_numbers(output_dir):
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    lines = [entry for entry in history if "loss" in entry]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        weighted = sum(weight * line[name] for name, weight in PARTS.items())
        assert weighted == pytest.approx(line["loss"], rel=1e-4)
        assert line["learning_rate_backbone"] == pytest.approx(line["learning_rate"] / 10) and line["grad_norm"] > 0
        assert line["samples_per_second"] > 0 and 0 <= line["waiting_for_data"] <= 1 and line["memory_gib"] > 0.1
        for stage in range(1, 5):
            assert 0 <= line[f"cluster_entropy_{stage}"] <= 1 and 0 < line[f"clusters_in_use_{stage}"] <= 1


def test_tensorboard(output_dir):
    file, *_ = sorted(output_dir.glob("runs/*/events.*"))  # the evaluation in the end has another one
    events = EventAccumulator(str(file)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/loss_giou", "train/cluster_entropy_4", "train/samples_per_second"} <= tags
    assert [event.step for event in events.Scalars("train/grad_norm")] == [2, 4]


def test_curves_are_in_the_card(output_dir):
    assert Image.open(output_dir / "training_curves.png").size[0] == 1200  # three plots in a row
    assert "](training_curves.png)" in (output_dir / "README.md").read_text()


def test_curves(tmp_path):
    """Numbers that belong together share a plot; a run without a log has none."""
    draw_curves(
        [{"step": 1, "loss": 1.0, "epoch": 1.0}, {"step": 1, "eval_loss": 2.0, "eval_runtime": 3.0}], tmp_path / "a.png"
    )
    assert Image.open(tmp_path / "a.png").size == (400, 240)
    draw_curves([], tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_watching_changes_nothing():
    model = ClusterFormerForImageClassification(ClusterFormerConfig(**NANO | {"drop_path_rate": 0.5})).train()
    log = TrainingLog()
    pixels = torch.randn(NUM_WATCHED + 1, 3, 64, 64)
    log.watch({"pixel_values": pixels})
    state = torch.random.get_rng_state()
    health = clustering_health(model, log.watched)
    assert len(health) == 8 and model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(log.watched["pixel_values"]) == NUM_WATCHED

    mask = torch.zeros(2, 64, 64, dtype=torch.int64)
    mask[0, :48, :32] = 1
    log.watch({"pixel_values": pixels[:2], "pixel_mask": mask})
    assert torch.equal(log.watched["pixel_values"], pixels[:1, :, :48, :32])


def test_throughput(output_dir, tmp_path, caplog):
    """Measured with the same flags as a training, which does not take place."""
    flags = [f"--dataset_name={output_dir.parent / 'scenes'}", f"--output_dir={tmp_path / 'out'}", "--do_train"]
    flags += ["--use_cpu", "--per_device_train_batch_size=2", f"--config_overrides={json.dumps(NANO)}"]
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"), pytest.raises(SystemExit) as ended:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        main([*flags, "--measure_throughput", "--dataloader_num_workers=1", "--train_val_split=0"])
    assert ended.value.code == 0 and not (tmp_path / "out" / "model.safetensors").exists()
    result = json.loads((tmp_path / "out" / "throughput_results.json").read_text())
    assert all(result[name] > 0 for name in ("loader", "model", "both"))
    assert result["overlap"] == result["both"] / min(result["loader"], result["model"])
    assert f"model {result['model']:.1f}, both {result['both']:.1f}" in caplog.text
