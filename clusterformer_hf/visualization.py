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
"""Pictures of what a model clusters and of what it finds."""

import colorsys
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes
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
        image (`PIL.Image.Image`):
            The picture that the pixels came from, of any size: the map, without padding, is stretched over it.
        outputs, stage, head, index: See [`cluster_map`].
        opacity (`float`): Of the colours, in [0, 1].

    Returns:
        `PIL.Image.Image` in RGB of the image's size.
    """
    labels = cluster_map(outputs, stage, head, index)
    height, width = _real_size(outputs.cluster_assignments[stage - 1][index, head])
    labels = stretch(labels[:height, :width], (image.height, image.width))

    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    drawn = (1 - opacity) * pixels + opacity * palette(labels.max() + 1)[labels]
    drawn[borders(labels)] = 255
    return Image.fromarray(drawn.round().astype(np.uint8))


def stretch(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (height, width) over the same area in another size, every value that of the pixel it lies in."""
    rows, columns = (np.arange(to) * side // to for to, side in zip(size, labels.shape))
    return labels[rows[:, None], columns[None]]


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


def draw_center_paths(image: Image.Image, places: np.ndarray, head: int = 0) -> Image.Image:
    """
    Draws over the image where the centres of a clustering moved: a line from the cell that each started at, and a dot
    where it ended, in the colour of its cluster.

    Args:
        image (`PIL.Image.Image`): The picture that the pixels came from, of any size.
        places (`np.ndarray` or `torch.Tensor` of shape `(T + 1, heads, K, 2)`):
            Row and column in [0, 1] after each iteration, see [`StageIterations`]; centres with `nan` are left out.
        head (`int`): Every head clusters for itself.

    Returns:
        `PIL.Image.Image` in RGB of the image's size.
    """
    image, unit = image.convert("RGB"), max(1, round(max(image.size) / 320))
    draw, colors = ImageDraw.Draw(image), palette(len(places[0][head])).round().astype(int)
    points = np.asarray(places, float)[:, head, :, ::-1] * image.size
    for number, color in enumerate(map(tuple, colors.tolist())):
        path = [tuple(point) for point in points[:, number].tolist()]
        if not np.isnan(path).any():
            draw.line(path, fill="white", width=unit)
            draw.circle(path[-1], 2 * unit, fill=color, outline="white")
    return image


def draw_stages(images: list[Image.Image], outputs: ModelOutput, side: int = 192, head: int = 0) -> Image.Image:
    """
    A panel with one row for each image: the image, then its clusters stage by stage.

    Args:
        images (`list[PIL.Image.Image]`): The first images of the batch that `outputs` belongs to.
        outputs, head: See [`cluster_map`].
        side (`int`): Height of a row in pixels, and a fourth of the largest width of a picture in it.

    Returns:
        `PIL.Image.Image` in RGB.
    """
    gap, header = 8, 20
    stages = range(1, len(outputs.cluster_assignments) + 1)
    scales = [min(side / image.height, 4 * side / image.width) for image in images]
    sizes = [_scaled_size(image, scale) for image, scale in zip(images, scales)]
    titles = ["image"]
    for stage in stages:
        _, _, clusters, *size = outputs.cluster_assignments[stage - 1].shape
        titles.append(f"stage {stage}: {clusters} clusters, {size[0]} x {size[1]}")
    font = ImageFont.load_default()
    width = max(*(math.ceil(font.getlength(title)) for title in titles), *(size[0] for size in sizes))
    panel = Image.new("RGB", ((width + gap) * (len(stages) + 1) + gap, header + len(images) * (side + gap)), "white")
    draw = ImageDraw.Draw(panel)
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), 4), title, fill="black", font=font)
    for row, (image, size) in enumerate(zip(images, sizes)):
        image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        pictures = [image] + [draw_clusters(image, outputs, stage, head, index=row) for stage in stages]
        for column, picture in enumerate(pictures):
            panel.paste(picture, (gap + column * (width + gap), header + row * (side + gap)))
    return panel


def _scaled_size(image: Image.Image, scale: float) -> tuple[int, int]:
    width, height = (max(round(length * scale), 1) for length in image.size)
    return width, height


