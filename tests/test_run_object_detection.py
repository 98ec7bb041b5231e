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
"""scripts/run_object_detection.py on digit scenes, and what training with averaged weights and two rates shares."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DeformableDetrImageProcessor,
    ViTImageProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
    pipeline,
)

from clusterformer_hf import ClusterFormerConfig, ClusterFormerForImageClassification, ClusterFormerForObjectDetection
from clusterformer_hf.checkpoints import checkpoint_problem
from clusterformer_hf.data.digit_scenes import write_digit_scenes
from clusterformer_hf.loading import ModelArguments, load_config, load_fitting_image_processor, summarise
from clusterformer_hf.recipes import parse_arguments
from clusterformer_hf.training import (
    TRAINING_WEIGHTS_NAME,
    ClusterFormerTrainer,
    ClusterFormerTrainingArguments,
    backbone_parameter_names,
)
from scripts.run_object_detection import (
    DataArguments,
    DetectionAugmentationArguments,
    finds_boxes,
    main,
    new_image_processor,
)
from tests.nano import BACKBONE, DECODER


ROOT = Path(__file__).parents[1]
NANO = BACKBONE | DECODER
RANDOM = NANO | {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.1}
# Ids with gaps, not in the order of the file.
CATEGORIES = [{"id": 90, "name": "low"}, {"id": 7, "name": "high"}]
EMPTY_SCENE = 2
NUM_SCENES = {"train": 10, "test": 5}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Digit scenes of two classes; one of each split has no annotations."""
    folder = write_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", *NUM_SCENES.values(), size=64)
    for split in NUM_SCENES:
        content = json.loads(annotations(folder, split).read_text())
        content["categories"] = CATEGORIES
        content["annotations"] = [
            annotation | {"category_id": 90 if annotation["category_id"] <= 5 else 7}
            for annotation in content["annotations"]
            if annotation["image_id"] != EMPTY_SCENE
        ]
        annotations(folder, split).write_text(json.dumps(content))
    return folder


def annotations(folder, split) -> Path:
    return folder / "annotations" / f"instances_{split}.json"


def command(scenes, output_dir, *flags, config=None) -> list[str]:
    config = ["--config_overrides", json.dumps(config)] if config else []
    data = [f"--dataset_name={scenes}"] if scenes else []
    data += [f"--output_dir={output_dir}", "--use_cpu", "--report_to=none", "--logging_steps=1"]
    return [*data, "--per_device_train_batch_size=4", "--per_device_eval_batch_size=2", *config, *flags]


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> Path:
    """A model trained until it finds some digits, with averaged weights, and saved with its card."""
    output_dir = tmp_path_factory.mktemp("trained")
    flags = ["--do_train", "--do_eval", "--max_steps=45", "--learning_rate=1e-2", "--lr_scheduler_type=constant"]
    flags += ["--crop=0", "--horizontal_flip=0", "--min_scale=1", "--photometric_distort=0", "--ema_decay=0.9"]
    flags += ["--eval_strategy=steps", "--eval_steps=15", "--save_steps=15", "--load_best_model_at_end"]
    main(command(scenes, output_dir, *flags, "--metric_for_best_model=AP", config=NANO))
    return output_dir


def results(output_dir, split="eval") -> dict:
    return json.loads((output_dir / f"{split}_results.json").read_text())


def detections(output_dir) -> list[dict]:
    return json.loads((output_dir / "coco_results.json").read_text())


def log_history(output_dir) -> list[dict]:
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def test_saved_model(trained):
    config = ClusterFormerConfig.from_pretrained(trained)
    assert config.id2label == {0: "high", 1: "low"} and config.original_category_ids == [7, 90]
    assert config.architectures == ["ClusterFormerForObjectDetection"]
    processor = DeformableDetrImageProcessor.from_pretrained(trained)
    assert dict(processor.size) == {"shortest_edge": 64, "longest_edge": 107}
    counts = results(trained, "train")
    assert counts["train_samples"] == NUM_SCENES["train"] and counts["skipped_files"] == 0
    assert results(trained)["eval_samples"] == NUM_SCENES["test"]


