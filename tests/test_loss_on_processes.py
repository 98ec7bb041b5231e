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
"""The set losses on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from clusterformer_hf import ClusterFormerConfig
from clusterformer_hf.loss_clusterformer import detection_loss


CODE = """
import sys
import torch
import torch.distributed as dist
from clusterformer_hf import ClusterFormerConfig
from clusterformer_hf.loss_clusterformer import detection_loss, segmentation_loss

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[1]
config = ClusterFormerConfig(num_labels=3, train_num_points=64)
inputs = torch.load(folder + "/inputs.pt")
own = slice(2 * rank, 2 * rank + 2)
outputs = [{name: tensor[own] for name, tensor in inputs["outputs"].items()}]
_, boxes = detection_loss(outputs, inputs["labels"][own], config)
masks = [torch.ones(len(label["boxes"]), 16, 16) for label in inputs["labels"][own]]
classes = [label["class_labels"] for label in inputs["labels"][own]]
outputs = [{"class_queries_logits": torch.zeros(2, 5, 4), "masks_queries_logits": torch.zeros(2, 5, 8, 8)}]
_, segments = segmentation_loss(outputs, masks, classes, config)
torch.save({**boxes, **segments}, folder + f"/{rank}.pt")
"""


def test_losses_average_to_that_of_one_process(tmp_path):
    """The second process has no object at all: neither waits for the other."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(4, 5, 2, generator=generator) * 0.3 + 0.1
    outputs = {
        "logits": torch.randn(4, 5, 3, generator=generator),
        "pred_boxes": torch.cat([0.3 + 0.4 * torch.rand(4, 5, 2, generator=generator), sizes], dim=-1),
    }
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.3, 0.6, 0.2, 0.4], [0.7, 0.4, 0.1, 0.3]])
    labels = [{"class_labels": torch.arange(count), "boxes": boxes[:count]} for count in (3, 1, 0, 0)]
    torch.save({"outputs": outputs, "labels": labels}, tmp_path / "inputs.pt")
    script = tmp_path / "losses.py"
    script.write_text(CODE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script), str(tmp_path)], env=environment, check=True, timeout=240)

    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    _, expected = detection_loss([outputs], labels, ClusterFormerConfig(num_labels=3))
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        torch.testing.assert_close((results[0][name] + results[1][name]) / 2, expected[name])
    # Every mask logit is 0, so a mask's binary cross-entropy is log 2: four masks over a mean of two a process.
    torch.testing.assert_close(results[0]["loss_mask"], torch.tensor(2 * 2.0).log())
    assert results[1]["loss_mask"] == 0
