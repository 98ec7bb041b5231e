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
"""Weights that are not where a module runs: offloaded by accelerate, and sharded by FSDP."""

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from clusterformer_hf import (
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    ClusterFormerForSemanticSegmentation,
    ClusterFormerForUniversalSegmentation,
    ClusterFormerPreTrainedModel,
)
from tests import nano


# Two blocks and layers each: what they share lies in one place.
SIZES = nano.BACKBONE | nano.DECODER | {"depths": [2, 2, 2, 2], "decoder_layers": 2, "train_num_points": 64}
MODELS = [
    (ClusterFormerForImageClassification, {}),
    (ClusterFormerForImageClassification, {"clustering": "release"}),
    (ClusterFormerForImageClassification, {"clustering": "release_flash"}),
    (ClusterFormerForObjectDetection, {}),
    (ClusterFormerForSemanticSegmentation, {}),
    (ClusterFormerForUniversalSegmentation, {}),
]


def build(model_class, fields) -> ClusterFormerPreTrainedModel:
    torch.manual_seed(0)
    return model_class(ClusterFormerConfig(**SIZES | fields)).eval()


@pytest.mark.parametrize(
    "model_class, elsewhere",
    [
        (ClusterFormerForImageClassification, ["clusterformer.hidden_states_norms", "classifier"]),
        (ClusterFormerForObjectDetection, ["class_heads"]),
        (ClusterFormerForSemanticSegmentation, ["class_head", "mask_head"]),
        (ClusterFormerForUniversalSegmentation, ["class_head", "mask_head"]),
    ],
)
def test_padded_images_on_several_devices(model_class, elsewhere):
    """Layers lie on two devices, one of them pretended: what they share of the padding follows."""
    model = build(model_class, {})
    for name in elsewhere:
        for module in model.get_submodule(name).modules():
            add_hook_to_module(module, AlignDevicesHook(execution_device="meta", io_same_device=False), append=True)
        model.get_submodule(name).to("meta")
    mask = torch.ones(2, 64, 64, dtype=torch.bool)
    mask[1, :, 40:] = False
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 64), pixel_mask=mask)
    assert outputs.to_tuple()[0].device.type == "meta"


@torch.no_grad()
def run(model) -> list[torch.Tensor]:
    pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return torch.utils._pytree.tree_leaves(dict(model(pixel_values, output_cluster_assignments=True)))


@pytest.mark.parametrize("model_class, fields", MODELS)
def test_offloaded_weights(model_class, fields, tmp_path):
    """Every module loads its own weights when it is called, from memory and from files."""
    expected = run(build(model_class, fields))
    build(model_class, fields).save_pretrained(tmp_path)
    offloaded = accelerate.cpu_offload(build(model_class, fields), execution_device=torch.device("cpu"))
    parts = {name: "disk" if name in ("clusterformer", "decoder") else "cpu" for name, _ in offloaded.named_children()}
    from_files = model_class.from_pretrained(tmp_path, device_map=parts, offload_folder=tmp_path / "offloaded").eval()
    for model in (offloaded, from_files):
        assert {parameter.device.type for parameter in model.clusterformer.parameters()} == {"meta"}
        for found, wanted in zip(run(model), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_class", dict(MODELS))
def test_sharded_blocks(model_class, dtype, tmp_path):
    """A block has its weights only while it is called, and its centres and assignments are made then."""
    expected, policy = run(build(model_class, {})), MixedPrecisionPolicy(param_dtype=dtype)
    tolerance = {} if dtype is None else {"rtol": 0, "atol": 0.1, "check_dtype": False}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = build(model_class, {})
        for module in reversed(list(model.modules())):
            if type(module).__name__ in ("ClusterFormerLayer", "ClusterFormerDecoderLayer"):
                fully_shard(module, mp_policy=policy)
        for found, wanted in zip(run(fully_shard(model, mp_policy=policy)), expected, strict=True):
            torch.testing.assert_close(found, wanted, **tolerance)
    finally:
        torch.distributed.destroy_process_group()