def test_best_model_is_kept(trained):
    state = json.loads((trained / "trainer_state.json").read_text())
    precisions = [entry["eval_AP"] for entry in state["log_history"] if "eval_AP" in entry][:3]
    assert state["best_metric"] == max(precisions) == results(trained)["eval_AP"] > 0
    assert_equal_weights(weights(trained), weights(Path(state["best_model_checkpoint"])))


def test_evaluation_alone_gives_the_same_numbers(trained, scenes, tmp_path):
    """Also with a data worker, and without the training pictures."""
    data = [f"--validation_images={scenes / 'test'}", f"--validation_annotations={annotations(scenes, 'test')}"]
    flags = ["--do_eval", f"--model_name_or_path={trained}", "--dataloader_num_workers=1"]
    main(command(None, tmp_path, *flags, *data))
    timeless = {name: value for name, value in results(trained).items() if not name.endswith(("time", "second"))}
    del timeless["epoch"]
    origin = timeless.pop("provenance")
    assert origin["weights"] == results(tmp_path)["provenance"]["weights"] and origin["dataset"] == scenes.name
    assert {"eval_AP", "eval_AP50", "eval_AP_low", "eval_AP_high"} < timeless.keys()
    for name, value in timeless.items():
        assert results(tmp_path)[name] == value, name
    assert detections(tmp_path) == detections(trained)
    assert not (tmp_path / "README.md").exists()


