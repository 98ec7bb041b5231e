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
Training on shards that are read while it runs.

In an epoch the shards have a random order. Their pictures, one shard behind the other, are a line, of which every
process and in it every worker has a piece: each picture comes once, whatever the sizes of the shards. A worker mixes
its piece within windows that it holds in memory. All of this depends on (seed, epoch) alone, so a resumed run goes on
at the very sample without reading what came before.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from transformers import TrainingArguments

from .augmentation import derive_seed, random_numbers_from
from .images import open_image
from .shards import PictureShards


# Pictures, as bytes of their files, that a worker holds and mixes.
WINDOW = 256
# Told apart from the keys of other random numbers.
ORDER_KEY, WINDOW_KEY, SAMPLE_KEY = 1, 2, 3


class StreamingDataset(torch.utils.data.IterableDataset):
    """
    The part of one process of pictures in shards, as the examples of `ImageClassificationDataset`.

    All processes have the same number, `len(self)`: where they do not divide, an epoch's first pictures come twice.

    Args:
        shards, transform, seed: The pictures, and what makes tensors of them with random numbers of (seed, epoch,
            place in the data set).
        class_ids: The model's id of each class.
        batch_size: Pictures of a batch in this process: workers take whole batches.
        process, num_processes: Which part this is.
    """

    def __init__(
        self,
        shards: PictureShards,
        transform: Callable,
        class_ids: list[int],
        seed: int,
        batch_size: int,
        process: int = 0,
        num_processes: int = 1,
    ):
        self.shards, self.transform, self.class_ids, self.seed = shards, transform, class_ids, seed
        self.batch_size, self.process, self.num_processes = batch_size, process, num_processes
        self.starts = np.concatenate([[0], np.cumsum(shards.sizes)])  # of each shard, in the data set's own order
        # Shared with data workers that live longer than an epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.skipped = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return -(-len(self.shards) // self.num_processes)

    @property
    def num_samples(self) -> int:
        """Pictures of an epoch, of all processes."""
        return len(self.shards)

    def set_epoch(self, epoch: int, skipped_batches: int = 0):
        """
        Which epoch comes next, and how many of its batches were trained on before a run was resumed: None stands for
        each of their examples.
        """
        self.epoch.fill_(epoch)
        self.skipped.fill_(skipped_batches)

    def __iter__(self) -> Iterator[dict | None]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = -(-len(self) // self.batch_size)
        # The loader takes a batch of each worker in turn.
        own = [batches // count + (each < batches % count) for each in range(count)]
        first = sum(own[:number]) * self.batch_size
        stop = min(first + own[number] * self.batch_size, len(self))
        skipped = self.skipped.item()
        done = min(skipped // count + (number < skipped % count), own[number]) * self.batch_size
        done = max(min(done, stop - first), 0)  # a worker without a batch has `stop` before `first`
        yield from (None for _ in range(done))
        if first < stop:
            yield from self._mixed(first, stop, done)

    def _mixed(self, first: int, stop: int, done: int) -> Iterator[dict]:
        """The examples `first + done` to `stop` of this process, mixed in windows counted from `first`."""
        begin = first + done // WINDOW * WINDOW
        samples = self._read(begin, stop)  # opens each shard once, and not for each window
        for start in range(begin, stop, WINDOW):
            window = list(itertools.islice(samples, WINDOW))
            key = (self.seed, WINDOW_KEY, self.epoch.item(), self.process, start)
            order = np.random.default_rng(key).permutation(len(window))
            for index in order[max(first + done - start, 0) :]:
                yield self._example(*window[index])

    def _read(self, start: int, stop: int) -> Iterator[tuple]:
        """Places in the data set and what the shards hold there, for the examples `start` to `stop` of this process."""
        order = np.random.default_rng((self.seed, ORDER_KEY, self.epoch.item())).permutation(len(self.shards.sizes))
        ends = np.cumsum(np.array(self.shards.sizes)[order])
        total = len(self.shards)
        place, last = self.process * len(self) + start, self.process * len(self) + stop
        while place < last:
            within = place % total
            turn = int(np.searchsorted(ends, within, side="right"))
            shard, begin = int(order[turn]), int(ends[turn] - self.shards.sizes[order[turn]])
            number = min(last - place, int(ends[turn]) - within)
            offset = within - begin
            for row, sample in enumerate(self.shards.read(shard, offset, offset + number), offset):
                yield (int(self.starts[shard]) + row, *sample)
            place += number

    def _example(self, place: int, name: str, image, label: int) -> dict:
        seed = derive_seed(self.seed, SAMPLE_KEY, self.epoch.item(), place)
        with random_numbers_from(seed):
            pixel_values = self.transform(open_image(image))
        return {"pixel_values": pixel_values, "labels": self.class_ids[label], "seed": seed, "name": name}

    def loader(self, args: TrainingArguments, collate: Callable) -> DataLoader:
        """Batches of this process, decoded and augmented in workers. A batch that is skipped is an empty dict."""
        return DataLoader(
            self,
            batch_size=self.batch_size,
            collate_fn=SkippedBatches(collate),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )


class SkippedBatches:
    """A collator that leaves batches of None to whoever skips them."""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, examples: list[dict | None]) -> dict:
        return {} if examples[0] is None else self.collate(examples)
