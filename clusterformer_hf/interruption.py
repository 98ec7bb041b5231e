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
"""Ending a training on a signal: at the end of a step, in all processes at the same one, with a checkpoint."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback


logger = logging.getLogger(__name__)

# What systems send before they take a machine away. Slurm: at the time limit, on preemption and on requeueing.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# The exit code of an interrupted run ("temporary failure: try again").
EXIT_CODE = 75
# Lies in the output folder of an interrupted run: launchers such as torchrun do not pass exit codes on.
MARKER_NAME = "interrupted"


class InterruptionCallback(TrainerCallback):
    """
    After one of the signals the step goes on to its end, a checkpoint is saved, and the training stops. `signal` is the
    name of the one that came, or None.
    """

    def __init__(self):
        self.signal: str | None = None
        self.is_stopping = False

    @contextmanager
    def listening(self):
        """Inside, the signals are noted; in the main thread only, since others cannot listen to any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal = signal.Signals(number).name

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps or not self._some_process_was_told(args):
            return
        self.is_stopping = True
        control.should_training_stop = True
        # Behind an epoch's last step comes its evaluation, and the checkpoint behind that.
        control.should_save = not self._epoch_is_over(state)
        logger.warning(f"Interrupted ({self.signal or 'another process'}) at step {state.global_step}: saving.")

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.is_stopping and self._epoch_is_over(state):
            control.should_save = True
        elif self.is_stopping:
            control.should_log = control.should_evaluate = control.should_save = False

    def _epoch_is_over(self, state) -> bool:
        return abs(state.epoch - round(state.epoch)) < 1e-9

    def _some_process_was_told(self, args) -> bool:
        told = torch.tensor(float(self.signal is not None), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        return bool(told.item())


def undisturbed(loader: DataLoader) -> DataLoader:
    """
    The loader, whose workers go on after the signals: these often come to all processes of a group, and the training
    needs its data up to the end of a step. Workers end when the process that started them says so, or is gone.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        starts_workers = getattr(loader, "base_dataloader", loader)  # in what accelerate makes of a loader
        starts_workers.worker_init_fn = partial(_start_worker, starts_workers.worker_init_fn)
    return loader


def _start_worker(initialise: Callable[[int], None] | None, worker: int):
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = multiprocessing.parent_process().pid
    threading.Thread(target=_end_when_told_by, args=(parent,), daemon=True).start()
    if initialise is not None:
        initialise(worker)


def _end_when_told_by(process: int):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)


def mark(output_dir: str | Path, interrupted: bool):
    """Leaves the marker file in an output folder, or takes it away."""
    path = Path(output_dir, MARKER_NAME)
    if interrupted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    else:
        path.unlink(missing_ok=True)