def test_results_file(trained, scenes):
    """pycocotools reads it, finds the original ids in it, and computes the average precision that was reported."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations(scenes, "test")))
        found = truth.loadRes(str(trained / "coco_results.json"))
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert set(found.getImgIds()) == set(range(1, NUM_SCENES["test"] + 1))
    assert {result["category_id"] for result in detections(trained)} == {7, 90}
    assert evaluation.stats[0] == results(trained)["eval_AP"] and evaluation.stats[1] == results(trained)["eval_AP50"]


def test_evaluation_equals_pipeline(trained, scenes):
    detect = pipeline("object-detection", model=str(trained), device="cpu")
    predictions = detect(str(scenes / "test" / "000001.png"), threshold=0.2)
    expected = [row for row in detections(trained) if row["image_id"] == 1 and row["score"] > 0.2]
    assert len(predictions) == len(expected) > 0
    names = {category["id"]: category["name"] for category in CATEGORIES}
    for prediction, row in zip(sorted(predictions, key=lambda row: -row["score"]), expected):
        assert prediction["label"] == names[row["category_id"]]
        assert prediction["score"] == pytest.approx(row["score"], abs=1e-5)
        x, y, width, height = row["bbox"]
        assert list(prediction["box"].values()) == pytest.approx([x, y, x + width, y + height], abs=1.01)


def test_model_card(trained, scenes):
    card = ModelCard.load(trained / "README.md")
    assert card.data.pipeline_tag == "object-detection" and card.data.datasets is None
    number = len(json.loads(annotations(scenes, "train").read_text())["annotations"])
    for text in (
        "trained from scratch",
        "It finds 2 classes of objects: high, low.",
        f"train 10 pictures with {number} boxes, validation 5 pictures",
        "learning_rate: 0.01",
        "min_scale: 1",
    ):
        assert text in card.text
    results_table, course = (card.text.split(title)[1] for title in ("## Results", "## Training"))
    assert re.search(rf"\| AP50 +\| {results(trained)['eval_AP50']:.4f}", results_table)
    assert "| AP_low " in results_table and " AP75 " in course and "AP_low" not in course


# Six steps in epochs of three: checkpoints inside an epoch (2, 4) and at its end (6).
LONG_RUN = ["--do_train", "--max_steps=6", "--save_steps=2", "--learning_rate=1e-3", "--eval_strategy=epoch"]
LONG_RUN += ["--ema_decay=0.5", "--backbone_learning_rate=5e-4", "--weight_decay=0.1"]


@pytest.fixture(scope="module")
def uninterrupted(scenes, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    main(command(scenes, output_dir, *LONG_RUN, config=RANDOM))
    return output_dir


@pytest.mark.parametrize("step", [2, 4])
def test_resumed_run_is_exact(step, scenes, uninterrupted, tmp_path):
    """Weights, their average and the optimizer, bit by bit; the evaluations as well."""
    shutil.copytree(uninterrupted / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    main([*command(scenes, tmp_path, *LONG_RUN, config=RANDOM), "--resume_from_checkpoint=true"])
    for folder in (tmp_path, tmp_path / "checkpoint-6"):
        assert_equal_weights(weights(folder), weights(uninterrupted))
    final = [torch.load(folder / "checkpoint-6" / TRAINING_WEIGHTS_NAME) for folder in (tmp_path, uninterrupted)]
    assert_equal_weights(*final)
    final = [torch.load(folder / "checkpoint-6" / "optimizer.pt") for folder in (tmp_path, uninterrupted)]
    for state, expected in zip(final[0]["state"].values(), final[1]["state"].values(), strict=True):
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    last, expected = (evaluations(folder)[-1] for folder in (tmp_path, uninterrupted))
    assert last["eval_loss"] == expected["eval_loss"] and last["eval_AP"] == expected["eval_AP"]


def evaluations(folder) -> list[dict]:
    return [entry for entry in log_history(folder) if "eval_loss" in entry]


def test_average_of_the_weights(scenes, tmp_path):
    """Checkpoints hold the average that its definition gives, evaluations see it, and the saved model is the last."""
    flags = ["--do_train", "--max_steps=4", "--save_steps=1", "--learning_rate=1e-2", "--ema_decay=0.2"]
    flags += ["--eval_strategy=steps", "--eval_steps=4"]
    main(command(scenes, tmp_path, *flags, config=NANO))
    average = None
    for number in range(4):
        folder = tmp_path / f"checkpoint-{number + 1}"
        current = torch.load(folder / TRAINING_WEIGHTS_NAME)
        decay = min(0.2, (1 + number) / (10 + number))
        if average is None:
            average = current
        average = {name: decay * average[name] + (1 - decay) * tensor for name, tensor in current.items()}
        torch.testing.assert_close(weights(folder), average, rtol=1e-5, atol=1e-7)
    assert_equal_weights(weights(tmp_path), weights(tmp_path / "checkpoint-4"))

    # The average and, in another folder, the weights that are trained on.
    raw = shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "raw")
    save_file(current, raw / "model.safetensors", metadata={"format": "pt"})
    losses = []
    for folder in (tmp_path / "checkpoint-4", raw):
        main(command(scenes, tmp_path / "out", "--do_eval", f"--model_name_or_path={folder}"))
        losses.append(results(tmp_path / "out")["eval_loss"])
    assert evaluations(tmp_path)[-1]["eval_loss"] == losses[0] != losses[1]


def test_damaged_average_is_found(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted / "checkpoint-4", tmp_path / "checkpoint-4")
    assert checkpoint_problem(folder) is None
    path = folder / TRAINING_WEIGHTS_NAME
    os.truncate(path, path.stat().st_size // 2)
    assert checkpoint_problem(folder) == f"{TRAINING_WEIGHTS_NAME} is truncated"


def test_resuming_without_the_average(scenes, uninterrupted, tmp_path):
    """The training goes on from its own weights, not from the average, and saves these."""
    shutil.copytree(uninterrupted / "checkpoint-4", tmp_path / "checkpoint-4")
    flags = [flag for flag in LONG_RUN if "ema_decay" not in flag]
    main([*command(scenes, tmp_path, *flags, config=RANDOM), "--resume_from_checkpoint=true"])
    assert_equal_weights(weights(tmp_path), torch.load(uninterrupted / "checkpoint-6" / TRAINING_WEIGHTS_NAME))


def test_two_learning_rates(scenes, tmp_path):
    """A backbone of rate 0 stays as it is, to the last bit; all else moves."""
    ClusterFormerForObjectDetection(ClusterFormerConfig(**NANO)).save_pretrained(tmp_path / "start")
    flags = ["--do_train", "--max_steps=2", "--learning_rate=1e-2", "--backbone_learning_rate=0"]
    flags += [f"--model_name_or_path={tmp_path / 'start'}", "--weight_decay=0.1"]
    main(command(scenes, tmp_path / "out", *flags))
    before, after = weights(tmp_path / "start"), weights(tmp_path / "out")
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    assert unmoved == {name for name in before if name.startswith("clusterformer.")}
    groups = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt")["param_groups"]
    rates = [(group["initial_lr"], group["weight_decay"]) for group in groups]
    assert rates == [(0.01, 0.1), (0.01, 0.0), (0.0, 0.1), (0.0, 0.0)]


def test_parameters_that_do_not_decay(tmp_path):
    model = ClusterFormerForObjectDetection(ClusterFormerConfig(**NANO, num_labels=1))
    trainer = ClusterFormerTrainer(model, ClusterFormerTrainingArguments(str(tmp_path), use_cpu=True))
    decayed = set(trainer.get_decay_parameter_names(model))
    for name, parameter in model.named_parameters():
        no_decay = name.endswith("bias") or "norm" in name or "scale" in name or name.endswith("spatial_weight")
        assert (name in decayed) != no_decay, (name, parameter.shape)


def test_backbone_parameter_names():
    model = ClusterFormerForObjectDetection(ClusterFormerConfig(**NANO))
    names = set(backbone_parameter_names(model))
    assert names == {f"clusterformer.{name}" for name, _ in model.clusterformer.named_parameters()}
    with pytest.raises(ValueError, match="ClusterFormerModel has no part that is known as its backbone"):
        backbone_parameter_names(model.clusterformer)


def test_classification_checkpoint(scenes, tmp_path, caplog):
    """It gives its backbone, and the log says what is new."""
    config = ClusterFormerConfig(**BACKBONE, num_labels=5)
    ClusterFormerForImageClassification(config).save_pretrained(tmp_path / "classifier")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "classifier")
    flags = ["--do_train", "--max_steps=1", "--learning_rate=0", f"--model_name_or_path={tmp_path / 'classifier'}"]
    caplog.set_level("INFO")
    main(command(scenes, tmp_path / "out", *flags, config=DECODER))
    before, after = weights(tmp_path / "classifier"), weights(tmp_path / "out")
    shared = {name for name in after if name.startswith("clusterformer.")}
    assert len(shared) > 50 and shared <= before.keys()
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert f"Taken from {tmp_path / 'classifier'}: clusterformer.* ({len(shared)} weights)." in caplog.text
    assert "Newly initialised, not from" in caplog.text and "decoder.* (" in caplog.text
    assert "Not used of" in caplog.text and "classifier.bias, classifier.weight" in caplog.text
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path / "out"), DeformableDetrImageProcessor)
    auto_map = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModelForObjectDetection"}  # without this package, pipelines read it
    with pytest.raises(
        ValueError, match="cannot be evaluated as ClusterFormerForObjectDetection: it has no class_heads"
    ):
        main(command(scenes, tmp_path / "eval", "--do_eval", f"--model_name_or_path={tmp_path / 'classifier'}"))


def test_summarise():
    names = ["b.x", *(f"a.{n}" for n in range(4)), "b.w"]
    assert summarise(names) == "a.* (4 weights), b.w, b.x"


def test_new_classes(trained, scenes, tmp_path):
    """Fine-tuning on other classes takes a new head, and keeps the rest."""
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    content = json.loads(annotations(folder, "train").read_text())
    content["categories"].append({"id": 1000, "name": "none"})
    annotations(folder, "train").write_text(json.dumps(content))
    run = command(folder, tmp_path / "out", "--do_train", "--max_steps=1", f"--model_name_or_path={trained}")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        main(run)
    main([*run, "--ignore_mismatched_sizes", "--learning_rate=0"])
    config = ClusterFormerConfig.from_pretrained(tmp_path / "out")
    assert config.original_category_ids == [7, 90, 1000] and list(config.id2label.values()) == ["high", "low", "none"]
    before, after = weights(trained), weights(tmp_path / "out")
    new = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert new == {"class_heads"}


def test_same_classes_in_another_order(trained, scenes, tmp_path):
    """The model's order stays, and with it its heads; the ids follow the new file."""
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    swap = {7: 90, 90: 7}
    for split in NUM_SCENES:
        content = json.loads(annotations(folder, split).read_text())
        for entry in content["categories"]:
            entry["id"] = swap[entry["id"]]
        for entry in content["annotations"]:
            entry["category_id"] = swap[entry["category_id"]]
        annotations(folder, split).write_text(json.dumps(content))
    flags = ["--do_train", "--do_eval", "--max_steps=1", "--learning_rate=0", f"--model_name_or_path={trained}"]
    main(command(folder, tmp_path / "out", *flags))
    config = ClusterFormerConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {0: "high", 1: "low"} and config.original_category_ids == [90, 7]
    assert results(tmp_path / "out")["eval_AP"] == pytest.approx(results(trained)["eval_AP"], abs=1e-6)


