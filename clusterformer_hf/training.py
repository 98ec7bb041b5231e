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
"""Trainer for long runs on one's own pictures: NaN reports, resuming after a killed run, model cards."""

import json
import logging
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback
from transformers.modelcard import TrainingSummary
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from .model_card import render_model_card


logger = logging.getLogger(__name__)


class ClusterFormerTrainer(Trainer):
    """
    [`Trainer`] that ends a run with the step's number once pixels or the loss are NaN or infinite, tells the training
    data set its epoch if that has `set_epoch`, and leaves no checkpoint that looks complete and is not.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(SetEpochCallback())

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
        with torch.random.fork_rng(devices=[]):
            return super().evaluation_loop(*args, **kwargs)

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
            card = render_model_card(summary, description, limits, data)
            Path(self.args.output_dir, "README.md").write_text(card, encoding="utf-8")


class SetEpochCallback(TrainerCallback):
    """Tells the training data set its epoch; accelerate does so in a single process only."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch))


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
