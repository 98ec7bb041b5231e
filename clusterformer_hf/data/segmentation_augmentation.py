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
"""Random augmentation of pictures and their masks with torchvision's v2 transforms."""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import BaseImageProcessor

from .augmentation import check_random_view


@dataclass
class SegmentationAugmentationArguments:
    """Random changes to the training pictures and their masks. The defaults suit fine-tuning on photographs."""

    crop_size: int | None = field(
        default=None,
        metadata={
            "help": "Sides of the training pictures; if unset, the image processor's size, or its shortest edge."
        },
    )
    min_scale: float = field(
        default=0.5,
        metadata={"help": "Smallest random size; 1 fits a picture into the crop. Long trainings on COCO use 0.1."},
    )
    max_scale: float = field(default=2.0, metadata={"help": "Largest random size, of which the crop is a part."})
    horizontal_flip: float = field(
        default=0.5,
        metadata={"help": "Probability of a mirrored picture; 0 where left and right differ, as in digits."},
    )
    photometric_distort: float = field(
        default=0.5,
        metadata={"help": "Probability of each change of brightness, contrast, saturation, hue and channels."},
    )

    def __post_init__(self):
        check_random_view(self, ("horizontal_flip", "photometric_distort"))

    def crop(self, image_processor: BaseImageProcessor) -> tuple[int, int]:
        """Height and width that training pictures are cut and padded to."""
        size = image_processor.size
        side = self.crop_size or size.get("shortest_edge")
        if side:
            return side, side
        if not (size.get("height") and size.get("width")):
            raise ValueError(f"The image processor's size {size} has no height and width: pass --crop_size.")
        return size["height"], size["width"]


class ScaleJitter(v2.Transform):
    """
    Resizes a picture and its masks by a random factor, which is 1 where the picture just fits into `size`: the
    large-scale jitter of https://arxiv.org/abs/2012.07177.

    Unlike torchvision's, whose masks keep each cell's top left pixel, masks keep the middle one: small pictures would
    lie half a pixel beside them.
    """

    def __init__(self, size: tuple[int, int], scale_range: tuple[float, float], interpolation):
        super().__init__()
        self.size, self.scale_range, self.interpolation = size, scale_range, interpolation

    def make_params(self, flat_inputs: list) -> dict:
        height, width = v2.functional.get_size(flat_inputs[0])
        scale = torch.empty(()).uniform_(*self.scale_range).item()
        scale *= min(self.size[0] / height, self.size[1] / width)
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt: torch.Tensor, params: dict) -> torch.Tensor:
        is_mask = isinstance(inpt, tv_tensors.Mask)
        interpolation = v2.InterpolationMode.NEAREST_EXACT if is_mask else self.interpolation
        return v2.functional.resize(inpt, params["size"], interpolation=interpolation, antialias=True)


class RandomCrop(v2.Transform):
    """A random part of a picture and its masks, `size` large, or smaller where the picture is: batches are padded."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list) -> dict:
        sides = v2.functional.get_size(flat_inputs[0])
        kept = [min(side, wanted) for side, wanted in zip(sides, self.size)]
        top, left = (torch.randint(side - part + 1, ()).item() for side, part in zip(sides, kept))
        return {"top": top, "left": left, "height": kept[0], "width": kept[1]}

    def transform(self, inpt: torch.Tensor, params: dict) -> torch.Tensor:
        return v2.functional.crop(inpt, **params)


class SegmentationTrainTransform:
    """
    A random view of a picture and its masks, normalised by the image processor like every picture.

    Takes an RGB `PIL.Image.Image` and a label map (H, W) or masks (n, H, W) of its size. Returns float32 pixels
    (3, height, width) and the label map or masks of that size and of the type they had.
    """

    def __init__(self, image_processor: BaseImageProcessor, args: SegmentationAugmentationArguments):
        size = args.crop(image_processor)
        scales = (args.min_scale, args.max_scale)
        transforms = [ScaleJitter(size, scales, image_processor.resample), RandomCrop(size)]
        if args.horizontal_flip > 0:
            transforms.append(v2.RandomHorizontalFlip(args.horizontal_flip))
        if args.photometric_distort > 0:
            transforms.append(v2.RandomPhotometricDistort(p=args.photometric_distort))
        self.augment = v2.Compose(transforms)
        self.image_processor = image_processor

    def __call__(self, image: Image.Image, masks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        image, masks = self.augment(v2.functional.to_image(image), tv_tensors.Mask(masks))
        pixels = self.image_processor(image.as_subclass(torch.Tensor), do_resize=False, return_tensors="pt")
        return pixels["pixel_values"][0], masks.as_subclass(torch.Tensor)


class SegmentationEvalTransform:
    """
    What `pipeline("image-segmentation")` does to a picture: the image processor, nothing else; masks follow in size.

    Takes and returns what [`SegmentationTrainTransform`] does.
    """

    def __init__(self, image_processor: BaseImageProcessor):
        self.image_processor = image_processor

    def __call__(self, image: Image.Image, masks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
        masks = v2.functional.resize(
            tv_tensors.Mask(masks), pixels.shape[-2:], interpolation=v2.InterpolationMode.NEAREST_EXACT
        )
        return pixels, masks.as_subclass(torch.Tensor)
