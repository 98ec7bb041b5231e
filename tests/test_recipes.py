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
"""The recipes for the paper's results, tried with `--smoke` on nano models."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml

from clusterformer_hf.training import ClusterFormerTrainingArguments
from tests import nano


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "scripts" / "recipes"
NANO = nano.BACKBONE | {"image_size": 32}
DECODER = nano.DECODER | {"train_num_points": 64}
SCRIPTS = {
    "image_classification": ("run_image_classification", []),
    "object_detection": ("run_object_detection", []),
    "semantic_segmentation": ("run_semantic_segmentation", ["--crop_size=64"]),
    "instance_segmentation": ("run_universal_segmentation", ["--crop_size=64"]),
    "panoptic_segmentation": ("run_universal_segmentation", ["--crop_size=64"]),
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_smoke(recipe, tmp_path):
    """Three steps, an evaluation, a checkpoint, a saved model and its card, on built-in data."""
    script, flags = next(value for name, value in SCRIPTS.items() if recipe.stem.startswith(name))
    config = yaml.safe_load(recipe.read_text()).get("config_overrides", {})
    kept = {name: config[name] for name in ("classifier_pooling", "drop_path_rate") if name in config}
    nano = NANO | kept | ({} if script == "run_image_classification" else DECODER)
    args = [str(recipe), "--smoke", f"--output_dir={tmp_path}", f"--config_overrides={json.dumps(nano)}", *flags]
    args += ["--per_device_train_batch_size=2", "--use_cpu", "--dataloader_num_workers=0", "--report_to=none"]
    importlib.import_module(f"scripts.{script}").main(args)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and state["train_batch_size"] == 2
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists() and (tmp_path / "README.md").exists()
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_samples"] == 4


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_paper_say_what_they_need(recipe):
    text = recipe.read_text().replace("\n# ", " ")
    if "the paper reports" not in text:
        assert "imagenet" not in recipe.stem and "ade20k" not in recipe.stem
        return
    for words in ("Data: ", "Cost (estimate): ", "Nobody has run this recipe to its end", "--resume", "smoke"):
        assert words in text or "as in image_classification_imagenet" in text, words  # which says it
    assert yaml.safe_load(recipe.read_text())["total_train_batch_size"] >= 16


def arguments(monkeypatch, processes, **options):
    monkeypatch.setattr(ClusterFormerTrainingArguments, "world_size", property(lambda self: processes))
    return ClusterFormerTrainingArguments(output_dir="unused", use_cpu=True, **options)


def test_total_batch_size(monkeypatch):
    for processes, batch, steps in ((1, 8, 8), (2, 8, 4), (8, 8, 1), (4, 1, 16)):
        args = arguments(monkeypatch, processes, per_device_train_batch_size=batch, total_train_batch_size=64)
        assert args.gradient_accumulation_steps == steps
    message = "64 is no multiple of 36, the pictures of 4 processes .* 9 .sizes that do: 1, 2, 4, 8, 16"
    with pytest.raises(ValueError, match=message):
        arguments(monkeypatch, 4, per_device_train_batch_size=9, total_train_batch_size=64)
    with pytest.raises(ValueError, match="no multiple of 96.*no size does"):
        arguments(monkeypatch, 96, per_device_train_batch_size=1, total_train_batch_size=64)
    with pytest.raises(ValueError, match="accumulates 8 batches, --gradient_accumulation_steps says 2"):
        arguments(
            monkeypatch, 1, per_device_train_batch_size=8, total_train_batch_size=64, gradient_accumulation_steps=2
        )


@pytest.mark.parametrize(
    "script, layout",
    [
        ("image_classification", "A folder would hold train/CLASS/"),
        ("object_detection", "A folder would hold annotations/instances_train.json"),
        ("semantic_segmentation", "A folder would hold images/training with annotations/training"),
        ("universal_segmentation", "It would hold annotations/panoptic_train.json"),
    ],
)
def test_missing_data(script, layout, tmp_path):
    """The error shows how the folder should look."""
    flags = [f"--dataset_name={tmp_path / 'nowhere'}", f"--output_dir={tmp_path}", "--do_train", "--use_cpu"]
    if script == "semantic_segmentation":
        (tmp_path / "names.json").write_text('{"0": "cat"}')
        flags.append(f"--class_names={tmp_path / 'names.json'}")
    with pytest.raises(ValueError, match=layout):
        importlib.import_module(f"scripts.run_{script}").main(flags)


def test_checkpoint_of_another_model(tmp_path):
    flags = [str(RECIPES / "image_classification_digits.yaml"), "--smoke", f"--output_dir={tmp_path}", "--use_cpu"]
    flags += ["--per_device_train_batch_size=2", "--report_to=none"]
    main = importlib.import_module("scripts.run_image_classification").main
    main([*flags, f"--config_overrides={json.dumps(NANO)}"])
    wider = json.dumps(NANO | {"hidden_sizes": [8, 16, 24, 64]})
    with pytest.raises(ValueError, match="checkpoint-3 is a checkpoint of another model: .* should be"):
        main([*flags, f"--config_overrides={wider}", "--resume_from_checkpoint=true"])
