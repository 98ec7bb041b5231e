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
"""What a pipeline's model clustered in a picture: a page, and a panel, with the objects that it found."""

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, Pipeline
from transformers.utils import ModelOutput

from .cluster_iterations import trace_clusters
from .cluster_page import FoundObject, cluster_page
from .modeling_clusterformer import ClusterFormerForSemanticSegmentation, ClusterFormerForUniversalSegmentation
from .visualization import (
    box_assignment,
    detection_queries,
    draw_box_assignments,
    draw_stages,
    palette,
    segment_queries,
)


def show_classes(
    predictor: Pipeline, picture: Image.Image, predictions: list[dict], title: str, options: dict
) -> tuple[str, Image.Image]:
    """
    Runs the model once more and shows its clusters, for a pipeline of image classification.

    Args:
        predictor (`Pipeline`): With a ClusterFormer.
        picture (`PIL.Image.Image`): RGB.
        predictions (`list[dict]`): The pipeline's of this picture.
        title (`str`): Of the page.
        options (`dict`): What the pipeline was called with: `threshold` of boxes, `subtask` of segments.

    Returns:
        The page, HTML, and a panel that shows the clusters of each stage.
    """
    inputs = _preprocess(predictor, picture)
    outputs, stages = trace_clusters(predictor.model, inputs)
    # The picture as the model saw it, since some processors cut it.
    seen = seen_picture(inputs["pixel_values"][0], predictor.image_processor)
    title = f"{title}: " + ", ".join(f"{row['label']} {row['score']:.3f}" for row in predictions)
    return cluster_page(seen, stages, title=title), draw_stages([seen], outputs)


def show_boxes(
    predictor: Pipeline, picture: Image.Image, predictions: list[dict], title: str, options: dict
) -> tuple[str, Image.Image]:
    """The same for object detection; the panel shows each box on the pixels that it was read from."""
    outputs, stages = trace_clusters(predictor.model, _preprocess(predictor, picture))
    size = [(picture.height, picture.width)]
    (detections,) = predictor.image_processor.post_process_object_detection(outputs, options["threshold"], size)
    (queries,) = detection_queries(outputs, options["threshold"])
    names = predictor.model.config.id2label
    boxes = (detections["boxes"].cpu() / torch.tensor(picture.size * 2)).clamp(0, 1)
    rows = zip(detections["labels"].tolist(), detections["scores"].tolist(), boxes.tolist(), queries.tolist())
    objects = [
        _found(outputs, f"{names[label]} {score:.2f}", label, query, box=box) for label, score, box, query in rows
    ]
    panel = draw_box_assignments(picture, outputs, detections, queries, id2label=names)
    return cluster_page(picture, stages, objects, title), panel


def show_segments(
    predictor: Pipeline, picture: Image.Image, predictions: list[dict], title: str, options: dict
) -> tuple[str, Image.Image]:
    """The same for [`SegmentPipeline`], semantic, instance and panoptic; the panel shows the clusters of each stage."""
    outputs, stages = trace_clusters(_with_queries(predictor.model), _preprocess(predictor, picture))
    masks = np.array([row["mask"] for row in predictions]).reshape(-1, picture.height, picture.width)
    queries = segment_queries(outputs, masks, [row["label_id"] for row in predictions], options["subtask"])
    objects = []
    for row, query in zip(predictions, queries):
        measured = f"{row['mask'].mean():.1%}" if row["score"] is None else f"{row['score']:.2f}"
        objects.append(_found(outputs, f"{row['label']} {measured}", row["label_id"], query, mask=row["mask"]))
    return cluster_page(picture, stages, objects, title), draw_stages([picture], outputs)


def _found(outputs: ModelOutput, text: str, label: int, query: int, **shape) -> FoundObject:
    return FoundObject(text, query, box_assignment(outputs, 0, query), palette(label + 1)[label].round(), **shape)


def _preprocess(predictor: Pipeline, picture: Image.Image) -> dict[str, torch.Tensor]:
    inputs = predictor.preprocess(picture).to(predictor.device)
    return {name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs}


def _with_queries(model) -> ClusterFormerForUniversalSegmentation:
    """The model, or for a semantic one the universal model with its weights, which tells centres apart."""
    if not isinstance(model, ClusterFormerForSemanticSegmentation):
        return model
    with torch.device("meta"):
        universal = ClusterFormerForUniversalSegmentation(model.config)
    universal.load_state_dict(model.state_dict(), assign=True)
    return universal.eval()


def seen_picture(pixel_values: torch.Tensor, image_processor: BaseImageProcessor) -> Image.Image:
    """The picture that an image processor made of one, (3, height, width), without its normalisation."""
    pixels = pixel_values.float().cpu()
    if image_processor.do_normalize:
        mean, std = (torch.tensor(image_processor.to_dict()[name]) for name in ("image_mean", "image_std"))
        pixels = pixels * std[:, None, None] + mean[:, None, None]
    if image_processor.do_rescale:
        pixels = pixels / image_processor.rescale_factor
    return Image.fromarray(pixels.clamp(0, 255).round().byte().permute(1, 2, 0).numpy())
