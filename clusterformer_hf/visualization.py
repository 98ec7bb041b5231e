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
"""Pictures of what a model clusters."""

import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers.utils import ModelOutput


def cluster_map(outputs: ModelOutput, stage: int, head: int = 0, index: int = 0) -> np.ndarray:
    """
    The cluster that each pixel of a stage's map belongs to most.

    Args:
        outputs (`ModelOutput`): Of any ClusterFormer model called with `output_cluster_assignments=True`.
        stage (`int`): 1 to 4.
        head (`int`): Every head clusters for itself.
        index (`int`): Which image of the batch.

    Returns:
        `np.ndarray` of shape `(height, width)` and dtype int64 with values in [0, K); -1 at padded pixels.

    Raises:
        `ValueError`: if `outputs` holds no assignments, or no such stage or head.
    """
    assignments = outputs.get("cluster_assignments")
    if assignments is None:
        raise ValueError("The model must be called with output_cluster_assignments=True.")
    if not 1 <= stage <= len(assignments):
        raise ValueError(f"`stage` must be in [1, {len(assignments)}], got {stage}.")
    heads = assignments[stage - 1].shape[1]
    if not 0 <= head < heads:
        raise ValueError(f"`head` must be in [0, {heads}) for stage {stage}, got {head}.")
    weights = assignments[stage - 1][index, head].float()
    labels = weights.argmax(dim=0)
    return torch.where(weights.sum(dim=0) > 0, labels, -1).cpu().numpy()


def draw_clusters(
    image: Image.Image, outputs: ModelOutput, stage: int, head: int = 0, index: int = 0, opacity: float = 0.6
) -> Image.Image:
    """
    Lays a stage's clusters over the image, each in its own colour, with a line where clusters meet.

    Args:
        image (`PIL.Image.Image`): The picture that the pixels came from, of any size; the map is stretched over it.
        outputs, stage, head, index: See [`cluster_map`].
        opacity (`float`): Of the colours, in [0, 1].

    Returns:
        `PIL.Image.Image` in RGB of the image's size.
    """
    labels = cluster_map(outputs, stage, head, index)
    rows = np.arange(image.height) * labels.shape[0] // image.height
    columns = np.arange(image.width) * labels.shape[1] // image.width
    labels = labels[rows[:, None], columns[None]]

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    drawn = (1 - opacity) * pixels + opacity * palette(labels.max() + 1)[labels]
    drawn[labels < 0] = pixels[labels < 0]
    drawn[borders(labels)] = 255
    return Image.fromarray(drawn.round().astype(np.uint8))


def palette(num_colors: int) -> np.ndarray:
    """(num_colors, 3) RGB values in [0, 255]; neighbours differ since hues advance by the golden ratio."""
    hues = (np.arange(num_colors) * 0.618034) % 1
    return np.array([colorsys.hsv_to_rgb(hue, 0.75 - 0.25 * (i % 2), 0.95) for i, hue in enumerate(hues)]) * 255


def borders(labels: np.ndarray) -> np.ndarray:
    """True where the label differs from that of the pixel above or to the left."""
    different = np.zeros(labels.shape, dtype=bool)
    different[1:] |= labels[1:] != labels[:-1]
    different[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return different


def draw_stages(images: list[Image.Image], outputs: ModelOutput, side: int = 192, head: int = 0) -> Image.Image:
    """
    A panel with one row for each image: the image, then its clusters stage by stage.

    Args:
        images (`list[PIL.Image.Image]`): The first images of the batch that `outputs` belongs to.
        outputs, head: See [`cluster_map`].
        side (`int`): Height of a row in pixels.

    Returns:
        `PIL.Image.Image` in RGB.
    """
    gap, header = 8, 20
    stages = range(1, len(outputs.cluster_assignments) + 1)
    sizes = [(max(round(image.width * side / image.height), 1), side) for image in images]
    width = max(size[0] for size in sizes)
    panel = Image.new("RGB", ((width + gap) * (len(stages) + 1) + gap, header + len(images) * (side + gap)), "white")
    draw = ImageDraw.Draw(panel)
    titles = ["image"]
    for stage in stages:
        _, _, clusters, *size = outputs.cluster_assignments[stage - 1].shape
        titles.append(f"stage {stage}: {clusters} clusters, {size[0]} x {size[1]}")
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), 4), title, fill="black")
    for row, (image, size) in enumerate(zip(images, sizes)):
        image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        pictures = [image] + [draw_clusters(image, outputs, stage, head, index=row) for stage in stages]
        for column, picture in enumerate(pictures):
            panel.paste(picture, (gap + column * (width + gap), header + row * (side + gap)))
    return panel
