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
Panoptic quality as https://arxiv.org/abs/1801.00868 and COCO's own tool define it, from counts for each picture.

A segment is found where a predicted segment of its class overlaps it with an IoU above 0.5; void pixels are left out of
the union. Predicted segments that lie by more than half in void, or in a crowd of their class, are not counted. COCO's
tool knows one crowd of a class in a picture, the last one; so does this.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, EvalPrediction
from transformers.utils import ModelOutput

from ..data.coco_panoptic import PanopticData, segment_colours
from .detection import check_image_ids
from .segmentation import PostProcessor, check_is_list


class PanopticPostProcessor(PostProcessor):
    """
    Counts of found and missed segments of each picture, see [`PostProcessor`], for models with `class_queries_logits`
    (batch, K, num_labels + 1) and `masks_queries_logits` (batch, K, height, width).

    Args:
        image_processor: Whose `post_process_panoptic_segmentation` makes the segments, as `pipeline` does.
        data, class_ids: The pictures that are evaluated, and the model's id of each class. Segments of classes that the
            data does not have become void, as COCO's files cannot name them.
        png_folder: Where the segments are written as PNGs, for [`write_panoptic_json`]; nowhere if unset.
        options: `threshold` (0.5), `mask_threshold` (0.5) and `overlap_mask_area_threshold` (0.8), see the image
            processor.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        data: PanopticData,
        class_ids: list[int],
        png_folder: str | Path | None = None,
        **options: float,
    ):
        self.image_processor, self.options = image_processor, options
        self.class_of = {label: row for row, label in enumerate(class_ids)}
        self.is_thing = data.is_thing
        self.png_folder = None if png_folder is None else Path(png_folder)
        if self.png_folder is not None:
            self.png_folder.mkdir(parents=True, exist_ok=True)

    def read(self, classes: torch.Tensor, masks: torch.Tensor, target: dict) -> dict:
        """Returns `counts` (N, 4) float64, see [`panoptic_counts`], and `found`, the classes (n,) int64 of segments."""
        (found,) = self.image_processor.post_process_panoptic_segmentation(
            ModelOutput(class_queries_logits=classes[None], masks_queries_logits=masks[None]),
            label_ids_to_fuse=set(),  # where it fuses, transformers gives other segments the same id
            target_sizes=[tuple(target["orig_size"].tolist())],
            **self.options,
        )
        segments, labels = number_segments(found["segmentation"], found["segments_info"], self.class_of, self.is_thing)
        if self.png_folder is not None:
            path = self.png_folder / png_name(int(target["image_id"]))
            Image.fromarray(segment_colours(segments)).save(path)
        true_classes = [self.class_of[label] for label in target["class_labels"].tolist()]
        counts = panoptic_counts(
            target["segments"].cpu().numpy(),
            np.array(true_classes, np.int64),
            target["crowds"].cpu().numpy(),
            segments,
            labels,
            len(self.class_of),
        )
        return {"counts": counts, "found": labels}


def png_name(image_id: int) -> str:
    return f"{image_id:012d}.png"


def number_segments(
    segmentation: torch.Tensor, segments_info: list[dict], class_of: dict[int, int], is_thing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Numbers what an image processor or `pipeline` found, and joins the segments of each class that is stuff.

    Args:
        segmentation: Segment ids (height, width); others than those of `segments_info` are void.
        segments_info: `id` and `label_id`, the model's class, of each segment.
        class_of: The class of each of the model's. Segments of others are void, as are those without a pixel.
        is_thing (N,): Whether a class has instances.

    Returns:
        A map (height, width) int64, 0 for void and i + 1 for segment i, and the segments' classes (n,) int64.
    """
    segmentation = torch.as_tensor(segmentation).long().cpu().numpy()
    segments, classes = np.zeros_like(segmentation), []
    for info in segments_info:
        pixels, label = segmentation == info["id"], class_of.get(info["label_id"])
        if label is None or not pixels.any():
            continue
        if is_thing[label] or label not in classes:
            classes.append(label)
            segments[pixels] = len(classes)
        else:
            segments[pixels] = classes.index(label) + 1
    return segments, np.array(classes, np.int64)


