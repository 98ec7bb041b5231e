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
"""Pictures that cannot be used: they are found before a training starts, and named."""

import logging
import os
from pathlib import Path
from tempfile import TemporaryFile

import datasets
from datasets import Dataset, Features, Image, Value
from datasets.fingerprint import Hasher


logger = logging.getLogger(__name__)

# Of what pictures are checked for: another one forgets what was found before.
CHECKS_VERSION = 1


def find_problems(data, num_proc: int | None = None) -> dict[int, str]:
    """
    Opens every picture as training will, and returns what is wrong with those that cannot be used, by row.

    What was found is kept in the cache of the datasets library, for other processes and for a run that goes on.

    Args:
        data: With `pictures`, a [`datasets.Dataset`], and `open(row)`, which raises `ValueError` for what is wrong.
    """

    def problem(row: int) -> str | None:
        try:
            data.open(row)
        except ValueError as error:
            return str(error)
        return None

    fingerprint = Hasher.hash((CHECKS_VERSION, data, file_states(data.pictures)))
    folder = Path(datasets.config.HF_DATASETS_CACHE, "picture_checks")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()  # it may be there and not be ours to write to
        cache = {"cache_file_name": str(folder / f"{fingerprint}.arrow"), "new_fingerprint": fingerprint}
    except OSError as error:
        logger.warning(f"Every process checks the pictures for itself: {error}")
        cache = {"load_from_cache_file": False}
    problems = data.pictures.map(
        lambda _, row: {"problem": problem(row)},
        with_indices=True,
        input_columns="image",
        remove_columns=data.pictures.column_names,
        features=Features({"problem": Value("string")}),
        num_proc=num_proc,
        desc="Checking the pictures",
        **cache,
    )["problem"]
    suspects = [row for row, found in enumerate(problems) if found is not None]
    # Again: the file may have been repaired since, where rows of an Arrow file name it.
    return {row: found for row in suspects if (found := problem(row)) is not None}


def file_states(pictures: Dataset) -> list[tuple[str, int, int]]:
    """Path, size and time of change of the files that hold the rows, or that rows in memory name."""
    paths = [each["filename"] for each in pictures.cache_files]
    if not paths:
        columns = [name for name, feature in pictures.features.items() if isinstance(feature, Image)]
        rows = (row[name] or {} for row in pictures for name in columns)
        paths = [row["path"] for row in rows if row.get("path") and not row.get("bytes")]
    states = []
    for path in paths:
        try:
            state = os.stat(path)
        except OSError:  # said where the picture is opened
            continue
        states.append((path, state.st_size, state.st_mtime_ns))
    return states


def drop_unusable(data, skip_corrupt: bool, num_proc: int | None = None):
    """
    Leaves out the pictures that cannot be used: unreadable, or with boxes or masks that do not fit them.

    Returns the rest, and one line for every picture left out. Raises `ValueError` with these lines if they are not to
    be skipped.
    """
    problems = find_problems(data, num_proc)
    if not problems:
        return data, []
    listing = "\n".join(f"  {problem}" for problem in problems.values())
    if not skip_corrupt:
        raise ValueError(
            f"{len(problems)} pictures of {data.source} cannot be used:\n{listing}\n"
            "Repair or remove them, or go on without them with --skip_corrupt."
        )
    logger.warning(f"Going on without {len(problems)} pictures of {data.source} that cannot be used:\n{listing}")
    return data.select(row for row in range(len(data)) if row not in problems), list(problems.values())
