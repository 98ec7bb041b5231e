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

import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import parse_flag_from_env
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.modelcard import TrainingSummary
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import hub
from .checkpoints import UNFINISHED_FOLDER, check_same_model, find_checkpoint, prune, publish
from .data.streaming import StreamingDataset
from .interruption import EXIT_CODE, InterruptionCallback, mark, undisturbed
from .loss_clusterformer import accumulated
from .model_card import RECORD_NAME, TrainingRecord, origin, render_model_card
from .modeling_clusterformer import ClusterFormerPreTrainedModel
from .provenance import PROVENANCE, ForeignResultsError, provenance, public_name, read_for
from .throughput import describe_throughput, measure_throughput
from .training_log import CURVES_NAME, TrainingLog, clustering_health, draw_curves


logger = logging.getLogger(__name__)

# What training goes on from, in checkpoints whose model has the averaged weights.
TRAINING_WEIGHTS_NAME = "training_weights.pt"


@dataclass
class ClusterFormerTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] and what [`ClusterFormerTrainer`] knows beside them. Logs go to TensorBoard, and models to the
    Hub when they are whole.
    """

    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Where logs go: tensorboard, none, all, or other integrations."}
    )

    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "What --push_to_hub uploads: `end` the repository of the trained model; `every_save`, `checkpoint` "
            "and `all_checkpoints` also, while it is trained, the files of the output folder."
        },
    )
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
    measure_throughput: bool = field(
        default=False,
        metadata={"help": "Do not train, but measure samples a second of the loader, the model and both, and end."},
    )
    amsgrad: bool = field(default=False, metadata={"help": "AdamW's AMSGrad form."})
    total_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pictures of a step, over all processes: --gradient_accumulation_steps is what is missing to it."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.total_train_batch_size is not None:
            self.gradient_accumulation_steps = self._accumulation()
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"--ema_decay must be between 0 and 1, got {self.ema_decay}.")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"hub_token": None}  # training_args.bin is shared with the model

    def _accumulation(self) -> int:
        """Batches that each process accumulates for a step of `total_train_batch_size` pictures."""
        total, processes = self.total_train_batch_size, self.world_size
        at_once = self.train_batch_size * processes
        if total < 1 or total % at_once:
            fitting = [size for size in range(1, total // processes + 1) if total % (size * processes) == 0]
            advice = f"sizes that do: {', '.join(map(str, fitting))}" if fitting else "no size does"
            raise ValueError(
                f"--total_train_batch_size {total} is no multiple of {at_once}, the pictures of {processes} processes "
                f"with --per_device_train_batch_size {self.train_batch_size} ({advice})."
            )
        if self.gradient_accumulation_steps not in (1, total // at_once):
            raise ValueError(
                f"--total_train_batch_size {total} with {processes} processes of {self.train_batch_size} pictures "
                f"accumulates {total // at_once} batches, --gradient_accumulation_steps says "
                f"{self.gradient_accumulation_steps}."
            )
        return total // at_once


class CheckpointError(OSError):
    """A checkpoint that could not be written."""


class ClusterFormerTrainer(Trainer):
    """
    [`Trainer`] that ends a run with the step's number once pixels or the loss are NaN or infinite, tells the training
    data set its epoch if that has `set_epoch`, leaves no checkpoint that looks complete and is not, and ends with a
    checkpoint when it is told to by a signal ([`InterruptionCallback`]). A step gives the same weights whatever number
    of processes and of batches its pictures come in.

    Biases, norms and scales (parameters with one number a channel or head) do not decay. With
    [`ClusterFormerTrainingArguments`] the backbone may have a learning rate of its own, and evaluation, checkpoints and
    the final model may have averaged weights. Resumed runs are exact with them too.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(SetEpochCallback())
        self.interruption = InterruptionCallback()
        self.add_callback(self.interruption)
        self.average: AveragedModel | None = None
        self._step_labels: list[torch.Tensor] = []
        self.training_log = TrainingLog()
        self._check_sharding()
        if self.is_fsdp_enabled and isinstance(self.model, ClusterFormerPreTrainedModel):
            # accelerate looks for embeddings that share weights, which models of pictures have none of.
            self.model.get_input_embeddings = self.model.get_output_embeddings = lambda: None

    def _check_sharding(self):
        is_asked_for = self.args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")  # which `accelerate launch` sets
        if is_asked_for and self.args.world_size > 1 and not self.is_fsdp_enabled:
            raise ValueError(f"--fsdp: accelerate shards no model on {self.args.device.type} processes.")
        kind = str(self.accelerator.state.fsdp_plugin.state_dict_type) if self.is_fsdp_enabled else None
        if kind is not None and "FULL_STATE_DICT" not in kind:
            raise ValueError(f"--fsdp_config: state_dict_type must be FULL_STATE_DICT, {kind} saves no whole model.")

    def init_hf_repo(self, *args, **kwargs):
        if self.is_world_process_zero():
            hub.find_token(self.args.hub_token)
            with hub.explained_errors(self.args.hub_model_id or Path(self.args.output_dir).absolute().name):
                super().init_hf_repo(*args, **kwargs)

    def train(self, *args, **kwargs):
        with self.interruption.listening():
            return self._train(*args, **kwargs)

    def _train(self, *args, **kwargs):
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

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer, options | ({"amsgrad": True} if getattr(args, "amsgrad", False) else {})

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

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, StreamingDataset):  # is this process's part already
            return undisturbed(self.train_dataset.loader(self.args, self.data_collator))
        return undisturbed(super().get_train_dataloader())

    def get_eval_dataloader(self, *args, **kwargs):
        return undisturbed(super().get_eval_dataloader(*args, **kwargs))

    def num_examples(self, dataloader) -> int:
        return getattr(dataloader.dataset, "num_samples", None) or super().num_examples(dataloader)

    def get_batch_samples(self, *args, **kwargs):
        begin = time.perf_counter()
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        size = sum(len(batch["pixel_values"]) for batch in batches)
        self.training_log.add_step(size * self.args.world_size, time.perf_counter() - begin)
        self._step_labels = [classes for batch in batches for classes in self._class_labels(batch)]
        return batches, num_items_in_batch

    def _class_labels(self, batch: dict) -> list[torch.Tensor]:
        """The classes of the objects of each image, where a set loss is divided by their number."""
        is_ours = isinstance(self.accelerator.unwrap_model(self.model), ClusterFormerPreTrainedModel)
        labels = batch.get("labels", batch.get("class_labels"))
        if not is_ours or self.compute_loss_func is not None or labels is None:
            return []
        if isinstance(labels, torch.Tensor):
            if labels.ndim < 3:  # classes of pictures: the loss is a mean over a batch
                return []
            ignored = self.model.config.semantic_loss_ignore_index
            return [classes[classes != ignored] for classes in map(torch.unique, labels)]
        return [label if isinstance(label, torch.Tensor) else label["class_labels"] for label in labels]

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        self.training_log.watch(inputs)
        shared = accumulated(self._step_labels) if self._step_labels else nullcontext()
        with shared:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        num_batches = self.current_gradient_accumulation_steps
        self.training_log.add_loss(outputs, 1 if self._step_labels else 1 / num_batches)
        if self._step_labels:
            # Trainer takes the mean over the batches of a step of losses that are shares of their sum.
            loss = loss * num_batches
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs |= self._training_numbers(logs["learning_rate"])
        super().log(logs, start_time)

    def _training_numbers(self, learning_rate: float) -> dict[str, float]:
        numbers = self.training_log.summary(self.args.device)
        if getattr(self.args, "backbone_learning_rate", None) is not None:
            share = self.args.backbone_learning_rate / self.args.learning_rate  # at every step of a schedule
            numbers["learning_rate_backbone"] = share * learning_rate
        model = self.accelerator.unwrap_model(self.model)
        is_ours = isinstance(model, ClusterFormerPreTrainedModel) and model.config.clustering == "recurrent"
        if is_ours and not self.is_fsdp_enabled:  # which has whole weights in its own calls only
            numbers |= clustering_health(self.model, self.training_log.watched)
        return numbers

    def evaluation_loop(self, *args, **kwargs):
        # A data loader draws a seed. A run resumed behind an evaluation would miss that draw.
        with torch.random.fork_rng(devices=[]), self.averaged_weights():
            return super().evaluation_loop(*args, **kwargs)

    def _save(self, *args, **kwargs):
        with self.averaged_weights(), own_class(self.model):
            super()._save(*args, **kwargs)

    def whole_model(self) -> PreTrainedModel:
        """The model with all weights in this process; where processes share them, the one that was saved."""
        return self.saved_model() if self.is_fsdp_enabled else self.accelerator.unwrap_model(self.model)

    def saved_model(self) -> PreTrainedModel:
        """The model as the output folder has it."""
        model = self.accelerator.unwrap_model(self.model)
        with own_class(model):
            return type(model).from_pretrained(self.args.output_dir)

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
        """Written beside its place, and moved there when it is whole."""
        output_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = output_dir / UNFINISHED_FOLDER / name
        try:
            with self._output_in(unfinished.parent):
                super()._save_checkpoint(model, trial)
            self._publish(unfinished, output_dir / name)
        except (torch.OutOfMemoryError, torch.distributed.DistError):  # RuntimeErrors that no disk is the cause of
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(output_dir).free / 2**20
            shutil.rmtree(unfinished, ignore_errors=True)
            raise CheckpointError(
                f"{output_dir / name} could not be written ({free:,.0f} MiB are free there): {error}\n"
                "The run goes on from its last complete checkpoint with --resume_from_checkpoint true."
            ) from error
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(output_dir / name))

    @contextmanager
    def _output_in(self, folder: Path):
        """Inside, checkpoints are written to another folder than the others."""
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._get_output_dir = lambda trial=None: str(folder)
        try:
            yield
        finally:
            del self._get_output_dir

    def _publish(self, unfinished: Path, folder: Path):
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        elif self.state.best_global_step:
            best = folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best.exists() else None
        if self.is_world_process_zero():
            self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            publish(unfinished, folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save and unfinished.is_dir():  # on the own disk of another machine
            publish(unfinished, folder)
        if self.args.should_save:
            prune(folder, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Nothing, while a checkpoint is not whole."""

    def create_model_card(
        self, description: str = "", limits: str = "", data: str = "", settings: dict | None = None, **kwargs
    ):
        """
        Writes README.md, and training_record.json for the card of a repository on the Hub. See [`TrainingRecord`] for
        the paragraphs; `settings` are listed with the hyperparameters; the other arguments are Trainer's.
        """
        if self.is_world_process_zero():
            summary = TrainingSummary.from_trainer(self, **origin(self.model.config.name_or_path) | kwargs)
            summary.hyperparameters |= settings or {}
            _restore_names(summary, self.state.log_history)
            record = TrainingRecord.from_summary(summary, description, limits, data)
            folder, model = Path(self.args.output_dir), self.whole_model()
            record.save(folder / RECORD_NAME, model)
            location = (self.hub_model_id if self.args.push_to_hub else None) or self.args.output_dir
            results = own_results(folder / hub.RESULTS_NAME, model)
            render_model_card(model, location, record, results, summary.license).save(folder / "README.md")

    def publish_repository(self) -> CommitInfo:
        """
        Uploads the repository that scripts/push_to_hub.py makes of the output folder, where model, card and results
        have been saved. For one process.

        Raises:
            [`HubError`]: if nothing was published.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        args, model, folder = self.args, self.saved_model(), Path(self.args.output_dir)
        results = folder / hub.RESULTS_NAME
        with tempfile.TemporaryDirectory() as repository:
            hub.export_repository(
                model,
                self.processing_class,
                repository,
                self.hub_model_id,
                results=results if own_results(results, model) is not None else None,
                record=folder / RECORD_NAME,
            )
            private = bool(args.hub_private_repo)
            return hub.publish(
                repository, self.hub_model_id, private=private, revision=args.hub_revision, token=args.hub_token
            )


@contextmanager
def own_class(model: torch.nn.Module):
    """Inside, a sharded model is of its own class, and not of the one that FSDP makes of it."""
    sharded = type(model)
    model.__class__ = next(each for each in sharded.__mro__ if not each.__name__.startswith("FSDP"))
    try:
        yield
    finally:
        model.__class__ = sharded


def own_results(path: Path, model) -> dict | None:
    """The results file of a run, if there is one and it is not of an earlier run in the same folder."""
    try:
        return read_for(model, path)
    except FileNotFoundError:
        return None
    except ForeignResultsError as error:
        logger.warning(f"The model card has no results: {error}")
        return None


def _restore_names(summary: TrainingSummary, log_history: list[dict]):
    """Undoes `Ap50` and `Ap Dog` for AP50 and AP_dog; single classes are no columns of the training's course."""
    logged = {name.removeprefix("eval_") for entry in log_history for name in entry}
    names = {" ".join(map(str.capitalize, name.split("_"))): name for name in logged if not name.islower()}
    summary.eval_lines = [
        {names.get(key, key): value for key, value in line.items() if "_" not in names.get(key, key)}
        for line in summary.eval_lines or []
    ]


class SetEpochCallback(TrainerCallback):
    """Tells the training data set its epoch; accelerate does so in a single process only."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = train_dataloader.dataset
        if isinstance(dataset, StreamingDataset):
            steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)
            done = state.global_step % steps * args.gradient_accumulation_steps  # in a resumed epoch
            dataset.set_epoch(state.global_step // steps, done)
        elif hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch))


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
    if args.do_train:
        pictures, processes, batches = args.train_batch_size, args.world_size, args.gradient_accumulation_steps
        logger.info(
            f"A step takes {pictures * processes * batches} pictures: {processes} process(es) x {batches} batch(es) of "
            f"{pictures}."
        )
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir) if args.do_train else None
    # The examples hold no column that Trainer needs to remove, and evaluation keeps no logits.
    args.remove_unused_columns = False
    args.batch_eval_metrics = True
    if args.should_save:
        mark(args.output_dir, False)
    set_seed(args.seed)
    return checkpoint


def train_and_evaluate(trainer: Trainer, checkpoint: str | None, num_skipped: int, source: str | None = None):
    """
    Does what the arguments say, saves the model and writes `train_results.json` and `eval_results.json`, which names
    the weights and the data that its numbers are of: `source` is a path or a name on the Hub.
    """
    if trainer.args.measure_throughput:
        result = measure_throughput(trainer)
        trainer.save_metrics("throughput", result, combined=False)
        logger.info(describe_throughput(result))
        sys.exit(0)
    if trainer.args.do_train:
        if checkpoint is not None:
            check_same_model(checkpoint, trainer.model)
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        if trainer.interruption.is_stopping:
            end_interrupted_run(trainer)
        dataset = trainer.train_dataset
        metrics |= {"train_samples": getattr(dataset, "num_samples", len(dataset)), "skipped_files": num_skipped}
        trainer.save_model(_internal_call=True)  # with its card it is pushed, and not here
        trainer.accelerator.wait_for_everyone()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()
    if trainer.args.do_eval:
        origin = provenance(trainer.whole_model(), source)
        metrics = trainer.evaluate() | {"eval_samples": len(trainer.eval_dataset)}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics | {PROVENANCE: origin})


def end_interrupted_run(trainer: ClusterFormerTrainer):
    """Leaves the marker and ends the process. What a whole run ends with is left to the one that goes on."""
    if trainer.is_world_process_zero():
        mark(trainer.args.output_dir, True)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    logger.warning("Interrupted. The run goes on with the same command and --resume_from_checkpoint true.")
    sys.exit(EXIT_CODE)


def run_script(main: Callable[[], None]):
    """Runs a training script. A full disk or a failed upload ends it with one line and not with a trace of calls."""
    try:
        main()
    except (CheckpointError, hub.HubError) as error:
        logger.error(error)
        sys.exit(1)


def write_card(
    trainer: ClusterFormerTrainer, task: str, source: str, dataset_tags: str | None, settings: dict, **paragraphs
):
    """
    Writes the model card of a training with a picture of its course, and pushes both with the model where that is asked
    for.

    Args:
        source: The data: a path, or a name on the Hub.
        dataset_tags: The kind of a folder of data, if it has a name on the Hub.
        settings, paragraphs: See [`ClusterFormerTrainer.create_model_card`].
    """
    curves = Path(trainer.args.output_dir, CURVES_NAME)
    if trainer.is_world_process_zero():
        curves.unlink(missing_ok=True)  # an earlier run's, where this one has none
        draw_curves(trainer.state.log_history, curves)
        if curves.exists():
            paragraphs["data"] += f"\n\n![Course of the training]({CURVES_NAME})"
    is_local = Path(source).exists()
    card = {
        "tasks": task,
        "tags": [task, "vision", "clusterformer"],
        "dataset": public_name(source),
        "dataset_tags": dataset_tags if is_local else source,
        "settings": settings,
        **paragraphs,
    }
    if trainer.args.push_to_hub and not isinstance(trainer.model, ClusterFormerPreTrainedModel):
        trainer.push_to_hub(**card)
        return
    trainer.create_model_card(**card)
    if trainer.args.push_to_hub and trainer.is_world_process_zero():
        try:
            logger.info(f"Published as {trainer.publish_repository().commit_url}")
        except hub.HubError as error:
            raise hub.HubError(f"The model is in {trainer.args.output_dir}. {error}") from error


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
