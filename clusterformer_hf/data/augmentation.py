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
Random augmentation for image classification with torchvision's v2 transforms.

The random numbers of a picture come from (seed, epoch, row) alone, those of a batch from its pictures. So a run gives
the same batches with any number of workers, and a resumed run continues as if it had never stopped.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import BaseImageProcessor


@dataclass
class AugmentationArguments:
    """Random changes to the training pictures. The defaults suit fine-tuning on a few thousand photographs."""

    crop_scale: float = field(
        default=0.08, metadata={"help": "Smallest share of the area that a random crop keeps; 1 keeps all of it."}
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a mirrored picture."})
    affine: float = field(
        default=0.0,
        metadata={
            "help": "Largest random turn, in degrees; pictures are also moved, scaled and sheared a little. 0 is off. "
            "For digits and drawings."
        },
    )
    randaugment_magnitude: int = field(default=0, metadata={"help": "Strength of RandAugment, 0 (off) to 30."})
    randaugment_num_ops: int = field(default=2, metadata={"help": "Changes that RandAugment makes to a picture."})
    random_erasing: float = field(default=0.0, metadata={"help": "Probability that a rectangle is blanked out."})
    mixup_alpha: float = field(default=0.0, metadata={"help": "Alpha of mixup's beta distribution; 0 is off."})
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "Alpha of cutmix; 0 is off. With both on, each batch gets one of the two."}
    )

    def __post_init__(self):
        ranges = dict.fromkeys(("crop_scale", "horizontal_flip", "random_erasing"), (0, 1))
        ranges |= {"affine": (0, 180), "randaugment_magnitude": (0, 30), "randaugment_num_ops": (1, 16)}
        ranges |= {"mixup_alpha": (0, float("inf")), "cutmix_alpha": (0, float("inf"))}
        check_ranges(self, ranges)


def check_ranges(args, ranges: dict[str, tuple[float, float]]):
    """Raises `ValueError`, naming the flag, for a field of `args` that is not in its range, bounds included."""
    for name, (low, high) in ranges.items():
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name} must be in [{low}, {high}], got {getattr(args, name)}.")


def check_random_view(args, probabilities: tuple[str, ...]):
    """
    Raises `ValueError`, naming the flag, unless these fields of `args` are in [0, 1], `min_scale` and `max_scale` are
    positive and in this order, and `crop_size` is `None` or positive.
    """
    check_ranges(args, dict.fromkeys(probabilities, (0, 1)))
    if not 0 < args.min_scale <= args.max_scale:
        raise ValueError(
            f"--min_scale and --max_scale must be positive and in this order, got {args.min_scale} and "
            f"{args.max_scale}."
        )
    if args.crop_size is not None and args.crop_size < 1:
        raise ValueError(f"--crop_size must be at least 1, got {args.crop_size}.")


@contextmanager
def random_numbers_from(*key: int):
    """Inside, torch's random numbers on the CPU depend on `key` alone; outside they go on as before."""
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would seed the accelerators too.
        torch.default_generator.manual_seed(derive_seed(*key))
        yield


def derive_seed(*key: int) -> int:
    """A seed of 63 bits from non-negative numbers; other numbers or another order give an unrelated one."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


class TrainTransform:
    """
    A random view of a picture, normalised by the image processor like every picture.

    Takes an RGB `PIL.Image.Image` of any size, returns float32 pixels of shape `(3, height, width)`.
    """

    def __init__(self, image_processor: BaseImageProcessor, args: AugmentationArguments):
        size, resample = processed_size(image_processor), image_processor.resample
        transforms = [v2.RandomResizedCrop(size, scale=(args.crop_scale, 1.0), interpolation=resample)]
        if args.horizontal_flip > 0:
            transforms.append(v2.RandomHorizontalFlip(args.horizontal_flip))
        if args.affine > 0:
            moves = {"translate": (0.1, 0.1), "scale": (0.85, 1.15), "shear": args.affine * 2 / 3}
            transforms.append(v2.RandomAffine(args.affine, **moves, interpolation=v2.InterpolationMode.BILINEAR))
        if args.randaugment_magnitude > 0:
            transforms.append(v2.RandAugment(args.randaugment_num_ops, args.randaugment_magnitude))
        self.augment = v2.Compose(transforms)
        self.image_processor = image_processor
        self.erase = v2.RandomErasing(args.random_erasing)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = self.image_processor(self.augment(image), do_resize=False, do_center_crop=False, return_tensors="pt")[
            "pixel_values"
        ][0]
        return self.erase(pixels)


class EvalTransform:
    """What `pipeline("image-classification")` does to a picture: the image processor, nothing else."""

    def __init__(self, image_processor: BaseImageProcessor):
        self.image_processor = image_processor

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]


def processed_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of what the image processor returns."""
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    edge = size.get("shortest_edge")
    return (edge, edge) if edge is not None else (size["height"], size["width"])


class ClassificationCollator:
    """
    Stacks examples to `pixel_values` (batch, 3, height, width) and `labels`, and mixes training batches.

    Labels are class ids (batch,), int64; after mixup or cutmix shares of the classes (batch, num_labels), float32.
    Only examples with a `seed` are mixed. Their names are listed as `not_finite` where pixels are NaN or infinite.
    """

    def __init__(self, num_labels: int, args: AugmentationArguments):
        mixes = [
            mix(alpha=alpha, num_classes=num_labels)
            for mix, alpha in ((v2.MixUp, args.mixup_alpha), (v2.CutMix, args.cutmix_alpha))
            if alpha > 0
        ]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __call__(self, examples: list[dict]) -> dict:
        batch = {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }
        if "seed" not in examples[0]:
            return batch
        not_finite = [example["name"] for example in examples if not example["pixel_values"].isfinite().all()]
        if not_finite:
            batch["not_finite"] = not_finite
        if self.mix is not None:
            with random_numbers_from(*(example["seed"] for example in examples)):
                batch["pixel_values"], batch["labels"] = self.mix(batch["pixel_values"], batch["labels"])
        return batch
