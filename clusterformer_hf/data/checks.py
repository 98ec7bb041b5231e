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
from pathlib import Path

import datasets
from datasets import Dataset, Features, Image, Value
from datasets.fingerprint import Hasher

from .. import __version__


logger = logging.getLogger(__name__)


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

    fingerprint = Hasher.hash((__version__, data, file_states(data.pictures)))
    folder = Path(datasets.config.HF_DATASETS_CACHE, "picture_checks")
    folder.mkdir(parents=True, exist_ok=True)
    problems = data.pictures.map(
        lambda _, row: {"problem": problem(row)},
        with_indices=True,
        input_columns="image",
        remove_columns=data.pictures.column_names,
        features=Features({"problem": Value("string")}),
        num_proc=num_proc,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc="Checking the pictures",
    )["problem"]
    suspects = [row for row, found in enumerate(problems) if found is not None]
    # Again: a picture of an Arrow file's paths may have been repaired since.
    return {row: found for row in suspects if (found := problem(row)) is not None}


def file_states(pictures: Dataset) -> list[tuple[str, int, int]]:
    """Path, size and time of change of the files that the rows name; none where the rows are in Arrow files."""
    if pictures.cache_files:
        return []
    columns = [name for name, feature in pictures.features.items() if isinstance(feature, Image)]
    paths = (Path(row[name]["path"]) for row in pictures for name in columns if row[name]["bytes"] is None)
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]


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
