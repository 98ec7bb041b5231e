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
Training and evaluation data for object detection: examples, random augmentation, padded batches.

Inside, boxes are torchvision's `BoundingBoxes` in pixels, corner by corner. In examples they are centre x, centre y,
width and height as shares of the picture's own height and width: padding a batch changes none of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from transformers import BaseImageProcessor, PreTrainedConfig

from .augmentation import check_random_view, derive_seed, random_numbers_from
from .classification import match_classes
from .detection_data import DetectionData, listed
from .images import image_name


# Random sizes between the smallest and the largest.
NUM_SCALES = 11


@dataclass
class DetectionAugmentationArguments:
    """Random changes to the training pictures and their boxes. The defaults suit photographs."""

    min_scale: float = field(
        default=0.6, metadata={"help": "Smallest random size, as a share of the image processor's size."}
    )
    max_scale: float = field(default=1.0, metadata={"help": "Largest random size; memory grows with its square."})
    crop: float = field(
        default=0.5, metadata={"help": "Probability of a random crop that keeps the centre of at least one box."}
    )
    crop_size: int | None = field(
        default=None,
        metadata={
            "help": "Cut and pad training pictures, after the random size, to squares with sides of so many pixels: "
            "they lie at random places then, and batches have one size. If unset, pictures are whole."
        },
    )
    horizontal_flip: float = field(
        default=0.5,
        metadata={"help": "Probability of a mirrored picture; 0 where left and right differ, as in digits."},
    )
    photometric_distort: float = field(
        default=0.5,
        metadata={"help": "Probability of each change of brightness, contrast, saturation, hue and channels."},
    )

    def __post_init__(self):
        check_random_view(self, ("crop", "horizontal_flip", "photometric_distort"))


class DetectionTrainTransform:
    """
    A random view of a picture and of the boxes that are in it, normalised by the image processor like every picture.

    Takes an RGB `PIL.Image.Image`, boxes (n, 4), x, y, x, y in pixels inside it, and classes (n,). Returns float32
    pixels (3, height, width), boxes (k, 4) in [0, 1], float32 (see the module), and classes (k,), int64.
    """

    def __init__(self, image_processor: BaseImageProcessor, args: DetectionAugmentationArguments):
        transforms = []
        if args.crop > 0:
            transforms.append(v2.RandomApply([v2.RandomIoUCrop()], args.crop))
        transforms.append(random_resize(image_processor, args.min_scale, args.max_scale))
        if args.crop_size is not None:
            fill = [255 * mean for mean in image_processor.image_mean]
            transforms.append(v2.RandomCrop(args.crop_size, pad_if_needed=True, fill=fill))
        if args.horizontal_flip > 0:
            transforms.append(v2.RandomHorizontalFlip(args.horizontal_flip))
        if args.photometric_distort > 0:
            transforms.append(v2.RandomPhotometricDistort(p=args.photometric_distort))
        # A crop leaves boxes that reach outside, and empty ones of what it cut away.
        self.augment = v2.Compose([*transforms, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])
        self.image_processor = image_processor

    def __call__(self, image: Image.Image, boxes: np.ndarray, labels: np.ndarray):
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.size[::-1], dtype=torch.float32)
        sample = {"image": v2.functional.to_image(image), "boxes": boxes, "labels": torch.as_tensor(labels)}
        sample = self.augment(sample)
        pixels = process(self.image_processor, sample["image"].as_subclass(torch.Tensor), do_resize=False)
        return pixels, relative_boxes(sample["boxes"], *sample["boxes"].canvas_size), sample["labels"]


class DetectionEvalTransform:
    """
    What `pipeline("object-detection")` does to a picture: the image processor, nothing else.

    Takes and returns what [`DetectionTrainTransform`] does.
    """

    def __init__(self, image_processor: BaseImageProcessor):
        self.image_processor = image_processor

    def __call__(self, image: Image.Image, boxes: np.ndarray, labels: np.ndarray):
        boxes = relative_boxes(torch.as_tensor(boxes, dtype=torch.float32), image.height, image.width)
        return process(self.image_processor, image), boxes, torch.as_tensor(labels)


def process(image_processor: BaseImageProcessor, image: Image.Image | torch.Tensor, **kwargs) -> torch.Tensor:
    """One picture's pixels (3, height, width) without padding, which would change boxes and belongs to the batch."""
    return image_processor(image, do_pad=False, return_tensors="pt", **kwargs)["pixel_values"][0]


