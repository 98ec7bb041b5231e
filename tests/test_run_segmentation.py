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
"""scripts/run_semantic_segmentation.py, run_universal_segmentation.py and demo_segmentation.py on digit scenes."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hotcoco.panoptic import PanopticEval
from huggingface_hub import ModelCard
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageSegmentation,
    DeformableDetrImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    pipeline,
)

from clusterformer_hf import (
    ClusterFormerConfig,
    ClusterFormerForObjectDetection,
    ClusterFormerForSemanticSegmentation,
    ClusterFormerForUniversalSegmentation,
)
from clusterformer_hf.data.coco_panoptic import open_segments, segment_colours
from clusterformer_hf.data.digit_scenes import write_digit_scenes
from clusterformer_hf.data.rle import encode_masks
from clusterformer_hf.data.segmentation_augmentation import SegmentationAugmentationArguments
from clusterformer_hf.data.splits import SplitArguments, load_splits
from clusterformer_hf.loading import ModelArguments
from clusterformer_hf.recipes import parse_arguments
from clusterformer_hf.training import ClusterFormerTrainingArguments
from scripts import run_semantic_segmentation, run_universal_segmentation
from tests import nano


ROOT = Path(__file__).parents[1]
NANO = nano.BACKBONE | nano.DECODER | {"train_num_points": 256}
RANDOM = NANO | {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.1}
# Ids with gaps, not in the order of the file.
CATEGORIES = [
    {"id": 90, "name": "digit", "isthing": 1},
    {"id": 7, "name": "background", "isthing": 0},
]
NUM_SCENES = {"train": 12, "test": 5}
EMPTY_SCENE = 2
SIZE = {"shortest_edge": 64, "longest_edge": 107}
PLAIN = ["--horizontal_flip=0", "--min_scale=1", "--max_scale=1", "--photometric_distort=0"]
MAIN = {"semantic": run_semantic_segmentation.main}
MAIN |= dict.fromkeys(("panoptic", "instance"), run_universal_segmentation.main)


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
    """
    Digit scenes in which all digits are one class, and the background another, with an instance too. One scene of each
    split has no instances; in label maps the top row has no class.
    """
    folder = write_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", *NUM_SCENES.values(), size=64)
    (folder / "id2label.json").write_text(json.dumps({"0": "background", "1": "digit"}))
    for split in NUM_SCENES:
        edit(panoptic_file(folder, split), join_digits)
        edit(instance_file(folder, split), lambda content, split=split: add_background(content, folder, split))
        for path in (folder / f"semantic_{split}").iterdir():
            label_map = (np.asarray(Image.open(path)) < 10).astype(np.uint8)
            label_map[0] = 255
            Image.fromarray(label_map).save(path)
    return folder


def panoptic_file(folder, split="test") -> Path:
    return folder / "annotations" / f"panoptic_{split}.json"


def instance_file(folder, split="test") -> Path:
    return folder / "annotations" / f"instances_{split}.json"


def edit(path: Path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def join_digits(content: dict):
    content["categories"] = CATEGORIES
    for annotation in content["annotations"]:
        for entry in annotation.get("segments_info", [annotation]):
            entry["category_id"] = 7 if entry["category_id"] == 11 else 90


def add_background(content: dict, folder: Path, split: str):
    join_digits(content)
    for image in content["images"]:
        mask = open_segments(folder / f"panoptic_{split}" / image["file_name"]) // 1000 == 11
        rle = {"size": [64, 64], "counts": encode_masks(mask[None])[0].decode()}
        annotation = {"id": 1000 + image["id"], "image_id": image["id"], "category_id": 7, "segmentation": rle}
        content["annotations"].append(annotation | {"bbox": [0, 0, 64, 64], "area": int(mask.sum()), "iscrowd": 0})
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != EMPTY_SCENE]


def run(task, scenes, output_dir, *flags, config=None):
    config = ["--config_overrides", json.dumps(config)] if config else []
    data = [f"--dataset_name={scenes}"] if scenes else []
    data += ["--task=instance"] if task == "instance" and scenes else []
    fixed = [f"--output_dir={output_dir}", "--use_cpu", "--report_to=none", "--logging_steps=1"]
    fixed += ["--per_device_train_batch_size=4", "--per_device_eval_batch_size=2"]
    MAIN[task]([*data, *fixed, *config, *flags])


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory) -> dict[str, Path]:
    """Models trained until they find something, with averaged weights, each saved with its card."""
    folders = {task: tmp_path_factory.mktemp(task) for task in MAIN}
    flags = ["--do_train", "--do_eval", "--max_steps=60", "--learning_rate=5e-3", "--lr_scheduler_type=constant"]
    flags += [*PLAIN, "--seed=2", "--ema_decay=0.9", "--eval_strategy=steps", "--eval_steps=20", "--save_steps=20"]
    flags += ["--load_best_model_at_end", "--save_total_limit=2"]
    for task, metric in (("panoptic", "PQ"), ("instance", "AP50"), ("semantic", "mIoU")):
        run(task, scenes, folders[task], *flags, f"--metric_for_best_model={metric}", config=NANO)
    return folders


def results(output_dir, split="eval") -> dict:
    return json.loads((output_dir / f"{split}_results.json").read_text())


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("task", MAIN)
def test_saved_model(task, trained):
    config = ClusterFormerConfig.from_pretrained(trained[task])
    assert config.id2label == {0: "background", 1: "digit"}
    model_class = {"semantic": ClusterFormerForSemanticSegmentation}.get(task, ClusterFormerForUniversalSegmentation)
    assert config.architectures == [model_class.__name__]
    assert type(AutoModelForImageSegmentation.from_pretrained(trained[task])) is model_class
    if task == "semantic":
        assert dict(SegformerImageProcessor.from_pretrained(trained[task]).size) == SIZE
        assert config.original_category_ids == [0, 1]
    else:
        processor = Mask2FormerImageProcessor.from_pretrained(trained[task])
        assert dict(processor.size) == SIZE and processor.size_divisor == 4
        assert config.original_category_ids == [7, 90] and config.label_ids_to_fuse == (
            [0] if task == "panoptic" else []
        )
    auto_classes = {"semantic": {"AutoModelForSemanticSegmentation"}}
    auto_classes = auto_classes.get(task, {"AutoModelForUniversalSegmentation", "AutoModelForInstanceSegmentation"})
    assert config.auto_map.keys() == auto_classes | {"AutoConfig", "AutoModelForImageSegmentation"}
    counts = results(trained[task], "train")
    assert counts["train_samples"] == NUM_SCENES["train"] and counts["skipped_files"] == 0


@pytest.mark.parametrize("task, metric", [("panoptic", "PQ"), ("instance", "AP50"), ("semantic", "mIoU")])
def test_best_model_is_kept(task, metric, trained):
    state = json.loads((trained[task] / "trainer_state.json").read_text())
    values = [entry[f"eval_{metric}"] for entry in state["log_history"] if f"eval_{metric}" in entry][:3]
    assert state["best_metric"] == max(values) == results(trained[task])[f"eval_{metric}"] > 0
    assert_equal_weights(weights(trained[task]), weights(Path(state["best_model_checkpoint"])))


@pytest.mark.parametrize("task", MAIN)
def test_evaluation_alone_gives_the_same_numbers(task, trained, scenes, tmp_path):
    """Also with a data worker and the files named one by one; the seed chooses the points of the loss."""
    kinds = {"semantic": {"images": scenes / "test", "labels": scenes / "semantic_test"}}
    kinds["instance"] = {"images": scenes / "test", "annotations": instance_file(scenes)}
    kinds["panoptic"] = {
        "images": scenes / "test",
        "annotations": panoptic_file(scenes),
        "segments": scenes / "panoptic_test",
    }
    data = [f"--validation_{kind}={path}" for kind, path in kinds[task].items()]
    flags = ["--do_eval", "--seed=2", f"--model_name_or_path={trained[task]}", "--dataloader_num_workers=1"]
    run(task, None, tmp_path, *flags, *data)
    expected, found = results(trained[task]), results(tmp_path)
    names = {name for name in expected if not name.endswith(("time", "second", "epoch", "provenance"))}
    assert expected["provenance"]["weights"] == found["provenance"]["weights"]
    assert "eval_loss" in names and len(names) > 4
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    assert not (tmp_path / "README.md").exists()
    for name in ("coco_results.json", "panoptic_results.json"):
        assert (tmp_path / name).exists() == (trained[task] / name).exists()
        if (tmp_path / name).exists():
            assert json.loads((tmp_path / name).read_text()) == json.loads((trained[task] / name).read_text())


def test_instance_results_file(trained, scenes):
    """pycocotools reads it, and computes the average precision that was reported."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(instance_file(scenes)))
        found = truth.loadRes(str(trained["instance"] / "coco_results.json"))
        evaluation = COCOeval(truth, found, "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert set(found.getImgIds()) == set(range(1, NUM_SCENES["test"] + 1))
    assert set(found.getCatIds()) == {7, 90}
    reported = results(trained["instance"])
    assert evaluation.stats[1] == reported["eval_AP50"] and evaluation.stats[0] == reported["eval_AP"] > 0


def test_panoptic_results_files(trained, scenes):
    """hotcoco, which equals COCO's own tool, reads them, and computes the quality that was reported."""
    found = trained["panoptic"] / "panoptic_results.json"
    evaluation = PanopticEval(str(panoptic_file(scenes)), str(found), gt_folder=str(scenes / "panoptic_test"))
    evaluation.evaluate()
    expected, reported = evaluation.results(), results(trained["panoptic"])
    assert reported["eval_PQ_stuff"] > 0
    for suffix, group in (("", "All"), ("_things", "Things"), ("_stuff", "Stuff")):
        for name in ("PQ", "SQ", "RQ"):
            assert reported[f"eval_{name}{suffix}"] == pytest.approx(expected[group][name.lower()], abs=1e-9)


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_saved_folder_works_without_the_package(task, trained, scenes, tmp_path):
    """In a new process with an empty cache of modules, as the model card says."""
    pictures = [str(path) for path in sorted((scenes / "test").iterdir())]
    code = f"""
import sys
sys.modules["clusterformer_hf"] = None  # cannot be imported
from transformers import pipeline
predictor = pipeline("image-segmentation", model={str(trained[task])!r}, trust_remote_code=True, device="cpu")
for picture in {pictures!r}:
    print("found", [(row["label"], sum(row["mask"].tobytes()) // 255) for row in predictor(picture, threshold=0.5)])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    predictor = pipeline("image-segmentation", model=str(trained[task]), device="cpu")
    expected = [
        [(row["label"], int((np.asarray(row["mask"]) > 0).sum())) for row in predictor(picture, threshold=0.5)]
        for picture in pictures
    ]
    assert [line for line in ended.stdout.splitlines() if line.startswith("found")] == [f"found {x}" for x in expected]
    assert any(expected)


def test_one_model_has_the_scores_of_three_readings(trained):
    reported = results(trained["panoptic"])
    assert {"eval_PQ", "eval_SQ_things", "eval_RQ_stuff", "eval_AP", "eval_mIoU", "eval_IoU_digit"} < reported.keys()
    assert reported["eval_mIoU"] > 0.4  # the background at least


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_evaluation_equals_pipeline(task, trained, scenes):
    segment = pipeline("image-segmentation", model=str(trained[task]), device="cpu")
    confusion = np.zeros((2, 2))
    for path in sorted((scenes / "test").iterdir()):
        found = np.zeros((64, 64), int)
        for row in segment(str(path), subtask="semantic"):
            found[np.asarray(row["mask"]) > 0] = {"background": 0, "digit": 1}[row["label"]]
        truth = np.asarray(Image.open(scenes / "semantic_test" / path.name)).copy()
        if task == "panoptic":  # without void
            truth = (open_segments(scenes / "panoptic_test" / path.name) // 1000 != 11).astype(int)
        counted = truth != 255
        np.add.at(confusion, (truth[counted], found[counted]), 1)
    right, either = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    assert results(trained[task])["eval_mIoU"] == pytest.approx((right / either).mean())


@pytest.mark.parametrize("task", MAIN)
def test_model_card(task, trained):
    card = ModelCard.load(trained[task] / "README.md")
    assert card.data.pipeline_tag == "image-segmentation"
    numbers = {"semantic": "train 12 pictures with label maps", "panoptic": " masks, validation 5 pictures with "}
    for text in ("trained from scratch", "digit. ", "learning_rate: 0.005", "min_scale: 1", numbers.get(task, "masks")):
        assert text in card.text
    assert ("Without instances: background." in card.text) == (task == "panoptic")
    assert "| " + {"semantic": "mIoU", "panoptic": "PQ_things", "instance": "AP50"}[task] in card.text


# Six steps in epochs of three: a checkpoint inside an epoch (4) and one at the end.
LONG_RUN = ["--do_train", "--max_steps=6", "--save_steps=4", "--learning_rate=1e-3", "--eval_strategy=epoch"]
LONG_RUN += ["--ema_decay=0.5", "--backbone_learning_rate=5e-4", "--weight_decay=0.1"]


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_resumed_run_is_exact(task, scenes, tmp_path):
    run(task, scenes, tmp_path / "one", *LONG_RUN, config=RANDOM)
    shutil.copytree(tmp_path / "one" / "checkpoint-4", tmp_path / "two" / "checkpoint-4")
    run(task, scenes, tmp_path / "two", *LONG_RUN, "--resume_from_checkpoint=true", config=RANDOM)
    assert_equal_weights(weights(tmp_path / "two"), weights(tmp_path / "one"))
    one, two = (
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("one", "two")
    )
    losses = [[entry["eval_loss"] for entry in entries if "eval_loss" in entry] for entries in (one, two)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_detection_checkpoint(task, scenes, tmp_path, caplog):
    """It gives backbone and decoder, the log says what is new, and its image processor is not taken."""
    detector = ClusterFormerForObjectDetection(ClusterFormerConfig(**NANO, num_labels=5))
    detector.save_pretrained(tmp_path / "detector")
    DeformableDetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(tmp_path / "detector")
    flags = ["--do_train", "--max_steps=1", "--learning_rate=0", f"--model_name_or_path={tmp_path / 'detector'}"]
    caplog.set_level("INFO")
    run(task, scenes, tmp_path / "out", *flags)
    before, after = weights(tmp_path / "detector"), weights(tmp_path / "out")
    shared = before.keys() & after.keys()
    assert {name.split(".")[0] for name in shared} == {"clusterformer", "decoder"}
    assert len([name for name in shared if name.startswith("decoder.")]) > 10
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert f"Taken from {tmp_path / 'detector'}: clusterformer.* (" in caplog.text
    assert "Newly initialised, not from" in caplog.text and "class_head.bias, class_head.weight" in caplog.text
    assert "Not used of" in caplog.text and "class_heads.* (" in caplog.text
    assert "A new image processor is made: DeformableDetrImageProcessor is for another task" in caplog.text
    with pytest.raises(ValueError, match="cannot be evaluated as ClusterFormerFor.*: it has no class_head.bias"):
        run(task, scenes, tmp_path / "eval", "--do_eval", f"--model_name_or_path={tmp_path / 'detector'}")


def test_segmentation_checkpoints_are_taken_whole(trained, scenes, tmp_path, caplog):
    """From semantic to panoptic segmentation of the same classes: all weights are the checkpoint's."""
    caplog.set_level("INFO")
    flags = ["--do_train", "--max_steps=1", "--learning_rate=0", f"--model_name_or_path={trained['semantic']}"]
    run("panoptic", scenes, tmp_path, *flags)
    assert_equal_weights(weights(tmp_path), weights(trained["semantic"]))
    assert "Newly initialised" not in caplog.text
    # Nothing of the checkpoint's kind is left for pipelines to take it for.
    assert "AutoModelForSemanticSegmentation" not in ClusterFormerConfig.from_pretrained(tmp_path).auto_map
    assert type(AutoModelForImageSegmentation.from_pretrained(tmp_path)) is ClusterFormerForUniversalSegmentation


def test_reduced_labels_and_the_datasets_library(trained, scenes, tmp_path):
    """Ids from 1 with 0 for no class, from a folder of `save_to_disk`: the numbers are those of the plain files."""
    rows = {"image": [], "annotation": []}
    for path in sorted((scenes / "semantic_test").iterdir()):
        label_map = np.asarray(Image.open(path))
        reduced = tmp_path / path.name
        Image.fromarray(np.where(label_map == 255, 0, label_map + 1).astype(np.uint8)).save(reduced)
        rows["image"].append(str(scenes / "test" / path.name))
        rows["annotation"].append(str(reduced))
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    datasets.DatasetDict(validation=datasets.Dataset.from_dict(rows, features)).save_to_disk(tmp_path / "saved")
    flags = ["--do_eval", f"--model_name_or_path={trained['semantic']}", "--reduce_labels"]
    run("semantic", tmp_path / "saved", tmp_path / "out", *flags)
    assert results(tmp_path / "out")["eval_mIoU"] == results(trained["semantic"])["eval_mIoU"]


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_bf16_gradient_checkpointing_and_accumulation(task, scenes, tmp_path):
    """Recomputed activations give the same weights, the random numbers included; bf16 other ones, near."""
    for name, extra in {"plain": [], "recomputed": ["--gradient_checkpointing"], "bf16": ["--bf16"]}.items():
        flags = ["--do_train", "--max_steps=1", "--learning_rate=1e-3", "--gradient_accumulation_steps=2", *extra]
        run(task, scenes, tmp_path / name, *flags, config=RANDOM)
    plain, half = weights(tmp_path / "plain"), weights(tmp_path / "bf16")
    assert_equal_weights(weights(tmp_path / "recomputed"), plain)
    differences = [(plain[name] - half[name]).abs().max().item() for name in plain]
    assert 0 < max(differences) < 0.01 and all(tensor.dtype == torch.float32 for tensor in half.values())


def test_other_models(scenes, tmp_path):
    """Segformer takes no pixel mask and Mask2Former takes its labels as two lists."""
    segformer = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=2
    )
    mask2former = Mask2FormerConfig(
        backbone_config={
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1] * 4,
            "num_heads": [1] * 4,
            "window_size": 2,
        }
        | {"out_features": ["stage1", "stage2", "stage3", "stage4"]},
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=16,
        num_attention_heads=2,
        num_queries=5,
        train_num_points=64,
        num_labels=2,
    )
    models = {
        "semantic": (SegformerForSemanticSegmentation(segformer), SegformerImageProcessor(size=SIZE)),
        "panoptic": (Mask2FormerForUniversalSegmentation(mask2former), Mask2FormerImageProcessor(size=SIZE)),
    }
    for task, (model, processor) in models.items():
        model.save_pretrained(tmp_path / task)
        flags = ["--do_train", "--do_eval", "--max_steps=1", f"--model_name_or_path={tmp_path / task}"]
        with pytest.raises(ValueError, match="needs the image processor of its kind: --image_processor_name"):
            run(task, scenes, tmp_path / "out", *flags)
        processor.save_pretrained(tmp_path / task)
        run(task, scenes, tmp_path / f"{task}_out", *flags)
        assert 0 <= results(tmp_path / f"{task}_out")["eval_mIoU"] <= 1
        assert results(tmp_path / f"{task}_out")["eval_samples"] == NUM_SCENES["test"]


