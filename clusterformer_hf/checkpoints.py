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
"""Checkpoints that are whole or not there: finding the one to go on from, and putting a new one in its place."""

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME


logger = logging.getLogger(__name__)

# Holds checkpoints while they are written or deleted, beside the whole ones and on the same disk.
UNFINISHED_FOLDER = ".unfinished"
# The optimizer's state: whole, and as FSDP writes it, whole or in parts.
OPTIMIZER_NAMES = (OPTIMIZER_NAME, "optimizer.bin", "optimizer_0")


def publish(unfinished: Path, folder: Path):
    """
    Gives a written checkpoint its name: from one moment to the next it is there, on the disk. A folder that has the
    name already goes.
    """
    for path in unfinished.rglob("*"):
        _sync(path)
    _sync(unfinished)
    if folder.exists():
        discard(folder)
    unfinished.rename(folder)
    _sync(folder.parent)


def discard(folder: Path):
    """Deletes a checkpoint. Where that breaks off, no part of it looks like a checkpoint."""
    rest = folder.parent / UNFINISHED_FOLDER / f"old-{folder.name}"
    rest.parent.mkdir(exist_ok=True)
    shutil.rmtree(rest, ignore_errors=True)
    folder.rename(rest)
    shutil.rmtree(rest, ignore_errors=True)


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(newest: Path, limit: int | None, best: str | None):
    """
    Deletes the oldest checkpoints above a limit beside the newest, but neither that nor the best one. Those of an
    earlier run in the same folder are the oldest, whatever their numbers.
    """
    checkpoints = [Path(checkpoint) for checkpoint in sort_checkpoints(str(newest.parent), use_mtime=True)]
    if not limit or len(checkpoints) <= limit:
        return
    kept = {newest} | ({Path(best)} if best is not None else set())
    deletable = [checkpoint for checkpoint in checkpoints if checkpoint not in kept]
    for checkpoint in deletable[: len(checkpoints) - max(limit, len(kept))]:
        discard(checkpoint)


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` means: a path, or the newest complete one of `output_dir` for true;
    for auto this too, or None where there is none yet.

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
    if str(resume_from_checkpoint).lower() not in ("true", "auto"):
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
    if str(resume_from_checkpoint).lower() == "auto":
        return None
    raise ValueError(f"There is no complete checkpoint in {output_dir} to resume from. {'; '.join(problems)}")


def checkpoint_problem(folder: str | Path) -> str | None:
    """What a Trainer checkpoint lacks to be resumed from, or None if it is complete. Reads no tensor."""
    folder = Path(folder)
    if not folder.is_dir():
        return "no such folder"
    for name in (TRAINER_STATE_NAME, SAFE_WEIGHTS_NAME, SCHEDULER_NAME):
        if not (folder / name).is_file():
            return f"{name} is missing"
    if not any((folder / name).exists() for name in OPTIMIZER_NAMES):
        return f"{OPTIMIZER_NAMES[0]} is missing"
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
    for path in [*folder.glob("*.pt"), *folder.glob("*.bin"), *folder.glob("rng_state*.pth")]:
        if not zipfile.is_zipfile(path):
            return f"{path.name} is truncated"
    return None


def check_same_model(folder: str | Path, model: nn.Module):
    """Raises `ValueError` if the weights of a checkpoint are those of another model; names some that differ."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with safe_open(Path(folder) / SAFE_WEIGHTS_NAME, framework="pt") as weights:
        found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
    problems = [f"{name} {found[name]} is unknown" for name in found if name not in expected]
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            problems.append(f"{name} is {found[name]} and should be {shape}")
    problems += [] if found else ["it holds no weights"]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{folder} is a checkpoint of another model: {'; '.join(problems[:3])}{more}.")
