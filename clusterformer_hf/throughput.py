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
"""What holds a training back: samples a second of the loader alone, of the model alone and of both together."""

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from transformers import Trainer


# Batches of each measurement, behind some that do not count.
NUM_BATCHES = 20
NUM_WARM_UP = 3


def measure_throughput(trainer: Trainer, num_batches: int = NUM_BATCHES) -> dict[str, float]:
    """
    Trains for a moment, without saving anything: the model is not the same afterwards.

    Args:
        trainer: With a training data set. Measured is what its arguments say: batch, workers, precision.
        num_batches: Batches of each measurement.

    Returns:
        Samples a second of all processes: `loader`, which decodes and augments; `model`, steps on a batch that is there
        already; `both`. `overlap` is `both` as a share of the slower one, 1 where neither waits for the other.
    """
    trainer.create_optimizer()
    model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.gradient_state._set_sync_gradients(True)

    def step(batches: Iterator[dict]):
        (batch,), num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
        trainer.training_step(model, dict(batch), num_items)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    size = trainer.args.train_batch_size * trainer.args.world_size

    def speed(call: Callable[[], object], num_warm_up: int) -> float:
        for _ in range(num_warm_up):
            call()
        begin = _time(trainer.args.device)
        for _ in range(num_batches):
            call()
        return size * num_batches / (_time(trainer.args.device) - begin)

    # What workers have ready when the clock starts must not count.
    ready = trainer.args.dataloader_num_workers * (trainer.args.dataloader_prefetch_factor or 2)
    loaded = _endless(trainer)
    held = next(loaded)
    loader = speed(lambda: next(loaded), ready + NUM_WARM_UP)
    result = {"loader": loader, "model": speed(lambda: step(itertools.repeat(held)), NUM_WARM_UP)}
    result["both"] = speed(lambda: step(loaded), ready + NUM_WARM_UP)
    result["overlap"] = result["both"] / min(result["loader"], result["model"])
    return result


def _endless(trainer: Trainer) -> Iterator[dict]:
    while True:
        yield from trainer.get_train_dataloader()


def _time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def describe_throughput(result: dict[str, float]) -> str:
    """A line for people."""
    slower = min(("loader", "model"), key=result.get)
    advice = "more --dataloader_num_workers may help" if slower == "loader" else "the data is fast enough"
    return (
        f"Samples a second: loader {result['loader']:.1f}, model {result['model']:.1f}, both {result['both']:.1f} "
        f"({result['overlap']:.2f} of the slower). The {slower} holds the training back: {advice}."
    )
