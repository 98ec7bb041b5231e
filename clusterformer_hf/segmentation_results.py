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
Segments of single pictures: a pipeline that reads them as the evaluation does, and files of them for other tools.

    predictor = pipeline("image-segmentation", model=folder, pipeline_class=SegmentPipeline)
    files = InstanceFiles(output_dir, predictor.model.config)
    segments = predictor(picture, subtask="instance", threshold=0.5)
    entries = files.add(picture_path, name, segments)
    files.close()
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ImageSegmentationPipeline, PreTrainedConfig

from .data.coco_panoptic import segment_colours
from .data.label_maps import IGNORE_INDEX
from .data.rle import decode_masks, encode_masks, mask_boxes
from .metrics.instance import read_instances
from .metrics.panoptic import number_segments


class SegmentPipeline(ImageSegmentationPipeline):
    """
    [`ImageSegmentationPipeline`] whose masks are those that the evaluation of the training scripts compares: instances
    may overlap and are cut out at the picture's own size, and panoptic segments of a class without instances are one.

    Returns for each picture a list of segments, the best first, each a dict of `label`, its name, `label_id`, `score`
    (None for semantic segmentation) and `mask` (height, width), bool.

    Takes `subtask`, `panoptic`, `instance` or `semantic`, `threshold`, the least score of a segment, and for panoptic
    segmentation `overlap_mask_area_threshold`.
    """

    def postprocess(self, model_outputs, subtask="panoptic", threshold=0.5, overlap_mask_area_threshold=0.8):
        target_sizes = [tuple(size) for size in model_outputs["target_size"]]
        if subtask == "instance":
            segments = self._instances(model_outputs, target_sizes[0], threshold)
        elif subtask == "semantic":
            (found,) = self.image_processor.post_process_semantic_segmentation(model_outputs, target_sizes)
            segments = [(label, None, (found == label).numpy()) for label in found.unique().tolist()]
        else:
            (found,) = self.image_processor.post_process_panoptic_segmentation(
                model_outputs,
                threshold=threshold,
                overlap_mask_area_threshold=overlap_mask_area_threshold,
                label_ids_to_fuse=set(),  # where it fuses, transformers gives other segments the same id
                target_sizes=target_sizes,
            )
            segments = self._panoptic(found["segmentation"], found["segments_info"])
        names = self.model.config.id2label
        return [
            {"label": names[label], "label_id": label, "score": score, "mask": mask} for label, score, mask in segments
        ]

    def _instances(self, outputs, size: tuple[int, int], threshold: float) -> list[tuple]:
        scores, labels, counts = read_instances(
            outputs["class_queries_logits"][0].float(), outputs["masks_queries_logits"][0].float(), size
        )
        kept = (scores >= threshold) & self._is_thing()[labels]
        masks = decode_masks([value for value, keep in zip(counts, kept) if keep], *size)
        return list(zip(labels[kept].tolist(), map(float, scores[kept]), masks))

    def _panoptic(self, segmentation: torch.Tensor, segments_info: list[dict]) -> list[tuple]:
        class_of = {label: label for label in range(self.model.config.num_labels)}
        segments, labels = number_segments(segmentation, segments_info, class_of, self._is_thing())
        scores = np.zeros(len(labels) + 1)
        for info in segments_info:
            # Segments that are joined have the best one's score.
            numbers = segments[(segmentation == info["id"]).numpy()]
            np.maximum.at(scores, numbers, info["score"])
        found = [(label, float(scores[i]), segments == i) for i, label in enumerate(labels.tolist(), start=1)]
        return sorted(found, key=lambda segment: -segment[1])

    def _is_thing(self) -> np.ndarray:
        """Whether a class has instances (num_labels,): all have, where the config says nothing."""
        is_thing = np.ones(self.model.config.num_labels, bool)
        is_thing[stuff_ids(self.model.config)] = False
        return is_thing


def stuff_ids(config: PreTrainedConfig) -> list[int]:
    """The classes without instances, as `scripts/run_universal_segmentation.py` keeps them in the config."""
    return list(getattr(config, "label_ids_to_fuse", None) or [])