# Bad input.


def evaluate(task, trained, scenes, tmp_path, *flags):
    run(task, scenes, tmp_path / "out", "--do_eval", f"--model_name_or_path={trained[task]}", *flags)


@pytest.fixture
def copied(scenes, tmp_path) -> Path:
    return shutil.copytree(scenes, tmp_path / "copied")


def test_bad_label_maps_are_named_or_left_out(trained, copied, tmp_path):
    Image.new("L", (32, 64)).save(copied / "semantic_test" / "000001.png")
    Image.new("RGB", (64, 64)).save(copied / "semantic_test" / "000003.png")
    message = r"2 pictures of .* cannot be used:\n.*000001.png is 32 x 64 pixels, but its picture .*\n.*000003.png must"
    with pytest.raises(ValueError, match=message):
        evaluate("semantic", trained, copied, tmp_path)
    evaluate("semantic", trained, copied, tmp_path, "--skip_corrupt")
    assert results(tmp_path / "out")["eval_samples"] == 3


def test_bad_segments_are_named_or_left_out(trained, copied, tmp_path):
    path = copied / "panoptic_test" / "000002.png"
    segments = open_segments(path)
    segments[:8, :8] = 12345
    Image.fromarray(segment_colours(segments)).save(path)
    with pytest.raises(ValueError, match=r"000002.png, image 2 of .*in the PNG but not in `segments_info`: 12345"):
        evaluate("panoptic", trained, copied, tmp_path)
    evaluate("panoptic", trained, copied, tmp_path, "--skip_corrupt")
    assert results(tmp_path / "out")["eval_samples"] == 4


