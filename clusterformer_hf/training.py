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
Trainer for long runs on one's own pictures: averaged weights, a learning rate for the backbone, NaN reports, resuming
after a killed run, model cards; and the steps that the training scripts share.
"""

import json
import logging
import shutil
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.modelcard import TrainingSummary
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from .model_card import render_model_card


logger = logging.getLogger(__name__)

# What training goes on from, in checkpoints whose model has the averaged weights.
TRAINING_WEIGHTS_NAME = "training_weights.pt"


@dataclass
class ClusterFormerTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] and what [`ClusterFormerTrainer`] knows beside them."""

    backbone_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the backbone; --learning_rate is then that of the rest."}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Evaluate and save an exponential moving average of the weights, which keeps this share of itself "
            "at each step (0.995 for some thousand steps, 0.9998 for a hundred thousand); less in the first steps."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"--ema_decay must be between 0 and 1, got {self.ema_decay}.")


class ClusterFormerTrainer(Trainer):
    """
    [`Trainer`] that ends a run with the step's number once pixels or the loss are NaN or infinite, tells the training
    data set its epoch if that has `set_epoch`, and leaves no checkpoint that looks complete and is not.

    Biases, norms and scales (parameters with one number a channel or head) do not decay. With
    [`ClusterFormerTrainingArguments`] the backbone may have a learning rate of its own, and evaluation, checkpoints and
    the final model may have averaged weights. Resumed runs are exact with them too.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(SetEpochCallback())
        self.average: AveragedModel | None = None

    def train(self, *args, **kwargs):
        decay = getattr(self.args, "ema_decay", None)
        if decay is None:
            return super().train(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("--ema_decay needs whole weights in each process: no FSDP and no DeepSpeed.")
        self.average = AveragedModel(self.model, multi_avg_fn=moving_average(decay))
        callback = AverageWeightsCallback(self.average)
        self.add_callback(callback)
        try:
            output = super().train(*args, **kwargs)
            # The best model was saved with the averaged weights of its step.
            if not (self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None):
                self.model.load_state_dict(self.average.module.state_dict())
            return output
        finally:
            self.average = None
            self.remove_callback(callback)

    @contextmanager
    def averaged_weights(self):
        """Inside, the model has the averaged weights while a training averages them."""
        pairs = []
        if self.average is not None:
            pairs = list(zip(self.model.parameters(), self.average.module.parameters(), strict=True))
        _swap(pairs)
        try:
            yield
        finally:
            _swap(pairs)

    def create_optimizer(self, model=None):
        backbone_learning_rate = getattr(self.args, "backbone_learning_rate", None)
        if self.optimizer is None and backbone_learning_rate is not None:
            trained = self.model if model is None else model
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = self._parameter_groups(trained, backbone_learning_rate)
            self.optimizer_cls_and_kwargs = (optimizer, options | {"params": groups})
        return super().create_optimizer(model)

    def _parameter_groups(self, model, backbone_learning_rate: float) -> list[dict]:
        """The rest, whose learning rate Trainer logs, then the backbone; of each what decays, then the others."""
        decayed, backbone = set(self.get_decay_parameter_names(model)), set(backbone_parameter_names(model))
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = [
            {
                "params": [p for name, p in named if (name in backbone, name in decayed) == (in_backbone, decays)],
                "lr": backbone_learning_rate if in_backbone else self.args.learning_rate,
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for in_backbone in (False, True)
            for decays in (True, False)
        ]
        return [group for group in groups if group["params"]]

    def get_decay_parameter_names(self, model) -> list[str]:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name in shapes and shapes[name][1:].numel() > 1]

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step + 1
        not_finite = inputs.pop("not_finite", None)
        if not_finite:
            raise FloatingPointError(f"NaN or infinite pixels at training step {step}: {', '.join(not_finite)}.")
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss).all():
            raise FloatingPointError(
                f"The loss is {loss.item()} at training step {step}, before its update of the weights. A lower "
                "--learning_rate, more --warmup_steps or --bf16 in place of --fp16 may help."
            )
        return loss

    def evaluation_loop(self, *args, **kwargs):
        # A data loader draws a seed. A run resumed behind an evaluation would miss that draw.
        with torch.random.fork_rng(devices=[]), self.averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    def _save(self, *args, **kwargs):
        with self.averaged_weights():
            super()._save(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save:
            torch.save(self.model.state_dict(), Path(output_dir) / TRAINING_WEIGHTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.module.load_state_dict(self.model.state_dict())
        path = Path(resume_from_checkpoint) / TRAINING_WEIGHTS_NAME
        if path.is_file():
            self.model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _save_checkpoint(self, model, trial):
        # Trainer writes its state last. An older checkpoint in the same folder must not lend its state to a new one
        # that breaks off.
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(self.args.output_dir).free / 2**20
            raise OSError(
                f"{folder} could not be written ({free:,.0f} MiB are free there): {error}\n"
                "The run goes on from its last complete checkpoint with --resume_from_checkpoint true."
            ) from error

    def _save_rng_state(self, output_dir):
        # The last files before the state: all processes must have written theirs.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def create_model_card(
        self, description: str = "", limits: str = "", data: str = "", settings: dict | None = None, **kwargs
    ):
        """
        Writes README.md. See [`render_model_card`] for the paragraphs; `settings` are listed with the hyperparameters;
        the other arguments are Trainer's.
        """
        if self.is_world_process_zero():
            summary = TrainingSummary.from_trainer(self, **kwargs)
            summary.hyperparameters |= settings or {}
            _restore_names(summary, self.state.log_history)
            card = render_model_card(summary, description, limits, data)
            Path(self.args.output_dir, "README.md").write_text(card, encoding="utf-8")


def _restore_names(summary: TrainingSummary, log_history: list[dict]):
    """Undoes `Ap50` and `Ap Dog` for AP50 and AP_dog; single classes are no columns of the training's course."""
    logged = {name.removeprefix("eval_") for entry in log_history for name in entry}
    names = {" ".join(map(str.capitalize, name.split("_"))): name for name in logged if not name.islower()}
    summary.eval_results = {names.get(key, key): value for key, value in (summary.eval_results or {}).items()}
    summary.eval_lines = [
        {names.get(key, key): value for key, value in line.items() if "_" not in names.get(key, key)}
        for line in summary.eval_lines or []
    ]