def test_bf16_and_gradient_checkpointing(scenes, tmp_path):
    """Recomputed activations give the same weights, the same random numbers included; bf16 other ones, near."""
    for name, extra in {"plain": [], "recomputed": ["--gradient_checkpointing"], "bf16": ["--bf16"]}.items():
        run = ["--do_train", "--max_steps=2", "--learning_rate=1e-3", "--ema_decay=0.1", *extra]
        main(command(scenes, tmp_path / name, *run, config=RANDOM))
    plain, half = weights(tmp_path / "plain"), weights(tmp_path / "bf16")
    assert_equal_weights(weights(tmp_path / "recomputed"), plain)
    differences = [(plain[name] - half[name]).abs().max().item() for name in plain]
    assert 0 < max(differences) < 0.01 and all(tensor.dtype == torch.float32 for tensor in half.values())


def test_gradient_accumulation(scenes, tmp_path):
    """A step on two batches has the mean of their losses: as large as each, not their sum."""
    flags = ["--do_train", "--max_steps=1", "--learning_rate=0"]
    for steps in (1, 2):
        main(command(scenes, tmp_path / str(steps), *flags, f"--gradient_accumulation_steps={steps}", config=NANO))
    one, two = (results(tmp_path / str(steps), "train")["train_loss"] for steps in (1, 2))
    assert 0.7 * one < two < 1.4 * one


