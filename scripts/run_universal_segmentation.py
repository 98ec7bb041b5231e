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
Fine-tunes or trains ClusterFormer, or another model of transformers, for instance or panoptic segmentation.

    python scripts/run_universal_segmentation.py --dataset_name my_pictures --output_dir outputs/mine --do_train \
        --do_eval [--model_name_or_path CHECKPOINT --ignore_mismatched_sizes] [--task instance]
    python scripts/run_universal_segmentation.py scripts/recipes/panoptic_segmentation_digit_scenes.yaml
    python scripts/run_universal_segmentation.py --model_name_or_path outputs/mine --dataset_name my_pictures --do_eval

`my_pictures` is a folder in COCO's format: `annotations/panoptic_train.json` with PNGs in `panoptic_train` and pictures
in `train`, or `annotations/instances_train.json` with the pictures; and the same for `val`. Where both kinds of files
are there, --task chooses. Files elsewhere: `--train_images DIR --train_annotations FILE`, for panoptic data also
`--train_segments DIR` with the PNGs, and the same with `--validation_`.

CHECKPOINT is a model for segmentation, or a detector or classifier, which gives the parts that it shares. An evaluation
writes to `eval_results.json`, and what was found to files for COCO's tools, with the original category ids: COCO's
average precision of masks and `coco_results.json`; of panoptic data also panoptic quality, mean IoU of the semantic
reading, `panoptic_results.json` and `panoptic_results/*.png`.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from transformers import (
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForUniversalSegmentation,
    BaseImageProcessor,
    Mask2FormerImageProcessor,
    PreTrainedConfig,
    TrainerCallback,
)

from clusterformer_hf import ClusterFormerConfig
from clusterformer_hf.data.checks import drop_unusable
from clusterformer_hf.data.coco import find_coco_splits
from clusterformer_hf.data.coco_masks import InstanceData, read_coco_masks
from clusterformer_hf.data.coco_panoptic import PanopticData, find_panoptic_splits, read_panoptic
from clusterformer_hf.data.detection import match_categories
from clusterformer_hf.data.segmentation import SegmentationCollator, UniversalDataset
from clusterformer_hf.data.segmentation_augmentation import (
    SegmentationAugmentationArguments,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
)
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
from clusterformer_hf.metrics.detection import set_up_evaluation
from clusterformer_hf.metrics.instance import InstanceMetric, InstancePostProcessor, write_mask_results
from clusterformer_hf.metrics.panoptic import PanopticMetric, PanopticPostProcessor, write_panoptic_json
from clusterformer_hf.metrics.segmentation import JoinedMetric, JoinedPostProcessor, SegmentationTrainer
from clusterformer_hf.metrics.semantic import SemanticMetric, UniversalSemanticPostProcessor
from clusterformer_hf.model_card import list_classes
from clusterformer_hf.recipes import parse_arguments
from clusterformer_hf.training import (
    ClusterFormerTrainingArguments,
    run_script,
    start_run,
    train_and_evaluate,
    write_card,
)


TASKS = ("panoptic", "instance")
AUTO_CLASSES = (AutoModelForUniversalSegmentation, AutoModelForInstanceSegmentation, AutoModelForImageSegmentation)


@dataclass
class DataArguments(SplitArguments):
    """Which pictures it is trained and evaluated on."""

    dataset_name: str | None = field(default=None, metadata={"help": "A folder in COCO's format."})
    task: str | None = field(
        default=None,
        metadata={"help": "panoptic or instance; if unset, panoptic where the data is.", "choices": TASKS},
    )
    train_images: str | None = field(default=None, metadata={"help": "Folder of the training pictures."})
    train_annotations: str | None = field(default=None, metadata={"help": "Their masks: JSON in COCO's format."})
    train_segments: str | None = field(default=None, metadata={"help": "Panoptic data: folder of their PNGs."})
    validation_images: str | None = field(default=None, metadata={"help": "Folder of the validation pictures."})
    validation_annotations: str | None = field(default=None, metadata={"help": "Their masks."})
    validation_segments: str | None = field(default=None, metadata={"help": "Panoptic data: folder of their PNGs."})

    def __post_init__(self):
        if self.task not in (None, *TASKS):
            raise ValueError(f"--task must be {' or '.join(TASKS)}, got {self.task}.")
        self.files = {}
        for split in ("train", "validation"):
            images, segments, annotations = (
                getattr(self, f"{split}_{kind}") for kind in ("images", "segments", "annotations")
            )
            if (images is None) != (annotations is None) or (images is None and segments is not None):
                raise ValueError(
                    f"--{split}_images and --{split}_annotations go together: {images} and {annotations}; "
                    f"--{split}_segments is {segments}."
                )
            if images is not None:
                self.files[split] = (images, annotations) if segments is None else (images, segments, annotations)
        if (self.dataset_name is None) != bool(self.files):
            raise ValueError(
                "Pass either --dataset_name, or --train_images and --train_annotations or the same for validation."
            )
        kinds = {"instance" if len(paths) == 2 else "panoptic" for paths in self.files.values()}
        if len(kinds) > 1 or self.files and self.task not in (None, *kinds):
            raise ValueError(f"--train_segments and --validation_segments are for panoptic data: {self.files}.")


