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
"""What the config accepts, fills in and refuses."""

import pytest
from transformers import AutoConfig

from clusterformer_hf import ClusterFormerConfig


def test_defaults_are_tiny():
    config = ClusterFormerConfig()
    assert config.to_dict() == ClusterFormerConfig.tiny().to_dict()
    assert config.depths == [2, 2, 6, 2] and config.hidden_sizes == [96, 192, 384, 768]
    assert config.center_grid == [10, 10, 10, 10] and config.num_iterations == 3
    assert config.sr_ratios == [4, 2, 1, 1] and config.window_grid == [1, 1, 1, 1]
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert config.out_features == ["stage4"] and config.out_indices == [4]
    assert ClusterFormerConfig.small().depths == [2, 2, 18, 2]


def test_released_sizes():
    tiny, small = ClusterFormerConfig.released_tiny(), ClusterFormerConfig.released_small()
    assert tiny.clustering == "release" and tiny.mlp_ratios == [8, 8, 4, 4] and tiny.window_grid == [32, 16, 8, 4]
    assert tiny.sr_ratios == [1, 1, 1, 1] and tiny.classifier_pooling == "stages" and tiny.num_iterations == 3
    assert small.depths == [2, 2, 18, 2] and small.num_iterations == 1
    assert ClusterFormerConfig.released_tiny(clustering="release_flash").clustering == "release_flash"


def test_other_numbers_of_stages():
    config = ClusterFormerConfig(
        depths=[1, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2], mlp_ratios=[2, 2.5], center_grid=[4, [2, 3]]
    )
    assert config.sr_ratios == [4, 2] and config.window_grid == [1, 1] and config.num_stages == 2
    more = {name: getattr(config, name) * 2 for name in ("depths", "hidden_sizes", "num_attention_heads", "sr_ratios")}
    more |= {name: getattr(config, name) * 2 for name in ("mlp_ratios", "center_grid", "window_grid")}
    changed = ClusterFormerConfig.from_dict(config.to_dict() | more)
    assert changed.stage_names[-1] == "stage4" and changed.num_hidden_layers == changed.num_stages == 4


def test_save_and_load(tmp_path):
    config = ClusterFormerConfig(center_grid=[4, [3, 5], 2, 2], drop_path_rate=0.2, out_features=["stage2", "stage4"])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ClusterFormerConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"hidden_sizes": [96, 192, 384]}, r"hidden_sizes=\[96, 192, 384\]"),
        ({"num_attention_heads": [3, 6, 12]}, r"num_attention_heads=\[3, 6, 12\]"),
        ({"center_grid": [10, 10]}, r"center_grid=\[10, 10\]"),
        ({"center_grid": [10, 10, 10, 0]}, "got 0"),
        ({"center_grid": [10, 10, 10, [2, 3, 4]]}, r"got \[2, 3, 4\]"),
        ({"sr_ratios": [4, 2, 1]}, r"sr_ratios=\[4, 2, 1\]"),
        ({"sr_ratios": [4, 2, 1, 0]}, r"sr_ratios=\[4, 2, 1, 0\]"),
        ({"clustering": "kmeans"}, "'kmeans'"),
        ({"classifier_pooling": "cls"}, "'cls'"),
        ({"window_grid": [2, 1, 1, 1]}, r"window_grid=\[2, 1, 1, 1\]"),
        ({"clustering": "release", "sr_ratios": [2, 1, 1, 1]}, r"sr_ratios=\[2, 1, 1, 1\]"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"out_features": ["stage5"]}, "stage5"),
        ({"depths": "2262"}, "depths"),
        ({"num_iterations": 2.5}, "num_iterations"),
        ({"drop_path_rate": 1}, r"`drop_path_rate` must be in \[0, 1\)"),
        ({"no_object_weight": 0}, "`no_object_weight` must be positive, got 0"),
    ],
)
def test_bad_values_are_named(kwargs, message):
    with pytest.raises(Exception, match=message):
        ClusterFormerConfig(**kwargs)
