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
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def parse_arguments(dataclass_types: tuple[type, ...], args: list[str] | None = None) -> tuple:
    """
    Parses flags as [`HfArgumentParser`] does; a first argument that ends in .yaml, .yml or .json is a recipe.

    A recipe is a mapping of flags without dashes to values. Flags behind it win.

    Args:
        dataclass_types: The dataclasses to fill.
        args: The command line without the script's name, by default that of the process.

    Returns:
        One instance of each dataclass.

    Raises:
        `ValueError`: for a recipe that is no mapping or has a key that is no flag.
    """
    args = sys.argv[1:] if args is None else list(args)
    parser = HfArgumentParser(dataclass_types)
    if args and Path(args[0]).suffix in (".yaml", ".yml", ".json"):
        recipe = _read_recipe(Path(args.pop(0)), {action.dest for action in parser._actions})
        # Flags' defaults and not values, so that text is converted as on the command line: YAML reads 1e-4 as text.
        parser.set_defaults(**recipe)
    return parser.parse_args_into_dataclasses(args)


def _read_recipe(path: Path, flags: set[str]) -> dict:
    text = path.read_text(encoding="utf-8")
    recipe = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} must be a mapping of flags to values, got {type(recipe).__name__}.")
    unknown = sorted(str(key) for key in recipe if key not in flags)
    if unknown:
        raise ValueError(f"The recipe {path} has keys that are no flags: {', '.join(unknown)}.")
    return recipe
