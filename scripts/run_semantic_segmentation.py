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
Fine-tunes or trains ClusterFormer, or another model of transformers, for semantic segmentation: a class for each pixel.

    python scripts/run_semantic_segmentation.py --dataset_name my_pictures --output_dir outputs/mine --do_train \
        --do_eval [--model_name_or_path CHECKPOINT --ignore_mismatched_sizes] [--reduce_labels]
    python scripts/run_semantic_segmentation.py --model_name_or_path outputs/mine --dataset_name my_pictures --do_eval

`my_pictures` is a folder as ADE20K's: pictures in `images/training`, label maps of the same names in
`annotations/training`, and the same for `validation`; or `train` and `semantic_train`; class names in `id2label.json`.
Or it is a folder that `save_to_disk` wrote, or a name on the Hub, with a column of pictures and one of label maps.
Folders elsewhere: `--train_images DIR --train_labels DIR`, and the same with `--validation_`. A pixel of a label map
is a class id, or 255 where there is no class; with --reduce_labels ids count from 1, and 0 is no class either.

CHECKPOINT is a model for segmentation, or a detector or classifier, which gives the parts that it shares. Mean IoU and
accuracies go to `eval_results.json`.
"""

import inspect
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from transformers import (
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedConfig,
    SegformerImageProcessor,
)

from clusterformer_hf.data.checks import drop_unusable
from clusterformer_hf.data.classification import load_pictures
from clusterformer_hf.data.detection import match_categories
from clusterformer_hf.data.label_maps import (
    CLASS_NAME_FILES,
    SemanticData,
    find_label_map_splits,
    pick_label_maps,
    read_class_names,
    read_label_maps,
    warn_of_unused_ids,
)
from clusterformer_hf.data.segmentation import SegmentationCollator, SemanticDataset
from clusterformer_hf.data.segmentation_augmentation import (
    SegmentationAugmentationArguments,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
)
from clusterformer_hf.data.smoke import smoke_label_maps
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
from clusterformer_hf.metrics.segmentation import SegmentationTrainer
from clusterformer_hf.metrics.semantic import SemanticMetric, SemanticPostProcessor
from clusterformer_hf.model_card import list_classes
from clusterformer_hf.recipes import parse_arguments
from clusterformer_hf.training import (
    ClusterFormerTrainingArguments,
    run_script,
    start_run,
    train_and_evaluate,
    write_card,
)


ADE20K_LAYOUT = "images/training with annotations/training, the same for validation, and id2label.json"


@dataclass
class DataArguments(SplitArguments):
    """Which pictures it is trained and evaluated on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A folder as ADE20K's, a folder of `save_to_disk`, or a name on the Hub."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    image_column_name: str = field(
        default="image", metadata={"help": "Column of the pictures, in the datasets library."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the label maps, where it has no usual name such as `annotation`."}
    )
    train_images: str | None = field(default=None, metadata={"help": "Folder of the training pictures."})
    train_labels: str | None = field(default=None, metadata={"help": "Folder of their label maps."})
    validation_images: str | None = field(default=None, metadata={"help": "Folder of the validation pictures."})
    validation_labels: str | None = field(default=None, metadata={"help": "Folder of their label maps."})
    class_names: str | None = field(
        default=None,
        metadata={"help": 'JSON such as {"0": "wall", "1": "sky"}; if unset, the data\'s id2label.json or the model.'},
    )
    reduce_labels: bool = field(
        default=False,
        metadata={"help": "Ids in label maps count from 1, 0 is for pixels of no class."},
    )

    def __post_init__(self):
        files = [
            (split, getattr(self, f"{split}_images"), getattr(self, f"{split}_labels"))
            for split in ("train", "validation")
        ]
        for split, images, labels in files:
            if (images is None) != (labels is None):
                raise ValueError(f"--{split}_images and --{split}_labels go together: {images} and {labels}.")
        self.folders = {split: (images, labels) for split, images, labels in files if images is not None}
        if (self.dataset_name is None) != bool(self.folders):
            raise ValueError(
                "Pass either --dataset_name, or --train_images and --train_labels or the same for validation."
            )