class WriteAtTheEnd(TrainerCallback):
    """Only the evaluation after the training keeps what was found: on large data sets it takes memory and time."""

    def __init__(self, evaluation: "Evaluation"):
        self.evaluation = evaluation

    def on_train_end(self, args, state, control, **kwargs):
        self.evaluation.keep_results()


class Evaluation:
    """
    How a model is evaluated on instances or on panoptic segments.

    Args:
        data: The pictures that are evaluated.
        config, image_processor: The model's.
        output_dir: Where the results files go.
    """

    def __init__(
        self,
        data: InstanceData | PanopticData,
        config: PreTrainedConfig,
        image_processor: BaseImageProcessor,
        output_dir: str,
    ):
        self.data, self.output_dir = data, Path(output_dir)
        self.metrics, self.post_processors = {}, {}
        instances = data
        if isinstance(data, PanopticData):
            instances, class_ids = data.instances(), match_categories(data, config)
            self.metrics["panoptic"] = PanopticMetric(data)
            self.post_processors["panoptic"] = PanopticPostProcessor(image_processor, data, class_ids)
            self.metrics["semantic"] = SemanticMetric(data, config.id2label)
            self.post_processors["semantic"] = UniversalSemanticPostProcessor(image_processor)
        if instances.categories:
            self.metrics["instance"] = InstanceMetric(instances)
            self.post_processors["instance"] = InstancePostProcessor(instances, match_categories(instances, config))
        self.metric, self.post_processor = JoinedMetric(**self.metrics), JoinedPostProcessor(**self.post_processors)

    def keep_results(self):
        """From now on evaluations keep what was found."""
        if "instance" in self.metrics:
            self.post_processors["instance"].keep_results = True
        if "panoptic" in self.metrics:
            self.png_folder.mkdir(parents=True, exist_ok=True)
            self.post_processors["panoptic"].png_folder = self.png_folder

    @property
    def png_folder(self) -> Path:
        return self.output_dir / "panoptic_results"

    def write_results(self):
        if "instance" in self.metrics:
            write_mask_results(self.output_dir / "coco_results.json", self.metrics["instance"].results)
        if "panoptic" in self.metrics:
            found = self.metrics["panoptic"].found
            write_panoptic_json(self.png_folder.with_suffix(".json"), found, self.data)


