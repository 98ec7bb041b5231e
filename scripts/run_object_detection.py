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
Fine-tunes or trains ClusterFormer, or another object detector of transformers, on pictures with boxes.

    python scripts/run_object_detection.py --dataset_name my_pictures --output_dir outputs/mine --do_train --do_eval \
        [--model_name_or_path CHECKPOINT --ignore_mismatched_sizes]
    python scripts/run_object_detection.py scripts/recipes/object_detection_coco.yaml --learning_rate 1e-4
    python scripts/run_object_detection.py --model_name_or_path outputs/mine --dataset_name my_pictures --do_eval

`my_pictures` is a folder in COCO's format: `annotations/instances_train.json` with the pictures in `train`, and the
same for `val`; or `train/_annotations.coco.json` beside the pictures; or a folder that `save_to_disk` wrote, or a name
on the Hub, with a column `objects`. Files elsewhere: `--train_images DIR --train_annotations FILE`, and the same with
`--validation_`. CHECKPOINT is a detector or a classifier; a classifier gives its backbone.

An evaluation writes COCO's average precision to `eval_results.json` and the boxes that were found, with the original
category ids, to `coco_results.json`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import AutoModelForObjectDetection, BaseImageProcessor, DeformableDetrImageProcessor, PreTrainedConfig

from clusterformer_hf.data.checks import drop_unusable
from clusterformer_hf.data.classification import load_pictures
from clusterformer_hf.data.coco import find_coco_splits, read_coco
from clusterformer_hf.data.detection import (
    DetectionAugmentationArguments,
    DetectionCollator,
    DetectionDataset,
    DetectionEvalTransform,
    DetectionTrainTransform,
    match_categories,
)
from clusterformer_hf.data.detection_data import DetectionData
from clusterformer_hf.data.object_columns import read_objects
from clusterformer_hf.data.smoke import smoke_scenes
from clusterformer_hf.data.splits import Reader, SplitArguments, load_splits, name_classes
from clusterformer_hf.loading import (
    ModelArguments,
    describe,
    load_config,
    load_fitting_image_processor,
    load_model,
    name_auto_classes,
    proportional_size,
)
from clusterformer_hf.metrics.detection import (
    DetectionMetric,
    DetectionPostProcessor,
    set_up_evaluation,
    write_coco_results,
)
from clusterformer_hf.model_card import list_classes
from clusterformer_hf.recipes import parse_arguments
from clusterformer_hf.training import (
    ClusterFormerTrainer,
    ClusterFormerTrainingArguments,
    run_script,
    start_run,
    train_and_evaluate,
    write_card,
)


COCO_LAYOUT = "annotations/instances_train.json with the pictures in train, and the same for val"


