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
"""Registers the models with the Auto classes and pipelines of transformers."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
)
from transformers.models.auto import modeling_auto

from .configuration_clusterformer import ClusterFormerConfig
from .modeling_clusterformer import (
    ClusterFormerBackbone,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    ClusterFormerForSemanticSegmentation,
    ClusterFormerForUniversalSegmentation,
    ClusterFormerModel,
    ClusterFormerPreTrainedModel,
)


class ClusterFormerForImageSegmentation(ClusterFormerPreTrainedModel):
    """
    What `AutoModelForImageSegmentation`, and so `pipeline("image-segmentation")`, loads: the semantic model where the
    checkpoint was saved as one, else the universal model. Their weights have the same names and shapes, so that the
    pipeline, which tries `AutoModelForSemanticSegmentation` next, would read either as the semantic model.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        if config is None:
            config = ClusterFormerConfig.from_pretrained(pretrained_model_name_or_path)
        return cls._saved_as(config).from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, **kwargs
        )

    @classmethod
    def _from_config(cls, config, **kwargs):
        return cls._saved_as(config)._from_config(config, **kwargs)

    @staticmethod
    def _saved_as(config: ClusterFormerConfig) -> type[ClusterFormerPreTrainedModel]:
        semantic = ClusterFormerForSemanticSegmentation
        return semantic if semantic.__name__ in (config.architectures or []) else ClusterFormerForUniversalSegmentation


# The Auto class of each model, and the table that pipelines look its name up in: they log an error where it is missing.
AUTO_CLASSES = (
    (AutoModel, ClusterFormerModel, "MODEL_MAPPING_NAMES"),
    (AutoBackbone, ClusterFormerBackbone, "MODEL_FOR_BACKBONE_MAPPING_NAMES"),
    (
        AutoModelForImageClassification,
        ClusterFormerForImageClassification,
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    ),
    (AutoModelForObjectDetection, ClusterFormerForObjectDetection, "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES"),
    (
        AutoModelForSemanticSegmentation,
        ClusterFormerForSemanticSegmentation,
        "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    ),
    (
        AutoModelForUniversalSegmentation,
        ClusterFormerForUniversalSegmentation,
        "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    ),
)


def register():
    """Makes the Auto classes know the models, and `save_pretrained` put the modelling files beside their weights."""
    model_type = ClusterFormerConfig.model_type
    AutoConfig.register(model_type, ClusterFormerConfig, exist_ok=True)
    ClusterFormerConfig.register_for_auto_class()
    for auto_class, model_class, table in AUTO_CLASSES:
        auto_class.register(ClusterFormerConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)
        getattr(modeling_auto, table)[model_type] = model_class.__name__
    # The segmentation pipeline joins its tables by model type, of which this one comes last.
    modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES[model_type] = (
        ClusterFormerForUniversalSegmentation.__name__,
        ClusterFormerForSemanticSegmentation.__name__,
    )
    AutoModelForInstanceSegmentation.register(ClusterFormerConfig, ClusterFormerForUniversalSegmentation, exist_ok=True)
    AutoModelForImageSegmentation.register(ClusterFormerConfig, ClusterFormerForImageSegmentation, exist_ok=True)