class SetEpochCallback(TrainerCallback):
    """Tells the training data set its epoch; accelerate does so in a single process only."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch))


class AverageWeightsCallback(TrainerCallback):
    """Averages the weights after every step."""

    def __init__(self, average: AveragedModel):
        self.average = average

    def on_train_begin(self, args, state, control, **kwargs):
        # As many as in a run that was never interrupted.
        self.average.n_averaged.fill_(state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)


def moving_average(decay: float) -> Callable:
    """
    [`AveragedModel`]'s `multi_avg_fn` for an average that keeps `decay` of itself at each step, and (1 + n) / (10 + n)
    in the first ones, so that an early evaluation does not see random weights.
    """

    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], num_averaged: torch.Tensor | int):
        number = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + number) / (10 + number)))(averaged, current, num_averaged)

    return update


def _swap(pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]]):
    for one, other in pairs:
        one.data, other.data = other.data, one.data


def backbone_parameter_names(model) -> list[str]:
    """
    The parameters of the part that is called `backbone` or, as in ClusterFormer, is the model's base model.

    Raises:
        `ValueError`: if there is none, or nothing else.
    """
    names = [name for name, _ in model.named_parameters()]
    found = [name for name in names if "backbone" in name.split(".")]
    found = found or [name for name in names if name.startswith(f"{model.base_model_prefix}.")]
    if not 0 < len(found) < len(names):
        raise ValueError(f"--backbone_learning_rate: {type(model).__name__} has no part that is known as its backbone.")
    return found


def start_run(args: TrainingArguments) -> str | None:
    """What a training script begins with: logging, seed, settings. Returns the checkpoint to go on from, if any."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO if args.should_log else logging.WARNING
    )
    if not args.do_train and not args.do_eval:
        raise ValueError("There is nothing to do: pass --do_train, --do_eval or both.")
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir) if args.do_train else None
    # The examples hold no column that Trainer needs to remove, and evaluation keeps no logits.
    args.remove_unused_columns = False
    args.batch_eval_metrics = True
    set_seed(args.seed)
    return checkpoint


