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
What the scripts for detection and segmentation train and evaluate on: splits, a limit to them, what cannot be used, and
the classes that a model gets from them.

Data is [`DetectionData`], [`SemanticData`], `InstanceData` or `PanopticData`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from transformers import PreTrainedConfig, TrainingArguments

from .detection_data import DetectionData
from .label_maps import SemanticData


logger = logging.getLogger(__name__)

Data = TypeVar("Data", bound=DetectionData | SemanticData)
# Reads a split; also returns a line for each annotation that it left out.
Reader = Callable[[], tuple[Data, list[str]]]


@dataclass
class SplitArguments:
    """How much of the data is used."""

    train_val_split: float = field(
        default=0.15, metadata={"help": "Share for validation where there is no validation split; chosen by --seed."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many pictures only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many pictures only."})
    skip_corrupt: bool = field(
        default=False,
        metadata={"help": "Leave out pictures and annotations that cannot be read or do not fit each other."},
    )
    pad_to_multiple_of: int = field(
        default=1, metadata={"help": "Height and width of batches: fewer shapes for --torch_compile."}
    )


def load_splits(
    readers: dict[str, Reader], args: SplitArguments, training_args: TrainingArguments, drop_unusable: Callable
) -> tuple[dict[str, Data], list[str]]:
    """
    The splits that a run needs, checked.

    Args:
        readers: Of `train`, `validation` or both. A large file that is not needed is not read.
        drop_unusable: Takes data, `skip_corrupt` and a number of processes; returns the usable part and a line for each
            picture left out.

    Returns:
        The data of each split, and a line for all that was left out.

    Raises:
        `ValueError`: if a split is missing, or nothing of it can be used.
    """
    wanted = ["train"] * training_args.do_train + ["validation"] * training_args.do_eval
    splits, skipped = {}, []
    for split in readers if "validation" not in readers else wanted:
        if split in readers:
            splits[split], problems = readers[split]()
            skipped += problems
    if "validation" not in readers and args.train_val_split:
        # Also where this run does not evaluate: a later one must find pictures that were not trained on.
        splits = split_off_validation(splits["train"], args.train_val_split, training_args.seed)
        logger.info(f"{len(splits['validation'])} pictures are kept for validation and not trained on.")

    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for split in wanted:
        if split not in splits:
            raise ValueError(f"There is no {split} split, only {', '.join(readers)}: {args}.")
        rows = np.arange(len(splits[split]))
        if limits[split] is not None:
            rows = np.random.default_rng(training_args.seed).permutation(rows)[: limits[split]]
        splits[split], problems = drop_unusable(
            splits[split].select(rows), args.skip_corrupt, training_args.dataloader_num_workers or None
        )
        skipped += problems
        if not len(splits[split]):
            raise ValueError(f"There are no pictures to use in {splits[split].source}.")
    return {split: splits[split] for split in wanted}, skipped


def split_off_validation(data: Data, share: float, seed: int) -> dict[str, Data]:
    """Keeps a random share of the pictures, at least one, for validation."""
    if not 0 < share < 1 or len(data) < 2:
        raise ValueError(f"--train_val_split {share} of the {len(data)} pictures of {data.source} leaves a part empty.")
    rows = np.random.default_rng(seed).permutation(len(data))
    number = min(max(round(share * len(data)), 1), len(data) - 1)
    return {"train": data.select(np.sort(rows[number:])), "validation": data.select(np.sort(rows[:number]))}


def name_classes(config: PreTrainedConfig, data: Data):
    """
    Gives a model the classes of its training data and their original ids. A model that knows just these classes keeps
    their order, and with it its heads.
    """
    fields = {"original_category_ids": data.category_ids} | data.config_fields()
    if set(data.class_names) == set(config.id2label.values()):
        original = dict(zip(data.class_names, data.category_ids))
        fields = {"original_category_ids": [original[name] for _, name in sorted(config.id2label.items())]}
    for name, value in fields.items():
        setattr(config, name, value)
