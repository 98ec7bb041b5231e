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
"""Fields of the smallest models, for what `--config_overrides` of the training scripts is tested with."""

CLASSIFIER = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 3, 4],
    "center_grid": [2, 2, 2, 2],
    "sr_ratios": [1, 1, 1, 1],
    "image_size": 32,
}
# Sixteen centres in the last stage, which a decoder starts from.
BACKBONE = CLASSIFIER | {"center_grid": [2, 2, 2, 4], "image_size": 64}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "decoder_num_iterations": 1,
}