def panoptic_counts(
    truth: np.ndarray,
    true_classes: np.ndarray,
    crowds: np.ndarray,
    found: np.ndarray,
    found_classes: np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """
    What panoptic quality needs to know of one picture.

    Args:
        truth, found: Maps (height, width) of segments, integers: 0 for void and i + 1 for segment i.
        true_classes, crowds, found_classes: Of their segments, (n,) and (m,).

    Returns:
        For each class (num_classes, 4), float64: segments found, found segments that are wrong, segments missed, and
        the sum of the IoUs of those found.
    """
    num_true, num_found = len(true_classes) + 1, len(found_classes) + 1
    pairs = truth.astype(np.int64) * num_found + found
    shared = np.bincount(pairs.ravel(), minlength=num_true * num_found).reshape(num_true, num_found)
    union = shared.sum(axis=1)[1:, None] + shared.sum(axis=0)[1:] - shared[1:, 1:] - shared[0, 1:]
    same = (true_classes[:, None] == found_classes) & ~crowds[:, None]
    # An IoU above 0.5 leaves no room for a second segment.
    iou = np.where(same, shared[1:, 1:] / np.maximum(union, 1), 0)
    matched = iou > 0.5

    uncounted = shared[0, 1:].astype(np.float64)
    last_crowd = {true_classes[row]: row for row in np.flatnonzero(crowds)}
    for column, label in enumerate(found_classes):
        if label in last_crowd:
            uncounted[column] += shared[1 + last_crowd[label], 1 + column]
    wrong = ~matched.any(axis=0) & (uncounted <= 0.5 * shared.sum(axis=0)[1:])
    missed = ~matched.any(axis=1) & ~crowds

    counts = np.zeros((num_classes, 4))
    rows, columns = np.nonzero(matched)
    np.add.at(counts[:, 0], true_classes[rows], 1)
    np.add.at(counts[:, 1], found_classes[wrong], 1)
    np.add.at(counts[:, 2], true_classes[missed], 1)
    np.add.at(counts[:, 3], true_classes[rows], iou[rows, columns])
    return counts


def panoptic_quality(counts: np.ndarray, is_thing: np.ndarray, names: list[str]) -> dict[str, float]:
    """
    Panoptic, segmentation and recognition quality from the sum of all pictures' [`panoptic_counts`].

    Returns:
        `PQ`, `SQ` and `RQ`, means over the classes that were to be found or were found anywhere; the same of things and
        of stuff, `PQ_things` and so on; in [0, 1], or -1 where there is no such class. And `PQ_<class>`, `SQ_<class>`
        and `RQ_<class>` of each.
    """
    right, wrong, missed, ious = counts.T
    present = right + wrong + missed > 0
    total = np.maximum(right + 0.5 * wrong + 0.5 * missed, 0.5)
    qualities = {"PQ": ious / total, "SQ": ious / np.maximum(right, 1), "RQ": right / total}
    scores = {}
    for suffix, group in (("", present), ("_things", present & is_thing), ("_stuff", present & ~is_thing)):
        scores |= {
            f"{name}{suffix}": float(value[group].mean()) if group.any() else -1.0 for name, value in qualities.items()
        }
    for label in np.flatnonzero(present):
        scores |= {f"{name}_{names[label]}": float(value[label]) for name, value in qualities.items()}
    return scores


class PanopticMetric:
    """
    Panoptic quality for Trainer's `compute_metrics`, with `batch_eval_metrics=True`.

    Called once a batch with what [`PanopticPostProcessor`] returns. When `compute_result` is true, returns what
    [`panoptic_quality`] does and starts anew; else an empty dict. A picture that comes twice, as where processes share
    the last batch, counts once.

    Args:
        data: The pictures that are evaluated, all of them and no others: use `data.select` for a part.

    Attributes:
        found: The classes of the last evaluation's segments by image id, for [`write_panoptic_json`].
    """

    def __init__(self, data: PanopticData):
        self.data = data
        self.counts, self.found, self._finished = 0, {}, False

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        check_is_list(prediction)
        if self._finished:
            self.counts, self.found, self._finished = 0, {}, False
        for picture in prediction.predictions:
            if picture["image_id"] not in self.found:
                self.found[picture["image_id"]] = picture["found"]
                self.counts = self.counts + picture["counts"]
        if not compute_result:
            return {}
        self._finished = True
        check_image_ids(self.found, self.data)
        return panoptic_quality(self.counts, self.data.is_thing, self.data.class_names)


def segments_info(classes: Iterable[int], category_ids: list[int]) -> list[dict]:
    """COCO's entries for the segments of a map from [`number_segments`]."""
    return [{"id": number, "category_id": category_ids[label]} for number, label in enumerate(classes, start=1)]


def write_panoptic_json(path: str | Path, found: dict[int, np.ndarray], data: PanopticData):
    """
    Writes the JSON file beside the PNGs of [`PanopticPostProcessor`], for COCO's and hotcoco's tools.

    Args:
        path: They look for the PNGs in a folder of this name without `.json`, if not told otherwise.
        found: [`PanopticMetric`]'s.
    """
    annotations = [
        {
            "image_id": image_id,
            "file_name": png_name(image_id),
            "segments_info": segments_info(classes.tolist(), data.category_ids),
        }
        for image_id, classes in found.items()
    ]
    Path(path).write_text(json.dumps({"annotations": annotations}) + "\n", encoding="utf-8")
