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
COCO's average precision, picture by picture: pycocotools matches the objects of one picture, of which only what was
right stays, and adds all of them up at the end. The numbers are those that it gives for all pictures at once; memory is
a few kilobytes for a picture instead of a megabyte, and processes share the work.
"""

import contextlib
import io
from collections.abc import Iterable

import numpy as np

from .detection import STATISTICS


def match_objects(truth: list[dict], found: list[dict], iou_type: str, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """
    Matches the objects of one picture.

    Args:
        truth: Annotations in COCO's format, all of one picture. None may have id 0.
        found: Entries of a COCO results file for it.
        iou_type: `segm` or `bbox`.
        size: The picture's height and width.

    Returns:
        For A ranges of areas and T thresholds: `classes` (n,) int64, category ids, and `scores` (n,) float64 of objects
        found, at most 100 of a class, and whether they are `matched` (A, T, n) and `ignored` (A, T, n), bool;
        `true_classes` (g,) int64 and `true_ignored` (A, g), bool, of those to be found.
    """
    from pycocotools import mask as coco_mask  # of the extra "train"

    found = [result | {"id": number, "iscrowd": 0} for number, result in enumerate(found, start=1)]
    for result in found:
        is_mask = iou_type == "segm"
        result["area"] = float(coco_mask.area(result["segmentation"]) if is_mask else np.prod(result["bbox"][2:]))
    category_ids = sorted({annotation["category_id"] for annotation in [*truth, *found]})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluation(iou_type, _picture(truth, size), _picture(found, size))
        evaluation.params.catIds = category_ids
        evaluation.evaluate()
    num_areas, num_thresholds = len(evaluation.params.areaRng), len(evaluation.params.iouThrs)
    # For each class its areas; they differ in what is ignored, and so in what is matched.
    entries = [
        evaluation.evalImgs[start : start + num_areas] for start in range(0, len(evaluation.evalImgs), num_areas)
    ]

    def joined(field: str, *shape: int, dtype=bool) -> np.ndarray:
        parts = [np.stack([np.asarray(entry[field], dtype) for entry in areas]) for areas in entries]
        return np.concatenate([np.zeros((num_areas, *shape, 0), dtype), *parts], axis=-1)

    lengths = [len(areas[0]["dtScores"]) for areas in entries], [len(areas[0]["gtIgnore"]) for areas in entries]
    classes, true_classes = (np.repeat(np.array(category_ids, np.int64), length) for length in lengths)
    return {
        "classes": classes,
        "scores": joined("dtScores", dtype=np.float64)[0],
        "matched": joined("dtMatches", num_thresholds),
        "ignored": joined("dtIgnore", num_thresholds),
        "true_classes": true_classes,
        "true_ignored": joined("gtIgnore"),
    }


def average_precision(matches: Iterable[dict], categories: dict[int, str]) -> dict[str, float]:
    """
    COCO's statistics of all pictures.

    Args:
        matches: Of [`match_objects`], in the order of the image ids.
        categories: The name of each class by its id.

    Returns:
        `STATISTICS` of `metrics.detection`, in [0, 1], or -1 where there is no object to find, and `AP_<class>` for
        each class that has objects to find.
    """
    matches, category_ids = list(matches), sorted(categories)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluation("segm")
        params = evaluation.params
        shape = [len(params.iouThrs), len(params.recThrs), len(category_ids), len(params.areaRng), len(params.maxDets)]
        # -1 where a class has no objects to find.
        evaluation.eval = {"precision": -np.ones(shape), "recall": -np.ones([shape[0], *shape[2:]])}
        for row, category_id in enumerate(category_ids):
            accumulated = _accumulate([match for match in matches if _has_class(match, category_id)], category_id)
            for name, values in accumulated.items():
                evaluation.eval[name][..., row, :, :] = values
        evaluation.summarize()
    metrics = dict(zip(STATISTICS, map(float, evaluation.stats)))
    # Of all areas and 100 objects.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    for row, category_id in enumerate(category_ids):
        if (precision[:, :, row] > -1).any():
            metrics[f"AP_{categories[category_id]}"] = float(precision[:, :, row].mean())
    return metrics


def _has_class(match: dict, category_id: int) -> bool:
    return category_id in match["classes"] or category_id in match["true_classes"]


def _accumulate(matches: list[dict], category_id: int) -> dict[str, np.ndarray]:
    """Precision and recall of one class by threshold (and recall), area and number of objects."""
    if not matches:
        return {}
    evaluation = _evaluation("segm")
    evaluation.params.imgIds, evaluation.params.catIds = list(range(len(matches))), [category_id]
    evaluation._paramsEval = evaluation.params
    evaluation.evalImgs = []
    for area in range(len(evaluation.params.areaRng)):
        for match in matches:
            mine, true_mine = match["classes"] == category_id, match["true_classes"] == category_id
            evaluation.evalImgs.append(
                {
                    "dtScores": match["scores"][mine],
                    "dtMatches": match["matched"][area][:, mine],
                    "dtIgnore": match["ignored"][area][:, mine],
                    "gtIgnore": match["true_ignored"][area][true_mine],
                }
            )
    evaluation.accumulate()
    return {"precision": evaluation.eval["precision"][:, :, 0], "recall": evaluation.eval["recall"][:, 0]}


def _picture(annotations: list[dict], size: tuple[int, int]):
    """A data set of one picture, as pycocotools wants it."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": 1, "height": size[0], "width": size[1]}],
        "annotations": [annotation | {"image_id": 1} for annotation in annotations],
        "categories": [],
    }
    coco.createIndex()
    return coco


def _evaluation(iou_type: str, *sides):
    from pycocotools.cocoeval import COCOeval

    return COCOeval(*sides, iouType=iou_type)
