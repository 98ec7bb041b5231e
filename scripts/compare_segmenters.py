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
How fast segmentation models of one size learn, all from scratch.

    python scripts/compare_segmenters.py --task panoptic --seeds 0 --cpu_minutes 60
    python scripts/compare_segmenters.py --task semantic --models clusterformer segformer

Panoptic: ClusterFormer beside MaskFormer and Mask2Former, with panoptic quality, average precision of the masks of the
digits, and mean IoU. Semantic: ClusterFormer beside Segformer and UperNet, with mean IoU.

Every model sees digit scenes in the same order with the same augmentation, in batches of one size, for the same budget
of processor time: 60 minutes are half an hour on two cores. With `--samples` it is the same number of scenes. See
`learning_curves.py` for what that means, and for the file of finished runs that the table is made from.
"""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from learning_curves import (
    ComparisonArguments,
    add_missing_runs,
    chosen_models,
    contestant,
    initialise_to_learn_from_scratch,
    learning_curve,
    markdown,
)
from run_universal_segmentation import Evaluation
from transformers import (
    DetrConfig,
    HfArgumentParser,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    PreTrainedModel,
    PrinterCallback,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    SwinConfig,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    set_seed,
)

from clusterformer_hf import (
    ClusterFormerConfig,
    ClusterFormerForSemanticSegmentation,
    ClusterFormerForUniversalSegmentation,
)
from clusterformer_hf.data.coco_panoptic import find_panoptic_splits, read_panoptic
from clusterformer_hf.data.digit_scenes import BACKGROUND, write_digit_scenes
from clusterformer_hf.data.label_maps import find_label_map_splits, read_class_names, read_label_maps
from clusterformer_hf.data.segmentation import SegmentationCollator, SemanticDataset, UniversalDataset
from clusterformer_hf.data.segmentation_augmentation import (
    SegmentationAugmentationArguments,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
)
from clusterformer_hf.metrics.detection import set_up_evaluation
from clusterformer_hf.metrics.segmentation import SegmentationTrainer
from clusterformer_hf.metrics.semantic import SemanticMetric, SemanticPostProcessor


WIDTHS, DEPTHS, DIM, HEADS, LAYERS, QUERIES = [32, 64, 128, 160], [1, 1, 2, 1], 96, 4, 3, 36
NUM_LABELS, NUM_POINTS = BACKGROUND + 1, 1024
METRICS = {"panoptic": ["PQ", "AP", "AP50", "mIoU"], "semantic": ["mIoU"]}
# No mirrored digits, and no crops to speak of: a part of an 8 may be a 3.
AUGMENTATION = SegmentationAugmentationArguments(min_scale=0.8, max_scale=1.1, horizontal_flip=0)


@dataclass
class Arguments(ComparisonArguments):
    task: str = field(default="panoptic", metadata={"help": "panoptic or semantic.", "choices": list(METRICS)})
    scenes: Path = field(default=Path("outputs/compare_segmenters_scenes"), metadata={"help": "Where scenes go."})

    def __post_init__(self):
        super().__post_init__()
        if self.output is None:
            self.output = Path(f"outputs/compare_segmenters_{self.task}.json")

    def settings(self) -> dict:
        return super().settings() | {"task": self.task}


def clusterformer_config(size: int) -> ClusterFormerConfig:
    return ClusterFormerConfig(
        image_size=size,
        patch_size=2,
        hidden_sizes=[16, 48, 128, 160],
        depths=DEPTHS,
        num_attention_heads=[1, 2, 4, 5],
        mlp_ratios=[2, 2, 2, 2],
        center_grid=[6, 6, 6, 6],
        num_iterations=1,
        initializer_range=0.06,
        decoder_hidden_size=DIM,
        decoder_layers=2,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=4 * DIM,
        decoder_num_iterations=1,
        mask_feature_size=32,
        train_num_points=NUM_POINTS,
        num_labels=NUM_LABELS,
    )


def swin(size: int) -> SwinConfig:
    """Of the same strides and depths, so wide that no peer has more than twice our parameters."""
    return SwinConfig(
        image_size=size,
        patch_size=2,
        embed_dim=24,
        depths=DEPTHS,
        num_heads=[1, 2, 4, 8],
        window_size=6,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def clusterformer(size: int) -> PreTrainedModel:
    return ClusterFormerForUniversalSegmentation(clusterformer_config(size))


def clusterformer_semantic(size: int) -> PreTrainedModel:
    return ClusterFormerForSemanticSegmentation(clusterformer_config(size))


def maskformer(size: int) -> PreTrainedModel:
    decoder = DetrConfig(
        d_model=DIM,
        decoder_layers=LAYERS,
        decoder_ffn_dim=2 * DIM,
        decoder_attention_heads=HEADS,
        encoder_layers=0,
        num_queries=QUERIES,
        dropout=0.0,
    )
    config = MaskFormerConfig(
        backbone_config=swin(size),
        decoder_config=decoder,
        fpn_feature_size=DIM,
        mask_feature_size=DIM,
        use_auxiliary_loss=True,
        output_hidden_states=True,  # of the layers, without which there is no auxiliary loss
        num_labels=NUM_LABELS,
    )
    model = MaskFormerForInstanceSegmentation(config)
    initialise_to_learn_from_scratch(model, model.model.transformer_module.decoder.layers)
    return model


def mask2former(size: int) -> PreTrainedModel:
    config = Mask2FormerConfig(
        backbone_config=swin(size),
        feature_size=DIM,
        mask_feature_size=DIM,
        hidden_dim=DIM,
        encoder_feedforward_dim=2 * DIM,
        encoder_layers=1,
        decoder_layers=LAYERS + 1,  # one of them only reads the queries
        dim_feedforward=2 * DIM,
        num_attention_heads=HEADS,
        num_queries=QUERIES,
        common_stride=2,
        feature_strides=[2, 4, 8, 16],
        train_num_points=NUM_POINTS,
        num_labels=NUM_LABELS,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    pixels, queries = model.model.pixel_level_module.decoder.encoder, model.model.transformer_module.decoder
    initialise_to_learn_from_scratch(model, pixels.layers, queries.layers)
    return model


def segformer(size: int) -> PreTrainedModel:
    config = SegformerConfig(
        hidden_sizes=WIDTHS,
        depths=DEPTHS,
        num_attention_heads=[1, 2, 4, 5],
        patch_sizes=[3, 3, 3, 3],
        strides=[2, 2, 2, 2],
        sr_ratios=[8, 4, 2, 1],
        decoder_hidden_size=DIM,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        num_labels=NUM_LABELS,
    )
    model = SegformerForSemanticSegmentation(config)
    initialise_to_learn_from_scratch(model)
    return model


def upernet(size: int) -> PreTrainedModel:
    config = UperNetConfig(backbone_config=swin(size), hidden_size=DIM, use_auxiliary_head=False, num_labels=NUM_LABELS)
    model = UperNetForSemanticSegmentation(config)
    initialise_to_learn_from_scratch(model)
    return model


# Model and learning rate: half of ours for the peers with a Swin, as for the peers among the detectors.
MODELS = {
    "panoptic": {
        "clusterformer": (clusterformer, 1e-3),
        "maskformer": (maskformer, 5e-4),
        "mask2former": (mask2former, 5e-4),
    },
    "semantic": {
        "clusterformer": (clusterformer_semantic, 1e-3),
        "segformer": (segformer, 1e-3),
        "upernet": (upernet, 5e-4),
    },
}


class PanopticScenes:
    """The scenes as panoptic segments, and how a model of masks and classes is evaluated on them."""

    def __init__(self, scenes: Path, size: int):
        splits = find_panoptic_splits(scenes)
        self.train, self.test = (read_panoptic(*splits[split]) for split in ("train", "validation"))
        self.processor = Mask2FormerImageProcessor(size={"height": size, "width": size})
        self.ids = list(range(NUM_LABELS))
        self.dataset_class = UniversalDataset

    def evaluation(self, model: PreTrainedModel, folder: Path) -> tuple:
        model.config.id2label = dict(enumerate(self.test.class_names))
        model.config.label2id = {name: label for label, name in model.config.id2label.items()}
        evaluation = Evaluation(self.test, model.config, self.processor, str(folder))
        return evaluation.post_processor, evaluation.metric


class SemanticScenes:
    """The scenes as label maps, and how a model is evaluated on them."""

    def __init__(self, scenes: Path, size: int):
        splits = find_label_map_splits(scenes)
        names = read_class_names(scenes / "annotations" / "semantic_labels.json")
        self.train, self.test = (
            read_label_maps(*splits[split], class_names=names) for split in ("train", "validation")
        )
        self.processor = SegformerImageProcessor(size={"height": size, "width": size})
        self.ids = list(range(NUM_LABELS))
        self.dataset_class = SemanticDataset

    def evaluation(self, model: PreTrainedModel, folder: Path) -> tuple:
        return SemanticPostProcessor(self.processor), SemanticMetric(self.test, dict(enumerate(self.test.class_names)))


def collator(model: PreTrainedModel) -> SegmentationCollator:
    """In the form that the model's `forward` takes labels and padding."""
    parameters = inspect.signature(model.forward).parameters
    return SegmentationCollator(
        mask2former_labels="mask_labels" in parameters and "labels" not in parameters,
        pixel_mask="pixel_mask" in parameters,
    )


