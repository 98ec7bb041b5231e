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
How fast detectors of one size learn: ClusterFormer beside DETR, Deformable DETR and RT-DETR, all from scratch.

    python scripts/compare_detectors.py --models clusterformer rt_detr --seeds 0 --cpu_minutes 60

Every model sees digit scenes in the same order with the same augmentation, in batches of one size, for the same budget
of processor time: 60 minutes are half an hour on two cores. With `--samples` it is the same number of scenes. See
`learning_curves.py` for what that means, and for the file of finished runs that the table is made from.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

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
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    HfArgumentParser,
    PreTrainedModel,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    set_seed,
)

from clusterformer_hf import ClusterFormerConfig, ClusterFormerForObjectDetection
from clusterformer_hf.data.augmentation import random_numbers_from
from clusterformer_hf.data.digit_scenes import Scene, load_digits, scene_at
from clusterformer_hf.metrics.detection import average_precision


WIDTHS, DEPTHS, DIM, HEADS, LAYERS, QUERIES = [32, 64, 128, 160], [1, 1, 2, 1], 96, 4, 3, 36
TRANSFORMER = {
    "d_model": DIM,
    "encoder_ffn_dim": 2 * DIM,
    "decoder_ffn_dim": 2 * DIM,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "decoder_layers": LAYERS,
    "num_queries": QUERIES,
    "dropout": 0.0,
    "num_labels": 10,
}


@dataclass
class Arguments(ComparisonArguments):
    output: Path = field(default=Path("outputs/compare_detectors.json"), metadata={"help": "Results file, added to."})


def clusterformer(size: int) -> PreTrainedModel:
    config = ClusterFormerConfig(
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
        decoder_layers=3,
        decoder_attention_heads=HEADS,
        decoder_ffn_dim=4 * DIM,
        decoder_num_iterations=1,
        use_varifocal_loss=True,  # as in RT-DETR
        class_loss_coefficient=0.5,
        num_labels=10,
    )
    return ClusterFormerForObjectDetection(config)


def resnet(**kwargs) -> ResNetConfig:
    return ResNetConfig(embedding_size=32, hidden_sizes=WIDTHS, depths=DEPTHS, layer_type="basic", **kwargs)


def for_training_from_scratch(model: PreTrainedModel) -> PreTrainedModel:
    """
    DETR or Deformable DETR with initial values to learn from, and with norms in the backbone that are trained: they
    freeze them, which suits pretrained weights only.
    """
    initialise_to_learn_from_scratch(model, model.model.encoder.layers, model.model.decoder.layers)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("FrozenBatchNorm2d"):
                setattr(parent, name, torch.nn.BatchNorm2d(len(child.weight)))
    return model


def detr(size: int) -> PreTrainedModel:
    backbone = resnet(out_features=["stage4"])
    config = DetrConfig(backbone_config=backbone, encoder_layers=LAYERS, auxiliary_loss=True, **TRANSFORMER)
    return for_training_from_scratch(DetrForObjectDetection(config))


def deformable_detr(size: int) -> PreTrainedModel:
    config = DeformableDetrConfig(
        backbone_config=resnet(out_features=["stage2", "stage3", "stage4"]),
        encoder_layers=1,
        num_feature_levels=3,
        with_box_refine=True,
        auxiliary_loss=True,
        **TRANSFORMER,
    )
    return for_training_from_scratch(DeformableDetrForObjectDetection(config))


def rt_detr(size: int) -> PreTrainedModel:
    backbone = RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=WIDTHS,
        depths=DEPTHS,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=WIDTHS[1:],
        encoder_hidden_dim=DIM,
        decoder_in_channels=[DIM] * 3,
        hidden_expansion=0.5,
        num_denoising=20,
        freeze_backbone_batch_norms=False,
        **TRANSFORMER,
    )
    model = RTDetrForObjectDetection(config)
    initialise_to_learn_from_scratch(model, model.model.decoder.layers)
    return model


# Model, learning rate, and the processor that reads its outputs.
MODELS = {
    "clusterformer": (clusterformer, 1e-3, DeformableDetrImageProcessor),
    "detr": (detr, 5e-4, DetrImageProcessor),
    "deformable_detr": (deformable_detr, 5e-4, DeformableDetrImageProcessor),
    "rt_detr": (rt_detr, 1e-3, RTDetrImageProcessor),
}