def detection_queries(outputs: ModelOutput, threshold: float = 0.5, top_k: int = 100) -> list[torch.Tensor]:
    """
    Which centre each detection came from: repeats the selection of
    `DeformableDetrImageProcessor.post_process_object_detection`, which returns the detections without their centres.

    Args:
        outputs (`ModelOutput`): Of [`ClusterFormerForObjectDetection`].
        threshold, top_k: As given to the image processor, with its defaults.

    Returns:
        `list[torch.Tensor]`: for each image the centres, (n,) int64 in [0, K), in the order of the detections. A centre
        with high scores for several classes comes several times.
    """
    scores = outputs.logits.sigmoid().flatten(1)
    values, indices = scores.topk(min(top_k, scores.shape[1]), dim=1)
    num_labels = outputs.logits.shape[-1]
    return [index[value > threshold] // num_labels for value, index in zip(values, indices)]


def box_assignment(outputs: ModelOutput, index: int, query: int, layer: int = -1) -> np.ndarray:
    """
    The shares of the pixels in one centre, which its box was read from: mean of the heads, all levels in one map.

    Every level is spread over the finest one's pixels. There a coarse level counts as much less as it has fewer pixels,
    since in the moments each of its pixels counts as one. So mean and variance of position under this map, pixels taken
    as squares, are those that the box was read from: exactly where the levels' pixels align, and within about a tenth
    of the finest level's pixel elsewhere.

    Args:
        outputs (`ModelOutput`): Of [`ClusterFormerForObjectDetection`] called with `output_cluster_assignments=True`.
        index (`int`): Which image of the batch.
        query (`int`): Which centre, in [0, K). [`detection_queries`] finds those of the detections.
        layer (`int`): Which decoder layer; negative numbers count from the last.

    Returns:
        `np.ndarray` of shape `(height, width)` and dtype float64 with values in [0, 1]: the finest level's pixels that
        are no padding. The maps of all centres sum to at most 1 at a pixel.

    Raises:
        `ValueError`: if `outputs` holds no such assignments, or no such layer, image or centre.
    """
    layers = outputs.get("decoder_cluster_assignments")
    if layers is None:
        raise ValueError("The detection model must be called with output_cluster_assignments=True.")
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"`layer` must be in [{-len(layers)}, {len(layers)}), got {layer}.")
    batch_size, _, num_centers = layers[layer][0].shape[:3]
    for name, value, end in (("index", index, batch_size), ("query", query, num_centers)):
        if not 0 <= value < end:
            raise ValueError(f"`{name}` must be in [0, {end}), got {value}.")

    levels = []
    for weights in layers[layer]:
        height, width = _real_size(weights[index, 0])
        levels.append(weights[index, :, query, :height, :width].double().mean(dim=0).cpu().numpy())
    counts = [level.size / levels[0].size for level in levels]
    spread = (count * spread_over(level, levels[0].shape) for count, level in zip(counts, levels))
    return (sum(spread) / sum(counts)).clip(0, 1)


def _real_size(assignments: torch.Tensor) -> tuple[int, int]:
    """Height and width of the real area of assignments (K, height, width), which are 0 at padding."""
    real = assignments.sum(dim=0) > 0
    return int(real.any(dim=1).sum()), int(real.any(dim=0).sum())


def segment_queries(
    outputs: ModelOutput, masks: np.ndarray, labels: list[int], subtask: str, index: int = 0
) -> list[int]:
    """
    Which centre each segment came from, or most of it where it came from several.

    Args:
        outputs (`ModelOutput`):
            Of [`ClusterFormerForUniversalSegmentation`] called with `output_cluster_assignments=True`.
        masks (`np.ndarray` of shape `(n, height, width)`): Bool, of any size, over the image's real area.
        labels (`list[int]`): The class of each.
        subtask (`str`):
            How the segments were read. An `"instance"` is the whole mask of a centre: the one that it overlaps best, by
            intersection over union. `"panoptic"` and `"semantic"` segments share out the pixels by the product of mask
            and probability of the class, so its sum over the segment counts, for `"panoptic"` among the centres of the
            segment's class.
        index (`int`): Which image of the batch.

    Returns:
        `list[int]`: the centres, in [0, K).
    """
    logits = outputs.masks_queries_logits[index]
    height, width = _real_size(outputs.cluster_assignments[0][index, 0])  # the first stage's pixels are the masks'
    soft = logits[:, :height, :width].float().sigmoid().cpu()
    scores = outputs.class_queries_logits[index].float().softmax(dim=-1).cpu()
    if subtask == "panoptic":
        scores = scores * (scores == scores.amax(dim=-1, keepdim=True))
    queries = []
    for mask, label in zip(masks, labels, strict=True):
        inside = torch.from_numpy(spread_over(np.asarray(mask, float), (height, width))).float()
        if subtask == "instance":
            own, inside = soft > 0.5, inside > 0.5
            fit = (own & inside).sum(dim=(1, 2)) / (own | inside).sum(dim=(1, 2)).clamp_min(1)
        else:
            fit = scores[:, label] * (soft * inside).sum(dim=(1, 2))
        queries.append(int(fit.argmax()))
    return queries