@dataclass
class DataArguments(SplitArguments):
    """Which pictures it is trained and evaluated on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A folder in COCO's format, a folder of `save_to_disk`, or a name on the Hub."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_images: str | None = field(default=None, metadata={"help": "Folder of the training pictures."})
    train_annotations: str | None = field(default=None, metadata={"help": "Their boxes: JSON in COCO's format."})
    validation_images: str | None = field(default=None, metadata={"help": "Folder of the validation pictures."})
    validation_annotations: str | None = field(default=None, metadata={"help": "Their boxes."})
    fast_metric: bool = field(
        default=False, metadata={"help": "Average precision by faster-coco-eval: the same numbers but for rounding."}
    )

    def __post_init__(self):
        files = [
            (split, getattr(self, f"{split}_images"), getattr(self, f"{split}_annotations"))
            for split in ("train", "validation")
        ]
        for split, images, annotations in files:
            if (images is None) != (annotations is None):
                raise ValueError(f"--{split}_images and --{split}_annotations go together: {images} and {annotations}.")
        self.files = {split: (images, annotations) for split, images, annotations in files if images is not None}
        if (self.dataset_name is None) != bool(self.files):
            raise ValueError(
                "Pass either --dataset_name, or --train_images and --train_annotations or the same for validation."
            )


def main(args: list[str] | None = None):
    model_args, data_args, augmentation_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, DetectionAugmentationArguments, ClusterFormerTrainingArguments),
        args,
        smoke_scenes,
    )
    checkpoint = start_run(training_args)
    if training_args.label_smoothing_factor:
        raise ValueError("--label_smoothing_factor is for classification; the losses of detectors have no use for it.")
    set_up_evaluation(training_args)

    with training_args.main_process_first(desc="reading the pictures"):
        splits, skipped = load_splits(find_splits(data_args), data_args, training_args, drop_unusable)
    config = load_config(model_args)
    if training_args.do_train:
        name_classes(config, splits["train"])
    model = load_model(AutoModelForObjectDetection, model_args, config, training_args.do_train)
    name_auto_classes(model, AutoModelForObjectDetection)
    image_processor = load_fitting_image_processor(model_args, config, finds_boxes, new_image_processor)

    train_dataset = eval_dataset = metric = None
    if "train" in splits:
        data, transform = splits["train"], DetectionTrainTransform(image_processor, augmentation_args)
        train_dataset = DetectionDataset(data, transform, match_categories(data, config), seed=training_args.seed)
    if "validation" in splits:
        data, transform = splits["validation"], DetectionEvalTransform(image_processor)
        class_ids = match_categories(data, config)
        eval_dataset = DetectionDataset(data, transform, class_ids)
        metric = DetectionMetric(data, class_ids, data_args.fast_metric)

    trainer = ClusterFormerTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=DetectionCollator(data_args.pad_to_multiple_of),
        preprocess_logits_for_metrics=DetectionPostProcessor(image_processor),
        compute_metrics=metric,
        processing_class=image_processor,
    )
    # Detectors normalise their losses by the boxes of a batch, whatever arguments their `forward` takes.
    trainer.model_accepts_loss_kwargs = False
    evaluated = data_args.dataset_name or data_args.validation_annotations or data_args.train_annotations
    train_and_evaluate(trainer, checkpoint, len(skipped), evaluated)
    if training_args.do_eval and trainer.is_world_process_zero():
        path = Path(training_args.output_dir, "coco_results.json")
        write_coco_results(path, metric.detections.values(), metric.category_of)
    if training_args.do_train:
        source = data_args.dataset_name or data_args.train_annotations
        paragraphs = card_paragraphs(model_args, model, splits, skipped)
        write_card(trainer, "object-detection", source, None, asdict(augmentation_args), **paragraphs)


def find_splits(data_args: DataArguments) -> dict[str, Reader]:
    """For each split that there is a function that reads it."""
    files, folder = data_args.files, Path(data_args.dataset_name or "")
    if data_args.dataset_name is not None:
        if not folder.is_dir() or (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            splits, _ = load_pictures(data_args.dataset_name, data_args.dataset_config_name, layout=COCO_LAYOUT)
            read = read_objects(splits, data_args.dataset_name)
            return {split: lambda data=data: (data, []) for split, data in read.items()}
        files = find_coco_splits(folder)
    return {split: lambda paths=paths: (read_coco(*paths), []) for split, paths in files.items()}


def finds_boxes(image_processor: BaseImageProcessor) -> bool:
    """Whether an image processor is for detection."""
    return hasattr(image_processor, "post_process_object_detection")


def new_image_processor(config: PreTrainedConfig) -> BaseImageProcessor:
    return DeformableDetrImageProcessor(size=proportional_size(config))


def card_paragraphs(model_args, model, splits: dict[str, DetectionData], skipped: list[str]) -> dict[str, str]:
    """What the model card says beside the measured numbers."""
    counts = ", ".join(
        f"{split} {len(data):,} pictures with {len(data.boxes):,} boxes" for split, data in splits.items()
    )
    left_out = f" {len(skipped)} pictures that could not be used were left out." if skipped else ""
    names = splits["train"].class_names
    return {
        "description": describe(model, model_args),
        "limits": f"It finds {len(names)} classes of objects: {list_classes(names)}. Objects of other classes are not "
        "found, or taken for one of them. The results hold for pictures like those of the evaluation set.",
        "data": f"Number of pictures and boxes: {counts}.{left_out}",
    }


if __name__ == "__main__":
    run_script(main)
