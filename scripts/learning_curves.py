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
What the comparisons of learning share: training within a budget, a file of finished runs, a table.

Every model gets the same budget of processor time, which other work on the machine does not shorten, or with
`--samples` of pictures, on any device, and sees the same pictures in the same order. The learning rate falls to zero
over the budget. Each finished run is added to a file, so runs may be done one by one, in any order and on several days;
a run that is in the file is not repeated, unless its model had another config or learning rate.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import mean

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from clusterformer_hf.provenance import environment, machine


WARM_UP_STEPS = 150
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 1.0
DRAWN = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.LayerNorm, torch.nn.GroupNorm)


@dataclass
class ComparisonArguments:
    """Command line of a comparison."""

    models: list[str] = field(default_factory=list, metadata={"help": "Which ones; all if not given."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the weights and the order."})
    cpu_minutes: float = field(default=60.0, metadata={"help": "Processor time for training a model, all cores."})
    samples: int | None = field(default=None, metadata={"help": "Train on so many scenes instead, however long."})
    device: str = field(
        default="cpu", metadata={"help": "Where to train; `cuda` only with --samples.", "choices": ["cpu", "cuda"]}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that prepare scenes."})
    size: int = field(default=96, metadata={"help": "Side of the scenes in pixels."})
    num_train: int = field(default=3000, metadata={"help": "Training scenes."})
    num_test: int = field(default=300, metadata={"help": "Test scenes."})
    batch_size: int = field(default=16, metadata={"help": "Scenes a step."})
    num_evaluations: int = field(default=6, metadata={"help": "Points of the learning curve, the last included."})
    output: Path | None = field(default=None, metadata={"help": "Results file, added to."})

    def __post_init__(self):
        if self.samples is None and self.device != "cpu":
            raise ValueError(f"--device {self.device} needs --samples: processor time says nothing of other devices.")
        if self.samples is not None and self.samples < self.batch_size * self.num_evaluations:
            raise ValueError(
                f"--samples {self.samples} are fewer than a batch of {self.batch_size} for each of "
                f"{self.num_evaluations} evaluations."
            )
        if self.num_train < self.batch_size:
            raise ValueError(f"--num_train {self.num_train} scenes make no batch of {self.batch_size}.")

    def settings(self) -> dict:
        """What runs must have in common to stand in one table."""
        budget = "cpu_minutes" if self.samples is None else "samples"
        names = (budget, "size", "num_train", "num_test", "batch_size", "num_evaluations")
        return {name: getattr(self, name) for name in names}


def learning_curve(
    model: PreTrainedModel,
    loader: DataLoader,
    learning_rate: float,
    args: ComparisonArguments,
    evaluate: Callable[[], dict[str, float]],
    start_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[dict]:
    """
    Trains a model for `args.cpu_minutes` or `args.samples` and evaluates it `args.num_evaluations` times on the way.

    Returns:
        For each evaluation the samples seen, where the budget is processor time the minutes of it, and what `evaluate`
        returned.
    """
    model.to(args.device).train()
    # Without decay: biases, norms, and temperatures of heads, (heads, 1, 1).
    matrices = [parameter for parameter in model.parameters() if parameter.squeeze().ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.squeeze().ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    minutes, steps, epoch, progress, curve = 0.0, 0, 0, 0.0, []
    while progress < 1:
        start_epoch(epoch)
        for batch in loader:
            start = time.process_time()
            factor = min(1.0, (steps + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
            model(**send_to_device(batch, args.device)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            minutes += (time.process_time() - start) / 60
            samples = steps * args.batch_size
            progress = minutes / args.cpu_minutes if args.samples is None else samples / args.samples
            if progress >= (len(curve) + 1) / args.num_evaluations:
                model.eval()
                spent = {"cpu_minutes": minutes} if args.samples is None else {}
                curve.append({"samples": samples, **spent, **evaluate()})
                model.train()
                print(curve[-1], flush=True)
            if progress >= 1:
                break
        epoch += 1
    return curve


def initialise_to_learn_from_scratch(model: PreTrainedModel, *layers: torch.nn.ModuleList):
    """
    PyTorch's own initial values, which depend on the width, with Xavier's matrices in the transformer's `layers` and
    learned queries from a standard normal distribution, as the papers' code has them. transformers draws nearly all
    with a deviation of 0.01 or 0.02, even the weights of RT-DETR's batch norms, which is for loading weights over:
    from there a small model hardly learns, and DETR's queries stay alike.
    """
    for name, module in model.named_modules():
        # Zeros and priors are no accident: where deformable attention looks first, the class heads' biases.
        if isinstance(module, DRAWN) and module.weight.any() and (module.bias is None or not module.bias.any()):
            module.reset_parameters()
        if isinstance(module, torch.nn.Embedding) and "quer" in name:
            torch.nn.init.normal_(module.weight)
    for matrix in torch.nn.ModuleList(layers).parameters():
        if matrix.ndim > 1 and matrix.any():
            torch.nn.init.xavier_uniform_(matrix)


def contestant(build: Callable[[int], PreTrainedModel], learning_rate: float, size: int) -> dict:
    """What a run must have in common with today's model of the same name to be one of it."""
    fields = build(size).config.to_diff_dict()
    del fields["transformers_version"]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
    return {"learning_rate": learning_rate, "config": digest[:12]}


def add_missing_runs(
    models: Iterable[str],
    contestants: dict[str, dict],
    args: ComparisonArguments,
    train: Callable[[str, int], tuple[PreTrainedModel, list[dict]]],
) -> list[dict]:
    """
    Calls `train(model, seed)` for the runs of these models that `args.output` lacks, writes each there at once, and
    returns all runs of the contestants in these settings. `train` returns the model and its learning curve.
    """
    settings = {name: args.settings() | {"model": name, **entry} for name, entry in contestants.items()}

    def runs_of(names: Iterable[str]) -> list[dict]:
        return [run for run in read_runs(args.output) if any(settings[name].items() <= run.items() for name in names)]

    for seed in args.seeds:
        for name in models:
            if seed in {run["seed"] for run in runs_of([name])}:
                continue
            print(f"{name}, seed {seed}", flush=True)
            start = time.perf_counter()
            model, curve = train(name, seed)
            run = {
                "seed": seed,
                **settings[name],
                "parameters": model.num_parameters(),
                "minutes": (time.perf_counter() - start) / 60,
                "curve": curve,
                "machine": describe_machine(args.device),
            }
            # Read again: another process may have added its runs meanwhile.
            runs = [*read_runs(args.output), run]
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(runs, indent=2) + "\n")
    return runs_of(contestants)


def read_runs(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def describe_machine(device: str) -> dict:
    """When and with what a run was done."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        **environment(),
        "machine": machine(torch.device(device)),
    }


def markdown(runs: list[dict], metrics: list[str]) -> str:
    """One line a model: means over its seeds at the end of the budget, and the first metric along the way."""
    titles = ["model", "parameters", "samples seen", "seeds", *metrics, f"{metrics[0]} along the way"]
    lines = [titles, ["---"] * len(titles)]
    for name in dict.fromkeys(run["model"] for run in runs):
        own = [run for run in runs if run["model"] == name]
        last = [run["curve"][-1] for run in own]
        along = [mean(point[metrics[0]] for point in points) for points in zip(*(run["curve"][:-1] for run in own))]
        lines.append(
            [
                name,
                f"{own[0]['parameters'] / 1e6:.2f}M",
                f"{mean(point['samples'] for point in last):,.0f}",
                str(len(own)),
                *(f"{mean(point[metric] for point in last):.3f}" for metric in metrics),
                " ".join(f"{value:.3f}" for value in along),
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def chosen_models(args: ComparisonArguments, known: Iterable[str]) -> list[str]:
    """Raises `ValueError` for a name that is not known."""
    unknown = [name for name in args.models if name not in known]
    if unknown:
        raise ValueError(f"--models {unknown}: choose from {list(known)}.")
    return args.models or list(known)
