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
"""What the recipes for the paper's results cost: the script counts it, and the recipes and the documentation say so."""

from pathlib import Path

import pytest

from scripts.recipe_costs import RECIPES, main, recipe_cost


TRAINING = Path(__file__).parents[1] / "docs" / "training.md"


def test_recipe_costs():
    cost = recipe_cost(RECIPES / "image_classification_imagenet_tiny.yaml")
    assert 27e6 < cost["parameters"] < 29e6 and 4 < cost["gmacs"] < 5
    assert cost["pictures"] == 300 * 1_281_167
    assert cost["exaflops"] == pytest.approx(6 * cost["gmacs"] * cost["pictures"] / 1e9)


@pytest.mark.slow
def test_recipes_and_documentation_say_what_the_script_counts(capsys):
    main([])
    counted = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    said = [line for line in TRAINING.read_text().splitlines() if line.startswith("| `")]
    wrong = []
    for name, _, gmacs, _, operations, hours in counted:
        cost = f"{gmacs} GMACs a picture, {operations} x 10^18 operations in all: {hours} hours on eight GPUs"
        if f"# Cost (estimate): {cost}" not in (RECIPES / f"{name}.yaml").read_text():
            wrong.append(f"{name}.yaml: {cost}")
        row = f"{gmacs} | {operations} | {hours} |"
        is_said = any(line.startswith(f"| `{name}` |") and line.endswith(f"| {row}") for line in said)
        if not is_said and not name.endswith("_released"):  # which the table leaves out
            wrong.append(f"docs/training.md: {name}: {row}")
    assert len(counted) == 9 and not wrong, wrong
