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
"""Bad input of the models: each gets an error that names the value."""

import pytest
import torch

from clusterformer_hf import (
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    ClusterFormerForSemanticSegmentation,
    ClusterFormerModel,
)


NANO = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
    "center_grid": [2, 2, 2, 2],
    "num_labels": 3,
}


@pytest.fixture(scope="module")
def model():
    return ClusterFormerForImageClassification(ClusterFormerConfig(**NANO))


@pytest.fixture(scope="module")
def released():
    config = ClusterFormerConfig(**NANO, clustering="release", window_grid=[[4, 2], 2, 1, 1])
    return ClusterFormerForImageClassification(config)


@pytest.mark.parametrize("clustering", ["recurrent", "release"])
def test_heads_that_do_not_divide_the_channels(clustering):
    """Told when the model is built: a config may be changed field by field."""
    config = ClusterFormerConfig(**{**NANO, "hidden_sizes": [8, 16, 24, 33]}, clustering=clustering)
    with pytest.raises(ValueError, match="33 is no multiple of 2"):
        ClusterFormerModel(config)


@pytest.mark.parametrize(
    "model_class, kwargs, message",
    [
        (ClusterFormerForObjectDetection, {"decoder_hidden_size": 36, "decoder_attention_heads": 8}, "=36.*heads=8"),
        (ClusterFormerForObjectDetection, {"decoder_hidden_size": 30, "decoder_attention_heads": 2}, "=30.*and of 4"),
        (ClusterFormerForObjectDetection, {"clustering": "release_flash"}, "got 'release_flash'"),
        (
            ClusterFormerForSemanticSegmentation,
            {name: NANO[name][:3] for name in NANO if name != "num_labels"},
            r"needs 4 stages, and `depths=\[1, 1, 1\]` has 3",
        ),
    ],
)
def test_configs_that_the_decoder_does_not_take(model_class, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model_class(ClusterFormerConfig(**{**NANO, **kwargs}))


def test_no_pixels(model):
    with pytest.raises(ValueError, match="pixel_values"):
        model()


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 4, 64, 64), (3, 64, 64), (1, 64, 64, 3)])
def test_wrong_shape(model, shape):
    with pytest.raises(ValueError, match=r"num_channels=3.*" + str(shape).replace("(", r"\(").replace(")", r"\)")):
        model(torch.zeros(shape))


def test_integers_are_no_pixels(model):
    with pytest.raises(ValueError, match="normalised floating point numbers, got torch.uint8"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("size", [(3, 64), (64, 2)])
def test_smaller_than_a_patch(model, size):
    with pytest.raises(ValueError, match=rf"\({size[0]}, {size[1]}\) are smaller than one patch of 4 x 4"):
        model(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("labels", [[0, 3], [-1, 2]])
def test_labels_out_of_range(model, labels):
    with pytest.raises(ValueError, match=rf"\[0, 3\).*num_labels=3.*\[{labels[0]}, {labels[1]}\]"):
        model(torch.zeros(2, 3, 32, 32), labels=torch.tensor(labels))


def test_a_picture_without_a_label_has_no_loss(model):
    pixel_values = torch.randn(2, 3, 32, 32)
    loss = model(pixel_values, labels=torch.tensor([1, -100])).loss
    torch.testing.assert_close(loss, model(pixel_values[:1], labels=torch.tensor([1])).loss)


def test_pixel_mask_of_another_shape(model):
    with pytest.raises(ValueError, match=r"`pixel_mask` must have the shape \(2, 32, 32\), got \(2, 16, 16\)"):
        model(torch.zeros(2, 3, 32, 32), pixel_mask=torch.ones(2, 16, 16))


def test_pixel_mask_that_is_no_rectangle(model):
    mask = torch.ones(3, 32, 32)
    mask[1, 5, 5] = 0
    mask[2] = 0
    with pytest.raises(ValueError, match=r"images \[1, 2\]"):
        model(torch.zeros(3, 3, 32, 32), pixel_mask=mask)


def test_released_form_on_a_size_that_its_windows_do_not_divide(released):
    with pytest.raises(ValueError, match="multiple of 16 and whose width is a multiple of 16, got 64 x 72"):
        released(torch.zeros(1, 3, 64, 72))
    config = ClusterFormerConfig.released_tiny(depths=[1, 1, 1, 1])
    with torch.device("meta"), pytest.raises(ValueError, match="multiple of 128 and .* multiple of 128, got 224 x 224"):
        ClusterFormerModel(config)(torch.zeros(1, 3, 224, 224))


def test_released_form_with_padding(released):
    mask = torch.ones(1, 64, 64)
    released(torch.zeros(1, 3, 64, 64), pixel_mask=mask)
    mask[:, 32:] = 0
    with pytest.raises(ValueError, match="cannot leave out padded pixels"):
        released(torch.zeros(1, 3, 64, 64), pixel_mask=mask)
