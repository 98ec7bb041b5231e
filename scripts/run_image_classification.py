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
Fine-tunes or trains ClusterFormer, or another image classifier of transformers, on labelled pictures.

    python scripts/run_image_classification.py --dataset_name my_pictures --output_dir outputs/mine \
        --do_train --do_eval [--model_name_or_path CHECKPOINT --ignore_mismatched_sizes]
    python scripts/run_image_classification.py scripts/recipes/image_classification_folder.yaml --learning_rate 1e-4
    python scripts/run_image_classification.py --model_name_or_path outputs/mine --dataset_name my_pictures --do_eval

`my_pictures` is a folder with `train` and `val` in it, each with one folder of pictures for each class; or the class
folders alone, of which a share is kept for validation; or a folder that `save_to_disk` wrote; or a name on the Hub.
"""

from dataclasses import asdict, dataclass, field
from functools import partial

from transformers import AutoModelForImageClassification, ConvNextImageProcessor, PreTrainedConfig, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from clusterformer_hf import loading
from clusterformer_hf.data import classification as data
from clusterformer_hf.data.augmentation import (
    AugmentationArguments,
    ClassificationCollator,
    EvalTransform,
    TrainTransform,
)
from clusterformer_hf.data.shards import find_shards, load_whole
from clusterformer_hf.data.smoke import smoke_digits
from clusterformer_hf.data.streaming import StreamingDataset
from clusterformer_hf.metrics.accuracy import ClassificationAccuracy
from clusterformer_hf.model_card import list_classes
from clusterformer_hf.recipes import parse_arguments
from clusterformer_hf.training import (
    ClusterFormerTrainer,
    ClusterFormerTrainingArguments,
    classification_loss,
    run_script,
    start_run,
    train_and_evaluate,
    write_card,
)


@dataclass
class ModelArguments(loading.ModelArguments):
    """Which model is trained or evaluated."""

    crop_pct: float | None = field(
        default=None,
        metadata={
            "help": "A new image processor resizes the whole picture to a square; with this share it keeps the centre "
            "of the picture, in its proportions, as is usual for ImageNet (0.875). For an image_size below 384; of a "
            "checkpoint's image processor it keeps only the mean and standard deviation."
        },
    )

    @property
    def resizes(self) -> bool:
        return super().resizes or self.crop_pct is not None


@dataclass
class DataArguments:
    """Which pictures it is trained and evaluated on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A folder of pictures, a folder of `save_to_disk`, or a name on the Hub."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder of the classes' training pictures."})
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of the classes' validation pictures."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share for validation where there is no validation split; chosen by --seed."}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Column of the pictures; found if unset."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the labels; found if unset."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many pictures only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many pictures only."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training pictures while training: --dataset_name is a folder of shards (TAR, as "
            "WebDataset has them, or Parquet) or a data set of them on the Hub."
        },
    )
    skip_corrupt: bool = field(
        default=False, metadata={"help": "Leave out files that cannot be read as pictures instead of ending the run."}
    )


def main(args: list[str] | None = None):
    model_args, data_args, augmentation_args, training_args = parse_arguments(
        (ModelArguments, DataArguments, AugmentationArguments, ClusterFormerTrainingArguments), args, smoke_digits
    )
    checkpoint = start_run(training_args)
    with training_args.main_process_first(desc="reading the pictures"):
        load = load_shards if data_args.streaming else load_splits
        splits, skipped, class_names = load(data_args, training_args)
    model, class_ids = load_model(model_args, class_names, training_args.do_train)
    image_processor = load_image_processor(model_args, model.config)

    train_dataset = eval_dataset = None
    if "train" in splits:
        parts = (splits["train"], TrainTransform(image_processor, augmentation_args), class_ids, training_args.seed)
        if data_args.streaming:
            place = (training_args.train_batch_size, training_args.process_index, training_args.world_size)
            train_dataset = StreamingDataset(*parts, *place)
        else:
            train_dataset = data.ImageClassificationDataset(*parts)
    if "validation" in splits:
        eval_dataset = data.ImageClassificationDataset(splits["validation"], EvalTransform(image_processor), class_ids)

    trainer = ClusterFormerTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=ClassificationCollator(model.config.num_labels, augmentation_args),
        compute_loss_func=classification_loss(training_args.label_smoothing_factor),
        compute_metrics=ClassificationAccuracy(),
        processing_class=image_processor,
    )

    evaluated = data_args.dataset_name or data_args.validation_dir or data_args.train_dir
    train_and_evaluate(trainer, checkpoint, len(skipped), evaluated)
    if training_args.do_train:
        source = data_args.dataset_name or data_args.train_dir
        paragraphs = card_paragraphs(model_args, model, splits, class_names, skipped)
        write_card(trainer, "image-classification", source, "imagefolder", asdict(augmentation_args), **paragraphs)


