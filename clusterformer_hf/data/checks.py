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

from datasets import Features, Value


logger = logging.getLogger(__name__)


def find_problems(data, num_proc: int | None = None) -> dict[int, str]:
    """
    Opens every picture as training will, and returns what is wrong with those that cannot be used, by row.

    Args:
        data: With `pictures`, a [`datasets.Dataset`], and `open(row)`, which raises `ValueError` for what is wrong.
    """

    def problem(_, row: int) -> dict:
        try:
            data.open(row)
        except ValueError as error:
            return {"problem": str(error)}
        return {"problem": None}

    problems = data.pictures.map(
        problem,
        with_indices=True,
        input_columns="image",
        remove_columns=data.pictures.column_names,
        features=Features({"problem": Value("string")}),
        num_proc=num_proc,
        load_from_cache_file=False,
        desc="Checking the pictures",
    )["problem"]
    return {row: found for row, found in enumerate(problems) if found is not None}


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