def main(args: list[str] | None = None):
    model_args, data_args, augmentation_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, SegmentationAugmentationArguments, ClusterFormerTrainingArguments),
        args,
        smoke_label_maps,
    )
    checkpoint = start_run(training_args)
    if training_args.label_smoothing_factor:
        raise ValueError("--label_smoothing_factor is for classification; the losses of masks have no use for it.")
    set_up_evaluation(training_args)

    config = load_config(model_args)
    names = find_class_names(data_args, None if training_args.do_train else config)
    with training_args.main_process_first(desc="reading the pictures"):
        splits, skipped = load_splits(find_splits(data_args, names), data_args, training_args, drop_unusable)
    if training_args.should_log:
        warn_of_unused_ids(splits)
    if training_args.do_train:
        name_classes(config, splits["train"])
    model = load_model(AutoModelForSemanticSegmentation, model_args, config, training_args.do_train)
    name_auto_classes(model, AutoModelForSemanticSegmentation, AutoModelForImageSegmentation)
    image_processor = load_fitting_image_processor(model_args, config, is_semantic, new_image_processor)

    train_dataset = eval_dataset = metric = None
    if "train" in splits:
        data, transform = splits["train"], SegmentationTrainTransform(image_processor, augmentation_args)
        train_dataset = SemanticDataset(data, transform, match_categories(data, config), seed=training_args.seed)
    if "validation" in splits:
        data, transform = splits["validation"], SegmentationEvalTransform(image_processor)
        eval_dataset = SemanticDataset(data, transform, match_categories(data, config))
        metric = SemanticMetric(data, config.id2label)

    trainer = SegmentationTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=SegmentationCollator(
            pad_to_multiple_of=data_args.pad_to_multiple_of,
            pixel_mask="pixel_mask" in inspect.signature(model.forward).parameters,
        ),
        preprocess_logits_for_metrics=SemanticPostProcessor(image_processor),
        compute_metrics=metric,
        processing_class=image_processor,
    )
    # Losses are means over a batch, whatever arguments a model's `forward` takes.
    trainer.model_accepts_loss_kwargs = False
    evaluated = data_args.dataset_name or data_args.validation_images or data_args.train_images
    train_and_evaluate(trainer, checkpoint, len(skipped), evaluated)
    if training_args.do_train:
        source = data_args.dataset_name or data_args.train_images
        paragraphs = card_paragraphs(model_args, model, splits, skipped)
        write_card(trainer, "image-segmentation", source, None, asdict(augmentation_args), **paragraphs)


def find_class_names(data_args: DataArguments, config: PreTrainedConfig | None) -> list[str]:
    """From the file that is named or lies with the data; else the classes of the config, if there is one."""
    if data_args.class_names is not None:
        return read_class_names(data_args.class_names, data_args.reduce_labels)
    folder = Path(data_args.dataset_name or "")
    if data_args.dataset_name is not None and any((folder / name).is_file() for name in CLASS_NAME_FILES):
        return read_class_names(folder, data_args.reduce_labels)
    if config is None:
        raise ValueError("Nothing names the classes: pass --class_names FILE, or put id2label.json into the folder.")
    return [config.id2label[label] for label in range(config.num_labels)]


def find_splits(data_args: DataArguments, names: list[str]) -> dict[str, Reader]:
    """For each split there is a function that reads it."""
    folders, folder = data_args.folders, Path(data_args.dataset_name or "")
    options = {"class_names": names, "reduce_labels": data_args.reduce_labels}
    if data_args.dataset_name is not None:
        if not folder.is_dir() or (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            splits, _ = load_pictures(data_args.dataset_name, data_args.dataset_config_name, layout=ADE20K_LAYOUT)
            columns = {"image_column": data_args.image_column_name, "label_column": data_args.label_column_name}
            read = pick_label_maps(splits, data_args.dataset_name, **columns, **options)
            return {split: lambda data=data: (data, []) for split, data in read.items()}
        folders = find_label_map_splits(folder)
    return {split: partial(read_folders, *paths, **options) for split, paths in folders.items()}


def read_folders(*args, **options) -> tuple[SemanticData, list[str]]:
    return read_label_maps(*args, **options), []


def is_semantic(image_processor: BaseImageProcessor) -> bool:
    """Whether it reads label maps from `logits`; those for masks and classes read them from other outputs."""
    return hasattr(image_processor, "post_process_semantic_segmentation") and not hasattr(
        image_processor, "post_process_panoptic_segmentation"
    )


def new_image_processor(config: PreTrainedConfig) -> BaseImageProcessor:
    """One that keeps the proportions of pictures, as the training does; with two numbers, that height and width."""
    if isinstance(config.image_size, int):
        return SegformerImageProcessor(size=proportional_size(config))
    height, width = config.image_size
    return SegformerImageProcessor(size={"height": height, "width": width})


def card_paragraphs(model_args, model, splits: dict[str, SemanticData], skipped: list[str]) -> dict[str, str]:
    """What the model card says beside the measured numbers."""
    counts = ", ".join(f"{split} {len(data):,} pictures with label maps" for split, data in splits.items())
    left_out = f" {len(skipped)} pictures that could not be used were left out." if skipped else ""
    names = splits["train"].class_names
    return {
        "description": describe(model, model_args),
        "limits": f"It gives each pixel one of {len(names)} classes: {list_classes(names)}. What is of no such class "
        "is taken for one of them. The results hold for pictures like those of the evaluation set.",
        "data": f"Number of pictures: {counts}.{left_out}",
    }


if __name__ == "__main__":
    run_script(main)
