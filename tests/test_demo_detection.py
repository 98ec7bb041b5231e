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
"""scripts/demo_detection.py and scripts/overfit_photo.py as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from pycocotools import mask as coco_mask


ROOT = Path(__file__).parents[1]


def run(script, output_dir, *flags) -> str:
    """What the script prints."""
    command = [sys.executable, ROOT / "scripts" / script, f"--output_dir={output_dir}", "--use_cpu", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(output_dir / "cache")}
    ended = subprocess.run(command, cwd=output_dir, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.slow
def test_demo(tmp_path):
    flags = ["--num_train=4", "--num_test=3", "--num_pictures=2", "--per_device_train_batch_size=2"]
    printed = run("demo_detection.py", tmp_path, *flags, "--max_steps=2", "--save_steps=1", "--eval_steps=1")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"AP", "AP50", "AP75", "seconds", "parameters"} and results["seconds"] > 0
    evaluated = json.loads((tmp_path / "model" / "eval_results.json").read_text())
    assert results["AP"] == evaluated["eval_AP"] and evaluated["eval_samples"] == 3
    assert f"{results['parameters']:,}" in printed and "2/2 [" in printed  # the table and the progress
    for name in ("000001.png", "000002.png"):
        assert Image.open(tmp_path / "predictions" / name).size == (96, 96)
        assert (tmp_path / "predictions" / "clusters" / name).exists()

    # The scenes are written once, and an interrupted training goes on.
    written = (tmp_path / "scenes_4_3" / "train" / "000001.png").stat().st_mtime_ns
    run("demo_detection.py", tmp_path, *flags, "--max_steps=3", "--resume_from_checkpoint=true")
    assert (tmp_path / "scenes_4_3" / "train" / "000001.png").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "model" / "trainer_state.json").read_text())["global_step"] == 3


def test_one_photograph_is_learned_by_heart(tmp_path):
    """All 19 objects of a real photograph, of four classes, with no wrong box before them."""
    printed = run("overfit_photo.py", tmp_path)
    results = json.loads((tmp_path / "model" / "eval_results.json").read_text())
    assert results["eval_AP50"] == 1 and results["eval_AP"] > 0.9
    assert "AP50 1.000" in printed
    (entry,) = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    boxes = {tuple(found["box"].values()): found["label"] for found in entry["predictions"]}
    bottle = min(boxes, key=lambda box: sum(abs(side - true) for side, true in zip(box, (220, 255, 260, 345))))
    assert boxes[bottle] == "bottle"  # x, y, x, y, as seen on the picture
    assert all(abs(side - true) < 8 for side, true in zip(bottle, (220, 255, 260, 345)))


def test_masks_of_the_photograph(tmp_path):
    """Two steps: that all 19 are learned is shown by the script's own run, which takes minutes."""
    printed = run("overfit_photo.py", tmp_path, "--task=instance", "--max_steps=2")
    results = json.loads((tmp_path / "model" / "eval_results.json").read_text())
    assert f"AP {results['eval_AP']:.3f}, AP50 {results['eval_AP50']:.3f} on the photograph" in printed
    truth = json.loads((tmp_path / "photo" / "annotations.json").read_text())["annotations"]
    assert len(truth) == 19 and sum(coco_mask.area(entry["segmentation"]) for entry in truth) == sum(
        entry["area"] for entry in truth
    )
    assert (tmp_path / "predictions" / "photo.png").exists()
