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
"""Runs the common tests of transformers, see conformance/README.md."""

import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import transformers
from filelock import FileLock


ROOT = Path(__file__).resolve().parents[1]
HARNESS = ROOT / "tests" / "conformance"
CACHE = ROOT / ".cache"

SPEC = runpy.run_path(str(HARNESS / "specs.py"))["load"]()
MODEL_TESTS = ["".join(part.capitalize() for part in name.split("_")) + "Test" for name in SPEC.kinds]
TEST_CLASSES = [*MODEL_TESTS, "BackboneMixinTest", "ConfigTest"]


def download_sdist(version: str, destination: Path):
    """Downloads the source distribution of transformers and unpacks its `tests` folder."""
    with TemporaryDirectory(dir=CACHE) as folder:
        pip = [sys.executable, "-m", "pip", "download", f"transformers=={version}", "--dest", folder]
        pip += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        result = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            message = f"The source distribution of transformers {version} could not be downloaded."
            if os.environ.get("TESTS_OFFLINE"):
                pytest.skip(f"{message} TESTS_OFFLINE is set.")
            pytest.fail(f"{message} Set TESTS_OFFLINE=1 to skip these tests.\n{result.stdout}", pytrace=False)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            tests = [member for member in archive if member.name.startswith(f"transformers-{version}/tests/")]
            archive.extractall(folder, members=tests, filter="data")
        (Path(folder) / f"transformers-{version}").rename(destination)


@pytest.fixture(scope="session")
def overlay(tmp_path_factory):
    """The `tests` package that the common tests are imported from."""
    version = transformers.__version__
    sdist = CACHE / f"transformers-{version}"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "transformers.lock"):
        if not sdist.exists():
            download_sdist(version, sdist)
    path = tmp_path_factory.mktemp("conformance") / "overlay"
    subprocess.run([sys.executable, HARNESS / "make_overlay.py", "--sdist", sdist, "--out", path], check=True)
    return path


def run_common_tests(overlay: Path, test_classes: list[str], *options: str, **variables: str):
    # The child is no worker of ours: without the variables of pytest and its plugins.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"CONFORMANCE_OVERLAY": str(overlay), "PYTHONPATH": str(ROOT), **variables}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "--timeout=600", *options]
        + [f"test_conformance.py::{name}" for name in test_classes],
        cwd=HARNESS,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if child.returncode != 0 or not re.search(r"\b[1-9]\d* passed", child.stdout):
        pytest.fail(child.stdout, pytrace=False)


@pytest.mark.parametrize("half", [0, 1])
def test_common_tests_pass(half, overlay):
    """Without those that transformers calls slow, in two processes."""
    run_common_tests(overlay, TEST_CLASSES[half::2])


@pytest.mark.slow
@pytest.mark.timeout(1200)  # tracing takes its time on a busy machine
@pytest.mark.parametrize("selection", ["not (export and dynamic)", "export and dynamic"], ids=["static", "dynamic"])
@pytest.mark.parametrize("test_class", MODEL_TESTS)
def test_slow_common_tests_pass(test_class, selection, overlay):
    run_common_tests(overlay, [test_class], "-m", "slow", "-k", selection, RUN_SLOW="yes")


def test_nothing_else_is_skipped():
    for kind in SPEC.kinds.values():
        assert list(kind.skips) == ["test_model_get_set_embeddings"]
    assert not SPEC.skips_image_processing
