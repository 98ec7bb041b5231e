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
"""Pictures of segments: coloured overlays with a legend."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from .visualization import borders, label_font, palette


MAX_ENTRIES = 40
MIN_LEGEND_WIDTH = 240


def draw_segments(image: Image.Image, masks: np.ndarray, colors: np.ndarray, opacity: float = 0.6) -> Image.Image:
    """
    Lays masks over a picture, each in its colour, with a white line around it. Later ones lie on top.

    Args:
        image (`PIL.Image.Image`): The picture that the masks belong to.
        masks (`np.ndarray` of shape `(n, height, width)`): Of its size, bool.
        colors (`np.ndarray` of shape `(n, 3)`): RGB values in [0, 255], see [`segment_colors`].
        opacity (`float`): Of the colours, in [0, 1].

    Returns:
        `PIL.Image.Image` in RGB of the image's size.

    Raises:
        `ValueError`: if the masks have another size than the picture.
    """
    image, masks = image.convert("RGB"), np.asarray(masks, bool)
    if masks.shape[1:] != (image.height, image.width):
        raise ValueError(f"Masks of {masks.shape[1:]} do not fit a picture of {(image.height, image.width)}.")
    if len(masks) == 0:
        return image
    on_top = np.zeros(masks.shape[1:], np.int64)
    for number, mask in enumerate(masks, start=1):
        on_top[mask] = number
    # No mask over another, so that no colours mix.
    visible = torch.from_numpy(on_top[None] == np.arange(1, len(masks) + 1)[:, None, None])
    drawn = draw_segmentation_masks(pil_to_tensor(image), visible, alpha=opacity, colors=_as_tuples(colors))
    pixels = np.array(to_pil_image(drawn))
    pixels[borders(on_top)] = 255
    return Image.fromarray(pixels)


def segment_colors(labels: list[int], num_labels: int | None = None) -> np.ndarray:
    """
    Colours (n, 3) of segments in [0, 255]: one for each class if `num_labels` says how many there are, else one for
    each segment, which tells instances of a class apart.
    """
    return palette(len(labels)) if num_labels is None else palette(num_labels)[np.asarray(labels, np.int64)]


def add_legend(image: Image.Image, texts: list[str], colors: np.ndarray) -> Image.Image:
    """
    The picture, unchanged, and below it a field of each colour with its text, as many as `MAX_ENTRIES`; a narrow
    picture gets white space at its right.
    """
    more = [f"and {len(texts) - MAX_ENTRIES} more"] if len(texts) > MAX_ENTRIES else []
    entries = [*zip(texts[:MAX_ENTRIES], _as_tuples(colors)), *((text, (255, 255, 255)) for text in more)]
    font, measure = label_font(image), ImageDraw.Draw(image)
    line = math.ceil(measure.textbbox((0, 0), "Ag", font=font)[3]) + 4
    width, places, x, y = max(image.width, MIN_LEGEND_WIDTH), [], 4, image.height + 4
    for text, _ in entries:
        needed = line + 4 + math.ceil(measure.textlength(text, font=font)) + 12
        if x > 4 and x + needed > width:
            x, y = 4, y + line
        places.append((x, y))
        x += needed
    drawn = Image.new("RGB", (width, y + line + 4 if entries else image.height), "white")
    drawn.paste(image.convert("RGB"), (0, 0))
    draw = ImageDraw.Draw(drawn)
    for (text, color), (x, y) in zip(entries, places):
        draw.rectangle((x, y + 1, x + line - 4, y + line - 3), fill=color)
        draw.text((x + line, y), text, fill="black", font=font)
    return drawn


def side_by_side(pictures: list[Image.Image], titles: list[str], gap: int = 8) -> Image.Image:
    """Pictures in a row, aligned at the top, each with a title above it."""
    font = label_font(max(pictures, key=lambda picture: max(picture.size)))
    header = math.ceil(ImageDraw.Draw(pictures[0]).textbbox((0, 0), "Ag", font=font)[3]) + 8
    width = sum(picture.width + gap for picture in pictures) + gap
    panel = Image.new("RGB", (width, header + max(picture.height for picture in pictures) + gap), "white")
    x = gap
    for picture, title in zip(pictures, titles, strict=True):
        ImageDraw.Draw(panel).text((x, 4), title, fill="black", font=font)
        panel.paste(picture, (x, header))
        x += picture.width + gap
    return panel


def _as_tuples(colors: np.ndarray) -> list[tuple[int, int, int]]:
    return [tuple(color) for color in np.asarray(colors).round().astype(int).tolist()]