def test_objects_of_the_datasets_library(scenes, tmp_path):
    """A folder of `save_to_disk`, of which a share is kept for validation."""
    content = json.loads(annotations(scenes, "train").read_text())
    rows = []
    for image in content["images"]:
        found = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        objects = {
            "bbox": [entry["bbox"] for entry in found],
            "category": [entry["category_id"] // 50 for entry in found],
        }
        rows.append({"image": str(scenes / "train" / image["file_name"]), "objects": objects})
    features = datasets.Features(
        image=datasets.Image(),
        objects={
            "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
            "category": datasets.List(datasets.ClassLabel(names=["high", "low"])),
        },
    )
    datasets.Dataset.from_list(rows, features).save_to_disk(tmp_path / "saved")
    flags = ["--do_train", "--do_eval", "--max_steps=1", "--train_val_split=0.3"]
    main(command(tmp_path / "saved", tmp_path / "out", *flags, config=NANO))
    assert results(tmp_path / "out", "train")["train_samples"] == 7 and results(tmp_path / "out")["eval_samples"] == 3
    assert {result["category_id"] for result in detections(tmp_path / "out")} <= {0, 1}


def test_numbers_of_samples(scenes, tmp_path):
    flags = ["--do_train", "--do_eval", "--max_steps=1", "--max_train_samples=6", "--max_eval_samples=2"]
    main(command(scenes, tmp_path, *flags, "--fast_metric", "--pad_to_multiple_of=32", config=NANO))
    assert results(tmp_path, "train")["train_samples"] == 6 and results(tmp_path)["eval_samples"] == 2
    assert len({result["image_id"] for result in detections(tmp_path)}) == 2


def test_other_models(scenes, tmp_path):
    """Any object detector of transformers: here one with softmax, boxes for each query and no mask of padding."""
    config = YolosConfig(
        image_size=[64, 64],
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_detection_tokens=10,
    )
    YolosForObjectDetection(config).save_pretrained(tmp_path / "yolos")
    flags = ["--do_train", "--do_eval", "--max_steps=1", "--ignore_mismatched_sizes"]
    run = command(scenes, tmp_path / "out", *flags, f"--model_name_or_path={tmp_path / 'yolos'}")
    with pytest.raises(ValueError, match="A yolos model needs the image processor of its kind"):
        main(run)
    YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(tmp_path / "yolos")
    main(run)
    assert len(detections(tmp_path / "out")) == 10 * NUM_SCENES["test"]
    assert AutoModelForObjectDetection.from_pretrained(tmp_path / "out").config.original_category_ids == [7, 90]


def test_new_image_processor():
    sizes = {800: (800, 1333), (480, 640): (480, 640), (640, 480): (480, 640)}
    for image_size, (shortest, longest) in sizes.items():
        processor = new_image_processor(ClusterFormerConfig(image_size=image_size))
        assert dict(processor.size) == {"shortest_edge": shortest, "longest_edge": longest}


def test_image_processor_of_another_size(tmp_path):
    """Made anew with the checkpoint's mean where `image_size` is overridden; a named one must not contradict."""
    ClusterFormerConfig(**NANO).save_pretrained(tmp_path)
    size, mean = {"shortest_edge": 64, "longest_edge": 107}, [0.1, 0.2, 0.3]
    DeformableDetrImageProcessor(size=size, image_mean=mean).save_pretrained(tmp_path)

    def load(overrides, **flags):
        args = ModelArguments(model_name_or_path=str(tmp_path), config_overrides=overrides, **flags)
        return load_fitting_image_processor(args, load_config(args), finds_boxes, new_image_processor)

    assert dict(load({}).size) == size
    larger = load({"image_size": 96})
    assert dict(larger.size) == {"shortest_edge": 96, "longest_edge": 160} and list(larger.image_mean) == mean
    assert dict(load({"image_size": 64}, image_processor_name=str(tmp_path)).size) == size
    with pytest.raises(ValueError, match="says image_size 96: leave out one of them"):
        load({"image_size": 96}, image_processor_name=str(tmp_path))


def test_corrupt_pictures(scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    cut, turned = folder / "train" / "000003.png", folder / "test" / "000001.png"
    cut.write_bytes(cut.read_bytes()[:200])
    Image.open(turned).resize((64, 32)).save(turned)
    run = command(folder, tmp_path / "out", "--do_train", "--do_eval", "--max_steps=1", config=NANO)
    with pytest.raises(ValueError, match="1 pictures of .*instances_train.json cannot be used:\n .*000003.png: "):
        main(run)
    main([*run, "--skip_corrupt"])
    assert results(tmp_path / "out", "train")["train_samples"] == 9
    assert results(tmp_path / "out", "train")["skipped_files"] == 2
    assert results(tmp_path / "out")["eval_samples"] == 4
    assert "2 pictures that could not be used were left out" in (tmp_path / "out" / "README.md").read_text()


def test_bad_annotations(scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    run = command(folder, tmp_path / "out", "--do_train", config=NANO)
    file = annotations(folder, "train")
    content = json.loads(file.read_text())
    (folder / "train" / "000004.png").unlink()
    with pytest.raises(ValueError, match=rf"{file}: 1 pictures of `images` are missing: .*000004.png"):
        main(run)
    content["annotations"][0]["category_id"] = 8
    file.write_text(json.dumps(content | {"images": content["images"][:3] + content["images"][4:]}))
    with pytest.raises(ValueError, match=rf"{file}: annotations whose `\w+` is unknown"):
        main(run)
    file.write_text('{"images": [},')
    with pytest.raises(ValueError, match=rf"{file} is no JSON: line 1, column 13"):
        main(run)


def test_classes_that_the_model_does_not_know(trained, scenes, tmp_path):
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    content = json.loads(annotations(folder, "test").read_text())
    content["categories"].append({"id": 91, "name": "zebra"})
    annotations(folder, "test").write_text(json.dumps(content))
    message = r"instances_test.json: `categories` has 3 classes with the ids 7, 90, 91, the model 2.*zebra"
    with pytest.raises(ValueError, match=message):
        main(command(folder, tmp_path / "out", "--do_eval", f"--model_name_or_path={trained}"))


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "nothing to do: pass --do_train, --do_eval"),
        (["--do_eval"], "--do_eval alone needs --model_name_or_path"),
        (["--do_train", "--ema_decay=1"], "--ema_decay must be between 0 and 1, got 1.0"),
        (["--do_train", "--label_smoothing_factor=0.1"], "--label_smoothing_factor is for classification"),
        (["--do_train", "--train_images=here"], "--train_images and --train_annotations go together: here and None"),
        (["--do_train", "--train_images=here", "--train_annotations=x.json"], "Pass either --dataset_name, or"),
        (["--do_train", "--min_scale=0"], "--min_scale and --max_scale must be positive"),
        (["--do_train", '--config_overrides={"decoder_layer": 1}'], "decoder_layer is no field of ClusterFormerConfig"),
    ],
)
def test_bad_flags(flags, message, scenes, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(command(scenes, tmp_path, *flags))


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="Pass either --dataset_name, or --train_images"):
        main(command(None, tmp_path, "--do_train"))
    with pytest.raises(ValueError, match=f"There is no annotations/instances_train.json nor .* in {tmp_path}"):
        main(command(tmp_path, tmp_path / "out", "--do_train"))


