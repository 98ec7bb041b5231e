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
"""ClusterFormer for Hugging Face Transformers. Importing this package registers its Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
)

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


__version__ = "0.1.0"

AutoConfig.register(ClusterFormerConfig.model_type, ClusterFormerConfig, exist_ok=True)
for auto_class, model_class in (
    (AutoModel, ClusterFormerModel),
    (AutoBackbone, ClusterFormerBackbone),
    (AutoModelForImageClassification, ClusterFormerForImageClassification),
    (AutoModelForObjectDetection, ClusterFormerForObjectDetection),
    (AutoModelForSemanticSegmentation, ClusterFormerForSemanticSegmentation),
    (AutoModelForUniversalSegmentation, ClusterFormerForUniversalSegmentation),
):
    auto_class.register(ClusterFormerConfig, model_class, exist_ok=True)
    # `save_pretrained` then puts the modelling files next to the weights: the folder loads without this package.
    model_class.register_for_auto_class(auto_class.__name__)
ClusterFormerConfig.register_for_auto_class()

__all__ = [
    "ClusterFormerBackbone",
    "ClusterFormerConfig",
    "ClusterFormerForImageClassification",
    "ClusterFormerForObjectDetection",
    "ClusterFormerForSemanticSegmentation",
    "ClusterFormerForUniversalSegmentation",
    "ClusterFormerModel",
    "ClusterFormerPreTrainedModel",
]
