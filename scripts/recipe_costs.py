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
Counts what the recipes for the paper's results cost, before anybody pays for it.

    python scripts/recipe_costs.py [--teraflops 25]

For each recipe: multiply-accumulates of one picture in inference, counted, at the size that training shows it; three
times as many in training; times the pictures of the whole run. Hours are an estimate: those of eight GPUs that each
sustain `--teraflops` (10^12 operations a second, two for a multiply-accumulate).

Forward and backward pass of a training step counted at 224 and 256 pixels, without AdamW: 2.99 times the inference for
classes and boxes, 3.04 for masks, which training reads from every layer. (`FlopCounterMode` alone says 3.4 to 3.7: it
takes the backward pass of a depthwise convolution for that of a full one.)
"""

import argparse
from pathlib import Path

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from clusterformer_hf import (
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    ClusterFormerForSemanticSegmentation,
    ClusterFormerForUniversalSegmentation,
)


RECIPES = Path(__file__).parent / "recipes"
NUM_GPUS = 8
# Model, classes, pictures of an epoch, and height and width of a training picture.
TASKS = {
    "image_classification_imagenet": (ClusterFormerForImageClassification, 1000, 1_281_167, (224, 224)),
    "object_detection_coco_": (ClusterFormerForObjectDetection, 80, 118_287, (800, 1088)),  # 4:3, as most of COCO
    "instance_segmentation_coco": (ClusterFormerForUniversalSegmentation, 80, 118_287, (1024, 1024)),
    "panoptic_segmentation_coco": (ClusterFormerForUniversalSegmentation, 133, 118_287, (1024, 1024)),
    "semantic_segmentation_ade20k": (ClusterFormerForSemanticSegmentation, 150, 20_210, (512, 512)),
}


def recipe_cost(path: Path) -> dict[str, float]:
    """`parameters`, `gmacs` of a picture in inference, `pictures` of the run, and its `exaflops` (10^18 operations)."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    model_class, num_labels, epoch, size = next(task for name, task in TASKS.items() if path.stem.startswith(name))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # where nothing is computed
        model = model_class(ClusterFormerConfig(num_labels=num_labels, **recipe.get("config_overrides", {}))).eval()
        model(torch.zeros(1, 3, *size))
    gmacs = counter.get_total_flops() / 2e9
    steps = recipe.get("max_steps")
    pictures = steps * recipe["total_train_batch_size"] if steps else recipe["num_train_epochs"] * epoch
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters,
        "gmacs": gmacs,
        "pictures": pictures,
        "exaflops": 3 * 2 * gmacs * 1e9 * pictures / 1e18,
    }


def main(args: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teraflops", type=float, default=25, help="What a GPU sustains.")
    teraflops = parser.parse_args(args).teraflops
    print("| recipe | parameters | GMACs a picture | pictures | 10^18 operations | hours on 8 GPUs (estimate) |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in TASKS:
        for path in sorted(RECIPES.glob(f"{name}*.yaml")):
            cost = recipe_cost(path)
            hours = cost["exaflops"] * 1e6 / (teraflops * NUM_GPUS) / 3600
            numbers = f"{cost['parameters'] / 1e6:.1f}M | {cost['gmacs']:.1f} | {cost['pictures'] / 1e6:.1f}M"
            print(f"| {path.stem} | {numbers} | {cost['exaflops']:,.1f} | {hours:,.1f} |")


if __name__ == "__main__":
    main()
