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
"""`make demo`: the README's first command, with one pass over the digits instead of ten."""

import json

from PIL import Image

from clusterformer_hf.hub import RESULTS_NAME
from scripts.quickstart import main


def test_quickstart(tmp_path, capfd):
    main(["--output_dir", str(tmp_path), "--num_train_epochs", "1"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["test_accuracy"] > 0.75 and results["seconds"] > 0
    assert 0.9e6 < results["parameters"] < 1.1e6
    assert [row["stage"] for row in results["stages"]] == [1, 2, 3, 4]
    assert all(0 < row["entropy"] < 1 and 1 <= row["in_use"] <= row["clusters"] for row in results["stages"])

    # In a process of its own, where this package cannot be imported.
    printed = capfd.readouterr().out
    assert "Reloaded transformers_modules." in printed and "16 logits equal bit by bit" in printed
    assert f"test accuracy {results['test_accuracy']:.1%}" in printed

    numbers = json.loads((tmp_path / "model" / RESULTS_NAME).read_text())
    assert numbers["eval_accuracy"] == results["test_accuracy"]
    picture = Image.open(tmp_path / "clusters.png")
    assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 24)) > 100
