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
"""A handful of built-in pictures, on which a recipe is tried before its real data."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from .digit_scenes import write_digit_scenes
from .digits import write_digits


def smoke_digits(folder: Path) -> dict:
    """Writes forty digits for training and ten for validation; returns the flags that read them."""
    _write_once(folder, lambda: write_digits(folder, 40, 10))
    return {"dataset_name": str(folder), "train_dir": None, "validation_dir": None, "streaming": False}


def smoke_scenes(folder: Path) -> dict:
    """Writes eight digit scenes for training and four for validation; returns the flags that read them."""
    _write_once(folder, lambda: write_digit_scenes(folder, 8, 4))
    return {"dataset_name": str(folder)}


def smoke_label_maps(folder: Path) -> dict:
    """The same for label maps, whose class ids count from 0."""
    return smoke_scenes(folder) | {"reduce_labels": False, "class_names": None}


def _write_once(folder: Path, write: Callable[[], object]):
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # processes of one run come here together
        if not folder.exists():
            write()