RECIPES = sorted((ROOT / "scripts" / "recipes").glob("object_detection_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_recipes(recipe):
    types = (ModelArguments, DataArguments, DetectionAugmentationArguments, ClusterFormerTrainingArguments)
    model, data, augmentation, training = parse_arguments(types, [str(recipe), "--use_cpu", "--dataset_name=here"])
    assert training.do_train and training.ema_decay > 0.9 and training.metric_for_best_model == "AP"
    assert training.greater_is_better and training.learning_rate <= 1e-3
    config = ClusterFormerConfig(**model.config_overrides)
    assert new_image_processor(config).size["shortest_edge"] == config.image_size
    assert np.prod(config.center_grid[-1]) >= 6


def test_recipe_of_the_digit_scenes(scenes, tmp_path):
    """Runs as it is, but for the number of steps."""
    recipe = str(ROOT / "scripts" / "recipes" / "object_detection_digit_scenes.yaml")
    flags = ["--max_steps=1", f"--dataset_name={scenes}", f"--output_dir={tmp_path}", "--use_cpu", "--eval_steps=1"]
    main([recipe, *flags, "--save_steps=1", "--per_device_train_batch_size=2"])
    model = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert 1.0e6 < model.num_parameters() < 1.4e6 and results(tmp_path)["eval_samples"] == 5