def main(args: list[str] | None = None):
    model_args, data_args, augmentation_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, SegmentationAugmentationArguments, ClusterFormerTrainingArguments),
        args,
        smoke_scenes,
    )
    checkpoint = start_run(training_args)
    if training_args.label_smoothing_factor:
        raise ValueError("--label_smoothing_factor is for classification; the losses of masks have no use for it.")
    set_up_evaluation(training_args)

    with training_args.main_process_first(desc="reading the pictures"):
        splits, skipped = load_splits(find_splits(data_args), data_args, training_args, drop_unusable)
    config = load_config(model_args)
    if training_args.do_train:
        name_classes(config, splits["train"])
        note_stuff(config, splits["train"])
    model = load_model(AutoModelForUniversalSegmentation, model_args, config, training_args.do_train)
    name_auto_classes(model, *AUTO_CLASSES)
    image_processor = load_fitting_image_processor(model_args, config, is_universal, new_image_processor)

    train_dataset = eval_dataset = evaluation = None
    if "train" in splits:
        data, transform = splits["train"], SegmentationTrainTransform(image_processor, augmentation_args)
        train_dataset = UniversalDataset(data, transform, match_categories(data, config), seed=training_args.seed)
    if "validation" in splits:
        data, transform = splits["validation"], SegmentationEvalTransform(image_processor)
        eval_dataset = UniversalDataset(data, transform, match_categories(data, config))
        evaluation = Evaluation(data, config, image_processor, training_args.output_dir)

    trainer = SegmentationTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=SegmentationCollator(
            pad_to_multiple_of=data_args.pad_to_multiple_of,
            mask2former_labels=config.model_type != ClusterFormerConfig.model_type,
        ),
        preprocess_logits_for_metrics=evaluation and evaluation.post_processor,
        compute_metrics=evaluation and evaluation.metric,
        processing_class=image_processor,
    )
    # Losses are normalised by the masks of a batch, whatever arguments a model's `forward` takes.
    trainer.model_accepts_loss_kwargs = False
    if training_args.do_eval:
        if training_args.do_train:
            trainer.add_callback(WriteAtTheEnd(evaluation))
        else:
            evaluation.keep_results()
    evaluated = data_args.dataset_name or data_args.validation_annotations or data_args.train_annotations
    train_and_evaluate(trainer, checkpoint, len(skipped), evaluated)
    if training_args.do_eval and trainer.is_world_process_zero():
        evaluation.write_results()
    if training_args.do_train:
        source = data_args.dataset_name or data_args.train_annotations
        paragraphs = card_paragraphs(model_args, model, splits, skipped)
        write_card(trainer, "image-segmentation", source, None, asdict(augmentation_args), **paragraphs)


def find_splits(data_args: DataArguments) -> dict[str, Reader]:
    """For each split there is a function that reads it: a large file that is not needed is not read."""
    files = data_args.files
    if data_args.dataset_name is not None:
        folder = Path(data_args.dataset_name)
        if not folder.is_dir():
            raise ValueError(
                f"--dataset_name {folder} is no folder. It would hold annotations/panoptic_train.json with PNGs in "
                "panoptic_train and pictures in train, or annotations/instances_train.json with the pictures; and the "
                "same for val."
            )
        has_panoptic = any(folder.glob("annotations/panoptic_*.json"))
        is_panoptic = data_args.task == "panoptic" or data_args.task is None and has_panoptic
        files = find_panoptic_splits(folder) if is_panoptic else find_coco_splits(folder)
    return {split: partial(read_files, *paths, skip_corrupt=data_args.skip_corrupt) for split, paths in files.items()}


def read_files(*paths: str | Path, skip_corrupt: bool) -> tuple[InstanceData | PanopticData, list[str]]:
    """Pictures and annotations, or pictures, PNGs and annotations; and a line for each annotation left out."""
    return read_coco_masks(*paths, skip_corrupt) if len(paths) == 2 else (read_panoptic(*paths), [])


def note_stuff(config: PreTrainedConfig, data: InstanceData | PanopticData):
    """
    Keeps in the config which classes have no instances, under the name that `post_process_panoptic_segmentation` has
    for them.
    """
    is_thing = getattr(data, "is_thing", [True] * len(data.class_names))
    config.label_ids_to_fuse = [label for label, thing in zip(match_categories(data, config), is_thing) if not thing]


def is_universal(image_processor: BaseImageProcessor) -> bool:
    return hasattr(image_processor, "post_process_panoptic_segmentation")


def new_image_processor(config: PreTrainedConfig) -> BaseImageProcessor:
    """
    One that keeps proportions and pads nothing, so that masks cover pictures exactly: sides are rounded up to whole
    pixels of the masks.
    """
    return Mask2FormerImageProcessor(size=proportional_size(config), size_divisor=config.patch_size)


def card_paragraphs(model_args, model, splits: dict, skipped: list[str]) -> dict[str, str]:
    """What the model card says beside the measured numbers."""
    counts = ", ".join(
        f"{split} {len(data):,} pictures with {len(data.classes):,} masks" for split, data in splits.items()
    )
    left_out = f" {len(skipped)} pictures or annotations that could not be used were left out." if skipped else ""
    names, config = splits["train"].class_names, model.config
    stuff = [config.id2label[label] for label in config.label_ids_to_fuse]
    without_instances = f" Without instances: {list_classes(stuff)}." if stuff else ""
    return {
        "description": describe(model, model_args),
        "limits": f"It finds {len(names)} classes: {list_classes(names)}.{without_instances} "
        "What is of other classes is not found, or taken for one of them. The results hold for pictures like those "
        "of the evaluation set.",
        "data": f"Number of pictures and masks: {counts}.{left_out}",
    }


if __name__ == "__main__":
    run_script(main)