class Scenes(torch.utils.data.Dataset):
    """Digit scenes in memory. An item is changed in size, place and colours, by `seed`, epoch and its index alone."""

    def __init__(self, split: str, number: int, size: int):
        self.seed = self.epoch = 0
        digits, labels = load_digits(split)
        self.scenes = [scene_at(split, i, digits, labels, size=size) for i in range(number)]
        self.size = size
        self.augment = v2.Compose(
            [
                v2.RandomChannelPermutation(),
                v2.ScaleJitter(target_size=(size, size), scale_range=(0.8, 1.25), antialias=False),
                v2.RandomCrop(size, pad_if_needed=True, fill=127),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(min_size=3),
            ]
        )

    def __len__(self) -> int:
        return len(self.scenes)

    def inputs(self, index: int) -> dict:
        """`pixel_values` (3, size, size) and `labels` of a scene as it is."""
        return self._normalise(*self._tensors(self.scenes[index]))

    def __getitem__(self, index: int) -> dict:
        sample = dict(zip(("image", "boxes", "labels"), self._tensors(self.scenes[index])))
        with random_numbers_from(self.seed, self.epoch, index):
            sample = self.augment(sample)
        return self._normalise(sample["image"], sample["boxes"], sample["labels"])

    def _tensors(self, scene: Scene):
        image = tv_tensors.Image(torch.from_numpy(scene.image).permute(2, 0, 1))
        boxes = torch.from_numpy(scene.boxes).float()
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=(self.size, self.size))
        return image, boxes, torch.from_numpy(scene.labels)

    def _normalise(self, image, boxes, labels) -> dict:
        boxes = box_convert(boxes.as_subclass(torch.Tensor), "xywh", "cxcywh") / self.size
        pixels = (image.as_subclass(torch.Tensor).float() / 255 - 0.45) / 0.25
        return {"pixel_values": pixels, "labels": {"class_labels": labels, "boxes": boxes}}


def collate(examples: list[dict]) -> dict:
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": [example["labels"] for example in examples]}


def ground_truth(test: Scenes) -> dict:
    """The test scenes in COCO's format."""
    annotations = []
    for image_id, scene in enumerate(test.scenes):
        for label, box in zip(scene.labels.tolist(), scene.boxes.tolist()):
            area = box[2] * box[3]
            row = {"image_id": image_id, "category_id": label, "bbox": box, "area": area, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **row})
    images = [{"id": i, "height": test.size, "width": test.size} for i in range(len(test))]
    categories = [{"id": label, "name": str(label)} for label in range(10)]
    return {"images": images, "annotations": annotations, "categories": categories}


@torch.no_grad()
def evaluate(model: PreTrainedModel, processor, test: Scenes) -> dict[str, float]:
    results = []
    for start in range(0, len(test), 50):
        indices = range(start, min(start + 50, len(test)))
        outputs = model(torch.stack([test.inputs(i)["pixel_values"] for i in indices]).to(model.device))
        sizes = torch.tensor([[test.size, test.size]] * len(indices))
        detections = processor.post_process_object_detection(outputs, threshold=1e-6, target_sizes=sizes)
        for i, detection in zip(indices, detections):
            boxes = box_convert(detection["boxes"], "xyxy", "xywh").tolist()
            for score, label, box in zip(detection["scores"].tolist(), detection["labels"].tolist(), boxes):
                results.append({"image_id": i, "category_id": label, "score": score, "bbox": box})
    statistics = average_precision(ground_truth(test), results)
    return {name: statistics[name] for name in ("AP", "AP50", "AP75")}


def train(name: str, seed: int, args: Arguments, train_scenes: Scenes, test_scenes: Scenes) -> tuple:
    """The trained model and its learning curve."""
    build, learning_rate, processor_class = MODELS[name]
    set_seed(seed)
    model = build(args.size)
    train_scenes.seed = seed
    sampler = torch.utils.data.RandomSampler(train_scenes, generator=torch.Generator().manual_seed(seed))
    loader = torch.utils.data.DataLoader(
        train_scenes,
        args.batch_size,
        sampler=sampler,
        num_workers=args.dataloader_num_workers,
        collate_fn=collate,
        drop_last=True,
    )
    scores = partial(evaluate, model, processor_class(), test_scenes)
    return model, learning_curve(model, loader, learning_rate, args, scores, partial(setattr, train_scenes, "epoch"))


def main(args: list[str] | None = None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args)
    models = chosen_models(args, MODELS)
    scenes = Scenes("train", args.num_train, args.size), Scenes("test", args.num_test, args.size)
    contestants = {name: contestant(build, rate, args.size) for name, (build, rate, _) in MODELS.items()}
    runs = add_missing_runs(models, contestants, args, lambda name, seed: train(name, seed, args, *scenes))
    print(markdown(runs, ["AP", "AP50", "AP75"]))


if __name__ == "__main__":
    main()
