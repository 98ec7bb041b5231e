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
"""Command lines of the training scripts: flags, a recipe, or a recipe and flags that override it."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

import yaml
from transformers import HfArgumentParser


# Of each pair a recipe may set one: the other would be ignored, or be wrong for some number of processes.
CONTRADICTIONS = [
    ("max_steps", "num_train_epochs"),
    ("total_train_batch_size", "gradient_accumulation_steps"),
    ("bf16", "fp16"),
    *(
        ("dataset_name", f"{split}_{kind}")
        for split in ("train", "validation")
        for kind in ("dir", "images", "labels", "annotations", "segments")
    ),
]
# What `--smoke` changes in any recipe, unless a flag on the command line says otherwise.
SMOKE_FLAGS = {
    "do_train": True,
    "do_eval": True,
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_steps": 1,
    "warmup_steps": 1,
    "max_eval_samples": 4,
}


def parse_arguments(
    dataclass_types: tuple[type, ...], args: list[str] | None = None, smoke_data: Callable[[Path], dict] | None = None
) -> tuple:
    """
    Parses flags as [`HfArgumentParser`] does; a first argument that ends in .yaml, .yml or .json is a recipe.

    A recipe is a mapping of flags without dashes to values. Flags behind it win, also over what contradicts them.

    Args:
        dataclass_types: The dataclasses to fill.
        args: The command line without the script's name, by default that of the process.
        smoke_data: Writes the built-in data of a script to a folder and returns the flags for it. The script then has
            `--smoke`, which runs a recipe for three steps on that data, two batches a step in each process.

    Returns:
        One instance of each dataclass.

    Raises:
        `ValueError`: for a recipe that is no mapping, or has a key that is no flag, is there twice or contradicts
            another.
    """
    args = sys.argv[1:] if args is None else list(args)
    parser = HfArgumentParser(dataclass_types)
    flags = {action.dest for action in parser._actions}
    if smoke_data is not None:
        parser.add_argument("--smoke", action="store_true", help="Try it: three steps on built-in data.")
    is_smoke = smoke_data is not None and "--smoke" in args
    args = [arg for arg in args if not is_smoke or arg != "--smoke"]
    if args and Path(args[0]).suffix in (".yaml", ".yml", ".json"):
        recipe = _read_recipe(Path(args.pop(0)), flags)
        recipe = _without_contradicted(recipe, parser, args)
        # Flags' defaults and not values, so that text is converted as on the command line: YAML reads 1e-4 as text.
        parser.set_defaults(**recipe)
    if is_smoke:
        _set_smoke_defaults(parser, args, smoke_data)
    return parser.parse_args_into_dataclasses(args)[: len(dataclass_types)]


def _set_smoke_defaults(parser: HfArgumentParser, args: list[str], smoke_data: Callable[[Path], dict]):
    given, _ = parser.parse_known_args(args)
    if given.output_dir is None:
        raise ValueError("--smoke needs an --output_dir, in which its data is written too.")
    data = smoke_data(Path(given.output_dir) / "smoke_data")
    # Two batches a step in each process, whatever batch the recipe is for.
    batches = {"total_train_batch_size": None, "gradient_accumulation_steps": 2}
    parser.set_defaults(**SMOKE_FLAGS, **batches, **data)


def _read_recipe(path: Path, flags: set[str]) -> dict:
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".json":
            recipe = json.load(file, object_pairs_hook=partial(_json_object, path))
        else:
            recipe = yaml.load(file, _UniqueKeys)
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} must be a mapping of flags to values, got {type(recipe).__name__}.")
    unknown = sorted(str(key) for key in recipe if key not in flags)
    if unknown:
        raise ValueError(f"The recipe {path} has keys that are no flags: {', '.join(unknown)}.")
    for one, other in CONTRADICTIONS:
        if recipe.get(one) and recipe.get(other):
            raise ValueError(f"The recipe {path} has both {one} and {other}, which contradict each other: keep one.")
    return recipe


def _without_contradicted(recipe: dict, parser: HfArgumentParser, args: list[str]) -> dict:
    """The recipe without what a flag on the command line contradicts."""
    # Values that are there already are not filled with the parser's defaults.
    given, _ = parser.parse_known_args(args, Namespace(**dict.fromkeys(chain(*CONTRADICTIONS))))
    # -1 stands for no number of steps.
    is_set = {name for name, value in vars(given).items() if value not in (None, False, -1)}
    dropped = {other for pair in CONTRADICTIONS for one, other in (pair, pair[::-1]) if one in is_set}
    return {name: value for name, value in recipe.items() if name not in dropped}


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        _check_unique([key.value for key, _ in node.value], str(node.start_mark).strip())
        return super().construct_mapping(node, deep)


def _json_object(path: Path, pairs: list[tuple]) -> dict:
    _check_unique([key for key, _ in pairs], f"in {path}")
    return dict(pairs)


def _check_unique(keys: list, place: str):
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"The recipe has {', '.join(twice)} twice: {place}.")