def spread_over(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (height, width) on a grid of `size` over the same area: means over the area that the pixels share."""
    rows, columns = (_shared_area(fine, coarse) for fine, coarse in zip(size, values.shape))
    return rows @ values @ columns.T


def _shared_area(fine: int, coarse: int) -> np.ndarray:
    """(fine, coarse): which share of each of `fine` equal parts of a line each of `coarse` equal parts covers."""
    (start, end), (low, high) = ((np.arange(n) / n, np.arange(1, n + 1) / n) for n in (fine, coarse))
    return (np.minimum(end[:, None], high) - np.maximum(start[:, None], low)).clip(0) * fine


def draw_boxes(
    image: Image.Image, detections: dict[str, torch.Tensor], id2label: dict[int, str] | None = None
) -> Image.Image:
    """
    Draws boxes with label and score, a colour for each class.

    Args:
        image (`PIL.Image.Image`): The picture that the boxes belong to.
        detections (`dict[str, torch.Tensor]`):
            As `post_process_object_detection` returns them for the picture's size: `scores` (n,), `labels` (n,) int64
            and `boxes` (n, 4) as x_min, y_min, x_max, y_max in pixels. What lies outside of the picture is cut off.
        id2label (`dict[int, str]`, *optional*): Names of the classes, as in the config; numbers without it.

    Returns:
        `PIL.Image.Image` in RGB of the image's size.
    """
    image = image.convert("RGB")
    scores, labels = detections["scores"].tolist(), detections["labels"].tolist()
    if len(labels) == 0:
        return image
    boxes = detections["boxes"].detach().cpu().float()
    boxes = torch.stack([boxes[:, 0::2].clamp(0, image.width - 1), boxes[:, 1::2].clamp(0, image.height - 1)], dim=-1)
    boxes = boxes.flatten(1).round()
    colors = [tuple(color) for color in palette(max(labels) + 1)[labels].round().astype(int).tolist()]
    names = [label if id2label is None else id2label[label] for label in labels]
    # Backwards, so that the most certain one lies on top.
    line = max(2, round(max(image.size) / 320))
    drawn = draw_bounding_boxes(pil_to_tensor(image), boxes.flip(0), colors=colors[::-1], width=line)
    image = to_pil_image(drawn)
    for box, color, name, score in reversed(list(zip(boxes.tolist(), colors, names, scores, strict=True))):
        _draw_label(image, f"{name} {score:.2f}", box, color)
    return image


def label_font(image: Image.Image) -> ImageFont.ImageFont:
    """A font whose size goes with the image's."""
    return ImageFont.load_default(size=max(10, round(max(image.size) / 50)))


def _draw_label(image: Image.Image, text: str, box: list[float], color: tuple[int, int, int]):
    """Above the box, or inside at its top where there is no room; never beyond the picture's right side."""
    draw, font = ImageDraw.Draw(image), label_font(image)
    width, height = (math.ceil(end) + 4 for end in draw.textbbox((0, 0), text, font=font)[2:])
    x = max(0, min(box[0], image.width - width))
    y = box[1] - height if box[1] >= height else box[1]
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    bright = np.dot(color, (0.299, 0.587, 0.114)) > 110
    draw.text((x + 2, y + 1), text, fill="black" if bright else "white", font=font)


def draw_heat(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """
    Lays a map (height, width) of values that are not negative over the greyed picture, stretched to its size: the
    higher beside the map's highest, the more it covers, from red to yellow.
    """
    heat = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    heat = np.asarray(heat)[..., None] / max(np.max(heat), np.finfo(np.float32).tiny)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    color = np.concatenate([np.full_like(heat, 255), 255 * heat, np.zeros_like(heat)], axis=-1)
    return Image.fromarray(((1 - 0.85 * heat) * grey + 0.85 * heat * color).round().astype(np.uint8))


def draw_box_assignments(
    image: Image.Image,
    outputs: ModelOutput,
    detections: dict[str, torch.Tensor],
    queries: torch.Tensor,
    index: int = 0,
    id2label: dict[int, str] | None = None,
    layer: int = -1,
    side: int = 256,
    columns: int = 4,
) -> Image.Image:
    """
    A panel of the picture with all boxes, and then each box over the map that it was read from ([`box_assignment`]).

    Args:
        image, detections, id2label: See [`draw_boxes`].
        outputs, index, layer: See [`box_assignment`].
        queries (`torch.Tensor` of shape `(n,)`): The detections' centres, see [`detection_queries`].
        side (`int`): Longer side of each tile in pixels.
        columns (`int`): Most tiles side by side.

    Returns:
        `PIL.Image.Image` in RGB.

    Raises:
        `ValueError`: if there are more or fewer `queries` than detections, or `outputs` holds no assignments.
    """
    if len(queries) != len(detections["scores"]):
        raise ValueError(f"There are {len(detections['scores'])} detections, but `queries` has {len(queries)}.")
    scale = side / max(image.size)
    tile = image.convert("RGB").resize(_scaled_size(image, scale))
    detections = {**detections, "boxes": detections["boxes"] * scale}
    tiles = [draw_boxes(tile, detections, id2label)]
    for i, query in enumerate(queries.tolist()):
        heated = draw_heat(tile, box_assignment(outputs, index, query, layer))
        tiles.append(draw_boxes(heated, {name: values[i : i + 1] for name, values in detections.items()}, id2label))

    gap, columns = 8, min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    panel = Image.new("RGB", [n * (length + gap) + gap for n, length in zip((columns, rows), tile.size)], "white")
    for i, picture in enumerate(tiles):
        row, column = divmod(i, columns)
        panel.paste(picture, (gap + column * (tile.width + gap), gap + row * (tile.height + gap)))
    return panel