def relative_boxes(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Corners (n, 4) in pixels as centre x, centre y, width and height in [0, 1], float32."""
    size = torch.tensor([width, height, width, height], dtype=torch.float32)
    return box_convert(boxes.as_subclass(torch.Tensor), "xyxy", "cxcywh") / size


def random_resize(image_processor: BaseImageProcessor, min_scale: float, max_scale: float) -> v2.Transform:
    """A random size between two shares of the image processor's, in the same proportions as the processor's resize."""
    size, scales = image_processor.size, np.linspace(min_scale, max_scale, NUM_SCALES)
    options = {"interpolation": image_processor.resample, "antialias": True}
    if size.get("shortest_edge"):
        edges = sorted({round(size["shortest_edge"] * scale) for scale in scales})
        longest = size.get("longest_edge")
        return v2.RandomShortestSize(edges, max_size=longest and round(longest * max(max_scale, 1)), **options)
    if size.get("height") and size.get("width"):
        sizes = sorted({(round(size["height"] * scale), round(size["width"] * scale)) for scale in scales})
        return v2.RandomChoice([v2.Resize(size, **options) for size in sizes])
    raise ValueError(
        f"The image processor's size must have shortest_edge (and longest_edge) or height and width, got {size}."
    )


def match_categories(data: DetectionData, config: PreTrainedConfig) -> list[int]:
    """
    The ids that a model knows the classes of a data set by, each in [0, num_labels).

    Raises:
        `ValueError`: if there are classes that the model does not know; names the file, the classes and their ids.
    """
    try:
        return match_classes(data.class_names, config.label2id)
    except ValueError as error:
        raise ValueError(
            f"{data.source}: `categories` has {len(data.categories)} classes with the ids {listed(data.category_ids)}, "
            f"the model {config.num_labels}. {error}"
        ) from error


class DetectionDataset(torch.utils.data.Dataset):
    """
    Pictures as examples, decoded when asked for: `pixel_values` (3, height, width), float32, and `labels`, a dict of
    `class_labels` (n,) int64, `boxes` (n, 4) float32, `image_id` (1,) int64 and `orig_size` (2,) int64: the picture's
    height and width in pixels.

    Args:
        data: Where pictures and boxes are.
        transform: [`DetectionTrainTransform`] or [`DetectionEvalTransform`].
        class_ids: The model's id of each class, as [`match_categories`] finds it.
        seed: For training. The transform's random numbers then depend on (seed, epoch, row) alone, and examples hold
            their own `seed` and the picture's `name` too. Trainer's epochs are told by `set_epoch`.
    """

    def __init__(self, data: DetectionData, transform: Callable, class_ids: list[int], seed: int | None = None):
        self.data, self.transform, self.seed = data, transform, seed
        self.class_ids = np.array(class_ids, np.int64)
        # Shared with data workers that live longer than an epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.data)

    def set_epoch(self, epoch: int):
        self.epoch.fill_(epoch)

    def __getitem__(self, row: int) -> dict:
        if self.seed is None:
            return self._example(row)
        seed = derive_seed(self.seed, self.epoch.item(), row)
        with random_numbers_from(seed):
            example = self._example(row)
        return example | {"seed": seed, "name": image_name(self.data.pictures[row]["image"], row)}

    def _example(self, row: int) -> dict:
        picture, boxes, classes = self.data.open(row)
        pixel_values, boxes, class_labels = self.transform(picture, boxes, self.class_ids[classes])
        labels = {
            "class_labels": class_labels,
            "boxes": boxes,
            "image_id": torch.tensor(self.data.image_ids[row : row + 1]),
            "orig_size": torch.tensor(self.data.sizes[row]),
        }
        return {"pixel_values": pixel_values, "labels": labels}


class DetectionCollator:
    """
    Pads examples at the right and at the bottom to the largest height and width among them.

    Returns `pixel_values` (batch, 3, height, width), `pixel_mask` (batch, height, width), int64, 1 at real pixels, and
    `labels`, the list of the examples' labels. Names of training pictures are listed as `not_finite` where pixels are
    NaN or infinite.

    Args:
        pad_to_multiple_of: Height and width of the batch become multiples of it: fewer shapes to compile for.
    """

    def __init__(self, pad_to_multiple_of: int = 1):
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: list[dict]) -> dict:
        pictures = [example["pixel_values"] for example in examples]
        height, width = (self._padded(max(picture.shape[axis] for picture in pictures)) for axis in (1, 2))
        pixel_values = pictures[0].new_zeros(len(pictures), 3, height, width)
        pixel_mask = torch.zeros(len(pictures), height, width, dtype=torch.int64)
        for row, picture in enumerate(pictures):
            pixel_values[row, :, : picture.shape[1], : picture.shape[2]] = picture
            pixel_mask[row, : picture.shape[1], : picture.shape[2]] = 1
        batch = {
            "pixel_values": pixel_values,
            "pixel_mask": pixel_mask,
            "labels": [example["labels"] for example in examples],
        }
        not_finite = [
            example["name"]
            for example in examples
            if "name" in example and not example["pixel_values"].isfinite().all()
        ]
        return batch | {"not_finite": not_finite} if not_finite else batch

    def _padded(self, side: int) -> int:
        return -(-side // self.pad_to_multiple_of) * self.pad_to_multiple_of