def train_and_evaluate(trainer: Trainer, checkpoint: str | None, num_skipped: int):
    """Does what the arguments say, saves the model and writes `train_results.json` and `eval_results.json`."""
    if trainer.args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        metrics |= {"train_samples": len(trainer.train_dataset), "skipped_files": num_skipped}
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if trainer.args.do_eval:
        metrics = trainer.evaluate() | {"eval_samples": len(trainer.eval_dataset)}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def write_card(
    trainer: ClusterFormerTrainer, task: str, source: str, dataset_tags: str | None, settings: dict, **paragraphs
):
    """
    Writes the model card of a training, and pushes it with the model where that is asked for.

    Args:
        source: The data: a path, or a name on the Hub.
        dataset_tags: The kind of a folder of data, if it has a name on the Hub.
        settings, paragraphs: See [`ClusterFormerTrainer.create_model_card`].
    """
    is_local = Path(source).exists()
    card = {
        "tasks": task,
        "tags": [task, "vision", "clusterformer"],
        "dataset": Path(source).name if is_local else source,
        "dataset_tags": dataset_tags if is_local else source,
        "settings": settings,
        **paragraphs,
    }
    trainer.push_to_hub(**card) if trainer.args.push_to_hub else trainer.create_model_card(**card)


def classification_loss(label_smoothing: float = 0.0) -> Callable:
    """
    Cross-entropy as Trainer's `compute_loss_func`, for class ids (batch,) and for shares (batch, num_labels) as mixup
    and cutmix make them. Labels are smoothed in training alone, so that evaluation losses compare.
    """

    def compute_loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        logits = outputs["logits"].float()
        smoothing = label_smoothing if torch.is_grad_enabled() else 0.0
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        if num_items_in_batch is None:
            return loss / len(labels)
        # Trainer counts the entries of all labels that a step accumulates: num_labels for each picture's shares.
        return loss * (labels.numel() / len(labels)) / num_items_in_batch

    return compute_loss


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` means: a path, or the newest complete one of `output_dir` for true.

    Raises:
        `ValueError`: if the given checkpoint is incomplete, or none is complete; says what each lacks.
    """
    if str(resume_from_checkpoint).lower() in ("none", "false"):
        if sort_checkpoints(output_dir):
            logger.warning(
                f"{output_dir} has checkpoints of an earlier run, and this run starts anew. Take another --output_dir, "
                "or go on with --resume_from_checkpoint true."
            )
        return None
    if str(resume_from_checkpoint).lower() != "true":
        problem = checkpoint_problem(resume_from_checkpoint)
        if problem is not None:
            raise ValueError(f"Cannot resume from {resume_from_checkpoint}: {problem}.")
        return resume_from_checkpoint
    problems = []
    for checkpoint in reversed(sort_checkpoints(output_dir)):
        problem = checkpoint_problem(checkpoint)
        if problem is None:
            return checkpoint
        problems.append(f"{checkpoint}: {problem}")
        logger.warning(f"Skipping the incomplete checkpoint {problems[-1]}.")
    raise ValueError(f"There is no complete checkpoint in {output_dir} to resume from. {'; '.join(problems)}")


def checkpoint_problem(folder: str | Path) -> str | None:
    """What a Trainer checkpoint lacks to be resumed from, or None if it is complete. Reads no tensor."""
    folder = Path(folder)
    if not folder.is_dir():
        return "no such folder"
    for name in (TRAINER_STATE_NAME, SAFE_WEIGHTS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME):
        if not (folder / name).is_file():
            return f"{name} is missing"
    if not any(folder.glob("rng_state*.pth")):
        return "the state of the random numbers is missing"
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except ValueError:
        return f"{TRAINER_STATE_NAME} is truncated"
    try:
        safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt")
    except SafetensorError:
        return f"{SAFE_WEIGHTS_NAME} is truncated"
    for path in [*folder.glob("*.pt"), *folder.glob("rng_state*.pth")]:
        if not zipfile.is_zipfile(path):
            return f"{path.name} is truncated"
    return None
