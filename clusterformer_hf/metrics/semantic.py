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
"""Mean IoU and accuracies of label maps, from one confusion matrix for each picture."""

import numpy as np
import torch
from transformers import BaseImageProcessor, EvalPrediction
from transformers.utils import ModelOutput

from ..data.label_maps import IGNORE_INDEX, SemanticData
from .detection import check_image_ids
from .segmentation import PostProcessor, check_is_list


# In maps of panoptic segments, of which 255 may be a class.
VOID = -1


class SemanticPostProcessor(PostProcessor):
    """
    The confusion matrix of each picture, see [`PostProcessor`], for models with `logits` (batch, num_labels, height,
    width). Label maps are compared at the picture's own size.

    Args:
        image_processor: Whose `post_process_semantic_segmentation` makes the label maps, as `pipeline` does.
    """

    num_outputs = 1

    def __init__(self, image_processor: BaseImageProcessor):
        self.image_processor = image_processor

    def read(self, logits: torch.Tensor, target: dict) -> dict[str, torch.Tensor]:
        """Returns `confusion` (num_labels, num_labels) int64, see [`confusion_matrix`]."""
        found = self.label_map(ModelOutput(logits=logits[None]), target)
        return {"confusion": confusion_matrix(target["label_map"], found, len(logits))}

    def label_map(self, outputs: ModelOutput, target: dict) -> torch.Tensor:
        sizes = [tuple(target["orig_size"].tolist())]
        return self.image_processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0]


class UniversalSemanticPostProcessor(SemanticPostProcessor):
    """The same for models of masks and classes, compared with label maps or with panoptic segments."""

    num_outputs = 2

    def read(self, classes: torch.Tensor, masks: torch.Tensor, target: dict) -> dict[str, torch.Tensor]:
        outputs = ModelOutput(class_queries_logits=classes[None], masks_queries_logits=masks[None])
        found, num_labels = self.label_map(outputs, target), classes.shape[-1] - 1
        if "label_map" in target:
            return {"confusion": confusion_matrix(target["label_map"], found, num_labels)}
        return {"confusion": confusion_matrix(label_map_of_segments(target), found, num_labels, VOID)}


def label_map_of_segments(target: dict[str, torch.Tensor]) -> torch.Tensor:
    """The class of each pixel, int64, from `segments` and their `class_labels`; -1 for void."""
    classes = target["class_labels"]
    return torch.cat([classes.new_tensor([VOID]), classes])[target["segments"].long()]


def confusion_matrix(
    truth: torch.Tensor, found: torch.Tensor, num_labels: int, ignore_index: int = IGNORE_INDEX
) -> torch.Tensor:
    """
    Counts of pixels (num_labels, num_labels), int64: their true class in rows, the one found in columns.

    Args:
        truth, found: Class ids, integers of one shape.
        ignore_index: The true id of pixels that are not counted.

    Raises:
        `ValueError`: if there is another id outside [0, num_labels).
    """
    truth, found = truth.flatten().long(), found.flatten().long()
    counted = truth != ignore_index
    truth, found = truth[counted], found[counted]
    for ids in (truth, found):
        if len(ids) > 0 and not 0 <= ids.min() <= ids.max() < num_labels:
            raise ValueError(f"Class ids must be in [0, {num_labels}), got {ids.min().item()} to {ids.max().item()}.")
    return torch.bincount(truth * num_labels + found, minlength=num_labels**2).reshape(num_labels, num_labels)


class SemanticMetric:
    """
    Mean IoU for Trainer's `compute_metrics`, with `batch_eval_metrics=True`.

    Called once a batch with what the post-processors return. When `compute_result` is true, returns what
    [`semantic_scores`] does and starts anew; else an empty dict. A picture that comes twice, as where processes share
    the last batch, counts once.

    Args:
        data: The pictures that are evaluated, all of them and no others: use `data.select` for a part.
        id2label: The names of the model's classes.
    """

    def __init__(self, data: SemanticData, id2label: dict[int, str]):
        self.data, self.names = data, [id2label[label] for label in range(len(id2label))]
        self.reset()

    def reset(self):
        self.confusion, self.image_ids = np.zeros((len(self.names),) * 2, np.int64), set()

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        check_is_list(prediction)
        for picture in prediction.predictions:
            if picture["image_id"] not in self.image_ids:
                self.image_ids.add(picture["image_id"])
                self.confusion += picture["confusion"]
        if not compute_result:
            return {}
        check_image_ids(self.image_ids, self.data)
        scores = semantic_scores(self.confusion, self.names)
        self.reset()
        return scores


def semantic_scores(confusion: np.ndarray, names: list[str]) -> dict[str, float]:
    """
    Scores of a confusion matrix, in [0, 1], or NaN where no pixel has a class.

    Returns:
        `mIoU`: mean over the classes that are in the truth or were found anywhere, of the pixels that are right divided
        by those that are of the class or were found to be; `mean_accuracy`: mean over the classes in the truth, of the
        share of their pixels that is right; `pixel_accuracy`: the share of all pixels; `IoU_<class>`.
    """
    right, truth, found = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    union = truth + found - right
    present = np.flatnonzero(union)
    ious = right[present] / union[present]
    accuracies = right[truth > 0] / truth[truth > 0]
    return {
        "mIoU": float(ious.mean()) if len(ious) else float("nan"),
        "mean_accuracy": float(accuracies.mean()) if len(accuracies) else float("nan"),
        "pixel_accuracy": float(right.sum() / truth.sum()) if truth.sum() else float("nan"),
        **{f"IoU_{names[label]}": float(iou) for label, iou in zip(present, ious)},
    }