def test_bad_masks_are_named_or_left_out(scenes, copied, tmp_path):
    """An annotation that is left out is counted; its picture stays."""
    edit(instance_file(copied, "train"), lambda content: content["annotations"][0].update(segmentation=[[1, 2, 3, 4]]))
    flags = ["--do_train", "--max_steps=1"]
    with pytest.raises(ValueError, match=r"instances_train.json: annotation 1 of image 1 has a polygon of 4 numbers"):
        run("instance", copied, tmp_path / "out", *flags, config=NANO)
    run("instance", copied, tmp_path / "out", *flags, "--skip_corrupt", config=NANO)
    counts = results(tmp_path / "out", "train")
    assert counts["train_samples"] == NUM_SCENES["train"] and counts["skipped_files"] == 1


def test_wrong_classes(trained, copied, tmp_path):
    edit(panoptic_file(copied), lambda content: content["categories"][0].update(name="letter"))
    with pytest.raises(ValueError, match="panoptic_test.json: `categories` has 2 classes with the ids 7, 90.*letter"):
        evaluate("panoptic", trained, copied, tmp_path)


def test_classes_without_names(trained, copied, tmp_path):
    """Evaluation takes the model's; training needs a file."""
    for path in (copied / "id2label.json", copied / "annotations" / "semantic_labels.json"):
        path.unlink()
    evaluate("semantic", trained, copied, tmp_path)
    assert results(tmp_path / "out")["eval_mIoU"] == results(trained["semantic"])["eval_mIoU"]
    with pytest.raises(ValueError, match="Nothing names the classes: pass --class_names FILE"):
        run("semantic", copied, tmp_path / "new", "--do_train", "--max_steps=1", config=NANO)


