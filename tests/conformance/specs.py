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
"""What to test: class names, small config kwargs, skip lists.

CONFORMANCE_TARGET=clusterformer (default) or intree (control: transformers' own classes).
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Kind:
    name: str
    cls_name: str
    make_config: Callable  # (pkg) -> config instance
    table: str  # modeling_auto name table this class belongs to
    labels: str | None  # None | classification | semantic | detection | universal
    pipelines: tuple = ()
    has_attentions: bool = False
    image_size: int = 64
    batch_size: int = 2
    num_labels: int = 3
    n_targets: int = 2
    # hidden states: attribute name, expected length, expected shape of entry 1 without batch
    hidden_attr: str = "hidden_states"
    hidden_len: int | None = None
    hidden1_shape: tuple | None = None
    attn_attr: str = "attentions"
    retain_attr: str = "hidden_states"
    retain_index: int = 1
    flags: dict = field(default_factory=dict)  # extra class attributes for the test class
    skips: dict = field(default_factory=dict)  # {test name or prefix*: reason}
    pkg: Any = None

    def config(self):
        return self.make_config(self.pkg)

    @property
    def model_class(self):
        return getattr(self.pkg, self.cls_name)


def find_class(pkg, name):
    """The package's own class of that name, else transformers'."""
    import transformers

    return getattr(pkg, name, None) or getattr(transformers, name)


@dataclass
class Spec:
    package: str
    kinds: dict
    backbone_kind: str
    config_tests: dict  # name -> (config class name, kwargs, common_properties)
    image_processors: dict  # backend -> class name
    image_processor_kwargs: dict  # attributes of the ImageProcessingTester (small sizes)
    pipeline_processor_kwargs: dict
    semantic_postprocess: str  # "semantic" (logits) | "detr_panoptic" | "universal"
    skips_image_processing: dict = field(default_factory=dict)
    extra_names: tuple = ()  # further (table, model_type, class name)
    pipeline_processors: dict = field(
        default_factory=dict
    )  # kind name -> processor class name, where it is not the default one
    pkg: Any = None

    def name_tables(self):
        rows = [(k.table, k.config().model_type, k.cls_name) for k in self.kinds.values() if k.table]
        return rows + list(self.extra_names)

    def image_processor_names(self):
        names = [*self.image_processors.values(), *self.pipeline_processors.values()]
        return {n: find_class(self.pkg, n) for n in names}

    def pipeline_image_processor(self, kind):
        name = self.pipeline_processors.get(kind.name) or self.image_processors["torchvision"]
        return find_class(self.pkg, name)(**self.pipeline_processor_kwargs)


# common to every vision model without token embeddings (in-tree vision models skip the same ones)
VISION_SKIPS = {
    "test_model_get_set_embeddings": "vision model: no input/output token embeddings",
}


# what tests/models/rt_detr (and d_fine, detr) skip: the `inputs_embeds` argument of forward is not a token embedding
DETR_SKIPS = {
    **VISION_SKIPS,
    "test_inputs_embeds": "upstream RT-DETR skip: does not use (token) inputs_embeds",
    "test_inputs_embeds_matches_input_ids": "upstream RT-DETR skip: does not use (token) inputs_embeds",
}


def clusterformer():
    base = dict(
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        center_grid=[3, 3, 3, 3],
        num_iterations=2,
        decoder_hidden_size=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        decoder_num_iterations=2,
        train_num_points=64,
        num_labels=3,
    )

    def cfg(pkg, **kw):
        return pkg.ClusterFormerConfig(**{**base, **kw})

    conv = dict(hidden_len=5, hidden1_shape=(8, 16, 16), skips=VISION_SKIPS)
    rows = [
        ("model", "Model", "MODEL_MAPPING_NAMES", None, "image-feature-extraction"),
        ("backbone", "Backbone", "MODEL_FOR_BACKBONE_MAPPING_NAMES", None, None),
        (
            "image_classification",
            "ForImageClassification",
            "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
            "classification",
            "image-classification",
        ),
        (
            "object_detection",
            "ForObjectDetection",
            "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
            "detection",
            "object-detection",
        ),
        (
            "semantic_segmentation",
            "ForSemanticSegmentation",
            "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
            "semantic",
            "image-segmentation",
        ),
        (
            "universal_segmentation",
            "ForUniversalSegmentation",
            "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
            "universal",
            "image-segmentation",
        ),
    ]
    import clusterformer_hf

    kinds = {}
    for name, suffix, table, labels, pipeline in rows:
        if not hasattr(clusterformer_hf, "ClusterFormer" + suffix):
            print(f"conformance: clusterformer_hf has no ClusterFormer{suffix} yet")
            continue
        make = (lambda p: cfg(p, out_features=["stage2", "stage4"])) if name == "backbone" else cfg
        kinds[name] = Kind(name, "ClusterFormer" + suffix, make, table, labels, (pipeline,) if pipeline else (), **conv)
    return Spec(
        package="clusterformer_hf",
        kinds=kinds,
        backbone_kind="backbone",
        config_tests={
            "base": (
                "ClusterFormerConfig",
                dict(hidden_sizes=[8, 16, 24, 32]),
                ["num_channels", "hidden_sizes", "num_hidden_layers"],
            )
        },
        image_processors={},
        image_processor_kwargs={},
        pipeline_processor_kwargs=dict(size={"height": 64, "width": 64}),
        semantic_postprocess="semantic",
        pipeline_processors={
            "model": "ViTImageProcessor",
            "image_classification": "ViTImageProcessor",
            "semantic_segmentation": "SegformerImageProcessor",
            "object_detection": "DeformableDetrImageProcessor",
            "universal_segmentation": "Mask2FormerImageProcessor",
        },
    )


def intree():
    """CONTROL: the same harness on transformers' own classes, to tell out-of-tree artefacts from upstream behaviour."""

    def cn(pkg, **kw):
        return pkg.ConvNextConfig(**{**dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=3), **kw})

    def dn(pkg, **kw):
        return pkg.DINOv3ConvNextConfig(
            **{**dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=3), **kw}
        )

    def det(pkg):
        return pkg.RTDetrConfig(
            backbone_config=pkg.RTDetrResNetConfig(
                embeddings_size=10,
                hidden_sizes=[10, 20, 30, 40],
                depths=[1, 1, 2, 1],
                out_features=["stage2", "stage3", "stage4"],
            ),
            encoder_in_channels=[20, 30, 40],
            encoder_hidden_dim=32,
            d_model=32,
            decoder_in_channels=[32, 32, 32],
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            num_queries=20,
            decoder_layers=2,
            num_denoising=0,
            num_labels=3,
        )

    def uni(pkg):
        return pkg.Mask2FormerConfig(
            backbone_config=pkg.SwinConfig(
                image_size=64,
                embed_dim=8,
                depths=[1, 1, 1, 1],
                num_heads=[1, 1, 1, 1],
                window_size=2,
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=10,
            train_num_points=64,
            num_labels=3,
        )

    def seg(pkg):
        return pkg.SegformerConfig(
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 8, 16, 16],
            num_attention_heads=[1, 1, 2, 2],
            sr_ratios=[8, 4, 2, 1],
            decoder_hidden_size=16,
            num_labels=3,
        )

    conv = dict(hidden_len=5, hidden1_shape=(8, 16, 16))
    K = Kind
    kinds = [
        K("model", "DINOv3ConvNextModel", dn, "", None, skips=VISION_SKIPS, **conv),
        K(
            "backbone",
            "DINOv3ConvNextBackbone",
            lambda p: dn(p, out_features=["stage2", "stage4"]),
            "",
            None,
            skips=VISION_SKIPS,
            **conv,
        ),
        K(
            "image_classification",
            "ConvNextForImageClassification",
            cn,
            "",
            "classification",
            ("image-classification",),
            skips=VISION_SKIPS,
            **conv,
        ),
        K(
            "semantic_segmentation",
            "SegformerForSemanticSegmentation",
            seg,
            "",
            "semantic",
            ("image-segmentation",),
            has_attentions=True,
            hidden_len=4,
            retain_index=0,
            skips=VISION_SKIPS,
        ),
        K(
            "detection_base",
            "RTDetrModel",
            det,
            "",
            None,
            has_attentions=True,
            hidden_attr="encoder_hidden_states",
            hidden_len=2,
            attn_attr="encoder_attentions",
            retain_attr="encoder_hidden_states",
            retain_index=0,
            flags={"is_encoder_decoder": True},
            skips=DETR_SKIPS,
        ),
        K(
            "object_detection",
            "RTDetrForObjectDetection",
            det,
            "",
            "detection",
            ("object-detection",),
            has_attentions=True,
            hidden_attr="encoder_hidden_states",
            hidden_len=2,
            attn_attr="encoder_attentions",
            retain_attr="encoder_hidden_states",
            retain_index=0,
            flags={"is_encoder_decoder": True},
            skips=DETR_SKIPS,
        ),
        K(
            "universal_base",
            "Mask2FormerModel",
            uni,
            "",
            None,
            has_attentions=True,
            hidden_attr="encoder_hidden_states",
            hidden_len=4,
            flags={"test_missing_keys": False},
            retain_attr="encoder_hidden_states",
            retain_index=0,
            skips=VISION_SKIPS,
        ),
        K(
            "universal_segmentation",
            "Mask2FormerForUniversalSegmentation",
            uni,
            "",
            "universal",
            ("image-segmentation",),
            has_attentions=True,
            hidden_attr="encoder_hidden_states",
            hidden_len=4,
            flags={"test_missing_keys": False},
            retain_attr="pixel_decoder_hidden_states",
            retain_index=0,
            skips=VISION_SKIPS,
        ),
    ]
    return Spec(
        package="transformers",
        kinds={k.name: k for k in kinds},
        backbone_kind="backbone",
        config_tests={
            "base": ("DINOv3ConvNextConfig", dict(hidden_sizes=[8, 16, 24, 32]), ["num_channels", "hidden_sizes"]),
            "det": ("RTDetrConfig", {}, ["hidden_size", "num_attention_heads"]),
            "uni": ("Mask2FormerConfig", {}, ["hidden_size", "num_attention_heads"]),
        },
        image_processors={"torchvision": "DetrImageProcessor", "pil": "DetrImageProcessorPil"},
        image_processor_kwargs=dict(
            size={"shortest_edge": 18, "longest_edge": 1333}, do_pad=True, do_resize=True, num_labels=5
        ),
        pipeline_processor_kwargs=dict(size={"height": 64, "width": 64}),
        semantic_postprocess="detr_panoptic",
        pipeline_processors={
            "image_classification": "ViTImageProcessor",
            "semantic_segmentation": "SegformerImageProcessor",
            "object_detection": "RTDetrImageProcessor",
            "universal_segmentation": "Mask2FormerImageProcessor",
        },
    )


_LOADED = None


def load():
    global _LOADED
    if _LOADED is None:
        spec = {"clusterformer": clusterformer, "intree": intree}[
            os.environ.get("CONFORMANCE_TARGET", "clusterformer")
        ]()
        spec.pkg = importlib.import_module(spec.package)
        for k in spec.kinds.values():
            k.pkg = spec.pkg
        _LOADED = spec
    return _LOADED