class SegmentFiles:
    """
    What is written of one picture after another.

    Args:
        output_dir: Where the files go.
        config: The model's.
    """

    folder: str | None = None
    name: str

    def __init__(self, output_dir: str | Path, config: PreTrainedConfig):
        self.output_dir, self.config = Path(output_dir), config
        self.category_ids = getattr(config, "original_category_ids", None) or range(config.num_labels)
        self.images, self.annotations = [], []
        if self.folder is not None:
            (self.output_dir / self.folder).mkdir(parents=True, exist_ok=True)

    def add(self, path: Path, name: str, size: tuple[int, int], segments: list[dict]) -> list[dict]:
        """
        Takes the segments of a picture.

        Args:
            path: The picture.
            name: A name that no other picture has.
            size: Its height and width.
            segments: As [`SegmentPipeline`] returns them.

        Returns:
            An entry for each segment, without its mask.
        """
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": str(path), "height": size[0], "width": size[1]})
        entries = [
            {"label": segment["label"], "score": segment["score"], "area": int(segment["mask"].sum())}
            for segment in segments
        ]
        return self.write(image_id, name, size, segments, entries)

    def write(self, image_id: int, name: str, size: tuple[int, int], segments: list[dict], entries: list[dict]):
        raise NotImplementedError

    def png(self, name: str) -> Path:
        return self.output_dir / self.folder / f"{name}.png"

    def content(self) -> dict:
        """Of the JSON file."""
        stuff = stuff_ids(self.config)
        categories = [
            {"id": self.category_ids[label], "name": self.config.id2label[label], "isthing": int(label not in stuff)}
            for label in range(self.config.num_labels)
        ]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}

    def close(self):
        """Writes the JSON file."""
        (self.output_dir / self.name).write_text(json.dumps(self.content()) + "\n", "utf-8")


class InstanceFiles(SegmentFiles):
    """`instances.json` in COCO's format, masks as compressed run lengths, each with its score."""

    name = "instances.json"

    def write(self, image_id, name, size, segments, entries):
        counts = encode_masks(np.array([segment["mask"] for segment in segments]).reshape(-1, *size))
        boxes = mask_boxes(counts, *size).tolist()
        for segment, entry, count, box in zip(segments, entries, counts, boxes):
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": self.category_ids[segment["label_id"]],
                    "segmentation": {"size": list(size), "counts": count.decode()},
                    "bbox": box,
                    "area": entry["area"],
                    "iscrowd": 0,
                    "score": segment["score"],
                }
            )
            entry |= {"id": len(self.annotations), "bbox": box}
        return entries

    def content(self):
        content = super().content()
        return content | {"categories": [category for category in content["categories"] if category["isthing"]]}


class PanopticFiles(SegmentFiles):
    """`panoptic.json` and `panoptic/NAME.png` in COCO's format."""

    folder, name = "panoptic", "panoptic.json"

    def write(self, image_id, name, size, segments, entries):
        numbers = np.zeros(size, np.int64)
        for number, (segment, entry) in enumerate(zip(segments, entries), start=1):
            numbers[segment["mask"]] = number
            entry["id"] = number
        Image.fromarray(segment_colours(numbers)).save(self.png(name))
        infos = [
            {
                "id": entry["id"],
                "category_id": self.category_ids[segment["label_id"]],
                "area": entry["area"],
                "iscrowd": 0,
                "score": entry["score"],
            }
            for segment, entry in zip(segments, entries)
        ]
        self.annotations.append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": infos})
        return entries


class SemanticFiles(SegmentFiles):
    """Label maps `semantic/NAME.png`, grey, whose values are the model's class ids, and `semantic_labels.json`."""

    folder, name = "semantic", "semantic_labels.json"

    def write(self, image_id, name, size, segments, entries):
        label_map = np.full(size, IGNORE_INDEX, np.uint8 if self.config.num_labels <= IGNORE_INDEX else np.uint16)
        for segment in segments:
            label_map[segment["mask"]] = segment["label_id"]
        Image.fromarray(label_map).save(self.png(name))
        return entries

    def content(self) -> dict:
        return {str(label): self.config.id2label[label] for label in range(self.config.num_labels)}