@pytest.mark.parametrize(
    "task, flags, message",
    [
        ("semantic", [], "Pass either --dataset_name"),
        ("panoptic", [], "Pass either --dataset_name"),
        ("semantic", ["--train_images=x"], "--train_images and --train_labels go together: x and None"),
        ("panoptic", ["--train_segments=x"], "--train_segments is x"),
        (
            "panoptic",
            ["--train_images=x", "--train_annotations=y", "--task=panoptic"],
            "--train_segments and --validation_segments are for panoptic data",
        ),
        ("panoptic", ["--dataset_name=nowhere", "--do_train"], "--dataset_name nowhere is no folder"),
        ("semantic", ["--dataset_name=x", "--do_train", "--label_smoothing_factor=0.1"], "is for classification"),
        ("panoptic", ["--dataset_name=x"], "There is nothing to do"),
    ],
)
def test_wrong_arguments_are_refused(task, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(task, None, tmp_path, *flags)


def test_a_share_is_kept_for_validation(tmp_path):
    """Of a data set without validation split; the same pictures each time, and never in both parts."""

    class Numbers(list):
        source = "numbers"

        def select(self, rows):
            return Numbers(self[row] for row in rows)

    def split(do_train=True, do_eval=True, **options):
        args = ClusterFormerTrainingArguments(str(tmp_path), do_train=do_train, do_eval=do_eval, use_cpu=True)
        readers = {"train": lambda: (Numbers(range(20)), ["left out"])}
        return load_splits(readers, SplitArguments(**options), args, lambda data, skip, num_proc: (data, []))

    splits, skipped = split()
    assert skipped == ["left out"]
    assert len(splits["validation"]) == 3 and sorted(splits["train"] + splits["validation"]) == list(range(20))
    assert split()[0] == split(do_eval=False)[0] | split(do_train=False)[0] == splits
    assert [len(part) for part in split(max_train_samples=4, max_eval_samples=1)[0].values()] == [4, 1]
    with pytest.raises(ValueError, match="There is no validation split, only train"):
        split(train_val_split=0.0)


@pytest.mark.parametrize("size", [(61, 83), (64, 64), (50, 200)])
def test_new_image_processors_fit_the_masks(size):
    """Nothing is padded, and the sides are whole pixels of the masks, so that these cover the picture exactly."""
    picture, config = Image.new("RGB", size[::-1]), ClusterFormerConfig(**NANO | {"image_size": 50})
    processor = run_universal_segmentation.new_image_processor(config)
    inputs = processor(picture, return_tensors="pt")
    sides = np.array(inputs.pixel_values.shape[-2:])
    assert (sides % 4 == 0).all() and inputs.pixel_mask.all()
    exact = np.array(size) * min(50 / min(size), 83 / max(size))
    assert (np.abs(sides - exact) < 4.5).all()
    fixed = ClusterFormerConfig(**NANO | {"image_size": [48, 32]})
    pixels = run_semantic_segmentation.new_image_processor(fixed)(picture, return_tensors="pt")
    assert pixels.pixel_values.shape[-2:] == (48, 32)


RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*_segmentation_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_recipes(recipe):
    is_semantic = recipe.stem.startswith("semantic")
    script = run_semantic_segmentation if is_semantic else run_universal_segmentation
    types = (ModelArguments, script.DataArguments, SegmentationAugmentationArguments, ClusterFormerTrainingArguments)
    model, data, augmentation, training = parse_arguments(types, [str(recipe), "--use_cpu", "--dataset_name=here"])
    assert training.do_train and training.do_eval and training.ema_decay > 0.9 and training.learning_rate <= 1e-3
    metric = {"semantic": "mIoU", "instance": "AP", "panoptic": "PQ"}[recipe.stem.split("_")[0]]
    assert training.metric_for_best_model == metric and training.greater_is_better
    config = ClusterFormerConfig(**model.config_overrides)
    processor = script.new_image_processor(config)
    assert processor.size["shortest_edge"] == config.image_size
    assert augmentation.crop(processor)[0] >= config.image_size and np.prod(config.center_grid[-1]) >= 6


@pytest.mark.slow
def test_demo(tmp_path):
    """As a user runs it; an interrupted training goes on."""

    def demo(*flags):
        command = [sys.executable, ROOT / "scripts" / "demo_segmentation.py", f"--output_dir={tmp_path}", "--use_cpu"]
        command += ["--num_train=4", "--num_test=3", "--num_pictures=2", "--per_device_train_batch_size=2", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    printed = demo("--max_steps=2", "--save_steps=1", "--eval_steps=1")
    found = json.loads((tmp_path / "results.json").read_text())
    reported = results(tmp_path / "model")
    assert all(found[name] == reported[f"eval_{name}"] for name in ("PQ", "PQ_things", "AP50", "mIoU"))
    assert f"{found['parameters']:,}" in printed and found["seconds"] > 0
    for name in ("000001.png", "000002.png"):
        width, height = Image.open(tmp_path / "comparisons" / name).size
        assert width >= 3 * 288 and height >= 288
    demo("--max_steps=3", "--resume_from_checkpoint=true", "--save_steps=1", "--eval_steps=1")
    assert json.loads((tmp_path / "model" / "trainer_state.json").read_text())["global_step"] == 3