def load_splits(data_args: DataArguments, training_args: ClusterFormerTrainingArguments):
    """The pictures and labels that are used, checked, a line for each file that was left out, and the classes."""
    splits, unread = data.load_pictures(
        data_args.dataset_name, data_args.dataset_config_name, data_args.train_dir, data_args.validation_dir
    )
    splits = data.pick_columns(splits, data_args.image_column_name, data_args.label_column_name)
    for split, rows in splits.items():
        data.check_labels(rows, split, need_all_classes=split == "train")
    if "validation" not in splits and data_args.train_val_split:
        splits = data.split_off_validation(splits, data_args.train_val_split, training_args.seed)

    limits = {}
    if training_args.do_train:
        limits["train"] = data_args.max_train_samples
    if training_args.do_eval:
        limits["validation"] = data_args.max_eval_samples
    for split, limit in limits.items():
        if split not in splits:
            raise ValueError(f"There is no {split} split in {data_args}.")
        if limit is not None:
            splits[split] = splits[split].shuffle(seed=training_args.seed).select(range(min(limit, len(splits[split]))))
    splits = data.DatasetDict({split: splits[split] for split in limits})
    num_proc = training_args.dataloader_num_workers or None
    splits, skipped = data.drop_corrupt(splits, unread, data_args.skip_corrupt, num_proc)
    return splits, skipped, next(iter(splits.values())).features["label"].names


def load_shards(data_args: DataArguments, training_args: ClusterFormerTrainingArguments):
    """The same for shards: those for training, and all pictures of those for validation. Nothing is left out."""
    refused = ("train_dir", "validation_dir", "max_train_samples", "skip_corrupt")
    given = [f"--{name}" for name in refused if getattr(data_args, name)]
    if given or data_args.dataset_name is None:
        raise ValueError(f"--streaming needs --dataset_name and takes no {', '.join(given or refused)}.")
    columns = (data_args.image_column_name, data_args.label_column_name)
    found = find_shards(data_args.dataset_name, data_args.dataset_config_name, *columns)
    splits = {}
    for split, wanted in (("train", training_args.do_train), ("validation", training_args.do_eval)):
        if wanted and split not in found:
            raise ValueError(f"There are no shards for {split} in {data_args.dataset_name}.")
        if wanted:
            splits[split] = found[split]
    if "validation" in splits:
        splits["validation"] = load_whole(splits["validation"])
        if data_args.max_eval_samples is not None:
            rows = range(min(data_args.max_eval_samples, len(splits["validation"])))
            splits["validation"] = splits["validation"].shuffle(seed=training_args.seed).select(rows)
    return splits, [], next(iter(found.values())).class_names


def load_model(model_args: ModelArguments, class_names: list[str], do_train: bool):
    """The model for these classes, and the id that it knows each class by."""
    config = loading.load_config(model_args)
    if do_train and set(class_names) != set(config.id2label.values()):
        config.id2label = dict(enumerate(class_names))
    config.label2id = {name: label for label, name in config.id2label.items()}
    class_ids = data.match_classes(class_names, config.label2id)

    return loading.load_model(AutoModelForImageClassification, model_args, config, do_train), class_ids


def load_image_processor(model_args: ModelArguments, config: PreTrainedConfig):
    """The image processor that was named, else the checkpoint's if it has the size, else a new one for `image_size`."""
    new = partial(new_image_processor, crop_pct=model_args.crop_pct)
    image_processor = loading.load_fitting_image_processor(model_args, config, None, new)
    if model_args.crop_pct not in (None, getattr(image_processor, "crop_pct", None)):
        raise ValueError(
            f"--crop_pct {model_args.crop_pct} is for a new image processor; --image_processor_name "
            f"{model_args.image_processor_name} names one: leave out one of them."
        )
    return image_processor


def new_image_processor(config: PreTrainedConfig, crop_pct: float | None):
    """One that makes the whole picture, or with `crop_pct` its centre, as large as `image_size`."""
    normalise = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    normalise["resample"] = PILImageResampling.BICUBIC
    size = config.image_size
    if crop_pct is None:
        height, width = (size, size) if isinstance(size, int) else size
        return ViTImageProcessor(size={"height": height, "width": width}, **normalise)
    # From that size on ConvNextImageProcessor resizes the whole picture, whatever its `crop_pct`.
    if not isinstance(size, int) or size >= 384:
        raise ValueError(f"--crop_pct {crop_pct} needs a square image_size below 384, got {size}.")
    return ConvNextImageProcessor(size={"shortest_edge": size}, crop_pct=crop_pct, **normalise)


def card_paragraphs(model_args, model, splits, class_names: list[str], skipped: list[str]) -> dict[str, str]:
    """What the model card says beside the measured numbers."""
    counts = ", ".join(f"{split} {len(rows):,} pictures" for split, rows in splits.items())
    left_out = f" {len(skipped)} files that could not be read were left out." if skipped else ""
    return {
        "description": loading.describe(model, model_args),
        "limits": f"It tells {len(class_names)} classes apart: {list_classes(class_names)}. Pictures of anything else "
        "get one of them too. The results hold for pictures like those of the evaluation set.",
        "data": f"Number of pictures: {counts}.{left_out}",
    }


if __name__ == "__main__":
    run_script(main)