def train(name: str, seed: int, args: Arguments, data: PanopticScenes | SemanticScenes) -> tuple:
    """The trained model and its learning curve."""
    build, learning_rate = MODELS[args.task][name]
    set_seed(seed)
    model = build(args.size)
    train_set = data.dataset_class(
        data.train, SegmentationTrainTransform(data.processor, AUGMENTATION), data.ids, seed=seed
    )
    test_set = data.dataset_class(data.test, SegmentationEvalTransform(data.processor), data.ids)
    post_processor, metric = data.evaluation(model, args.scenes)
    training_args = TrainingArguments(
        output_dir=str(args.scenes / "evaluation"),
        per_device_eval_batch_size=50,
        report_to="none",
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
    )
    trainer = SegmentationTrainer(
        model=model,
        args=set_up_evaluation(training_args),
        eval_dataset=test_set,
        data_collator=collator(model),
        preprocess_logits_for_metrics=post_processor,
        compute_metrics=metric,
    )
    trainer.remove_callback(PrinterCallback)  # which would print the scores of every class
    sampler = torch.utils.data.RandomSampler(train_set, generator=torch.Generator().manual_seed(seed))
    loader = torch.utils.data.DataLoader(
        train_set,
        args.batch_size,
        sampler=sampler,
        num_workers=args.dataloader_num_workers,
        collate_fn=collator(model),
        drop_last=True,
    )

    def evaluate() -> dict[str, float]:
        scores = trainer.evaluate()
        return {metric: scores[f"eval_{metric}"] for metric in METRICS[args.task]}

    return model, learning_curve(model, loader, learning_rate, args, evaluate, train_set.set_epoch)


def main(args: list[str] | None = None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args)
    models = chosen_models(args, MODELS[args.task])
    scenes = args.scenes / f"{args.num_train}_{args.num_test}_{args.size}"
    if not scenes.exists():
        args.scenes.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=args.scenes) as folder:  # what is there under its name is complete
            write_digit_scenes(Path(folder, "scenes"), args.num_train, args.num_test, size=args.size).rename(scenes)
    data = {"panoptic": PanopticScenes, "semantic": SemanticScenes}[args.task](scenes, args.size)
    contestants = {name: contestant(*entry, args.size) for name, entry in MODELS[args.task].items()}
    runs = add_missing_runs(models, contestants, args, lambda name, seed: train(name, seed, args, data))
    print(markdown(runs, METRICS[args.task]))


if __name__ == "__main__":
    main()
