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
"""Names of the tensors of the released ClusterFormer and of ours: one table, read in both directions."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from clusterformer_hf import ClusterFormerConfig, ClusterFormerForImageClassification


# Pairs (released, ours) in the order of the released files. `*` stands for weight and bias.
STEM = ("patch_embed.proj.*", "embeddings.projection.*")
DOWNSAMPLE = ("network.{place}.proj.*", "encoder.stages.{stage}.downsample.*")
BLOCK = (
    ("network.{place}.{layer}.layer_scale_1", "encoder.stages.{stage}.layers.{layer}.layer_scale1"),
    ("network.{place}.{layer}.layer_scale_2", "encoder.stages.{stage}.layers.{layer}.layer_scale2"),
    ("network.{place}.{layer}.norm1.*", "encoder.stages.{stage}.layers.{layer}.norm1.*"),
    ("network.{place}.{layer}.token_mixer.sim_alpha", "encoder.stages.{stage}.layers.{layer}.clustering.sim_alpha"),
    ("network.{place}.{layer}.token_mixer.sim_beta", "encoder.stages.{stage}.layers.{layer}.clustering.sim_beta"),
    ("network.{place}.{layer}.token_mixer.conv1.*", "encoder.stages.{stage}.layers.{layer}.clustering.point.*"),
    ("network.{place}.{layer}.token_mixer.conv2.*", "encoder.stages.{stage}.layers.{layer}.clustering.projection.*"),
    ("network.{place}.{layer}.token_mixer.conv_c.*", "encoder.stages.{stage}.layers.{layer}.clustering.query.*"),
    ("network.{place}.{layer}.token_mixer.conv_v.*", "encoder.stages.{stage}.layers.{layer}.clustering.key.*"),
    ("network.{place}.{layer}.token_mixer.conv_f.*", "encoder.stages.{stage}.layers.{layer}.clustering.value.*"),
    ("network.{place}.{layer}.norm2.*", "encoder.stages.{stage}.layers.{layer}.norm2.*"),
    ("network.{place}.{layer}.mlp.fc1.*", "encoder.stages.{stage}.layers.{layer}.mlp.fc1.*"),
    ("network.{place}.{layer}.mlp.fc2.*", "encoder.stages.{stage}.layers.{layer}.mlp.fc2.*"),
)
STAGE_NORM = ("norm{place}.*", "hidden_states_norms.stage{number}.*")
LAST_NORM = ("norm.*", "hidden_states_norms.stage{number}.*")


class ConversionError(ValueError):
    """Input that cannot be converted; the message names what and where."""


@dataclass(frozen=True)
class Layout:
    """
    Which part of the released model a checkpoint holds: the framework's whole classifier, with a norm after each stage,
    or the backbone used alone, with one norm and a head of its own.
    """

    name: str
    prefix: str  # of the backbone's keys
    has_stage_norms: bool
    head: tuple[str, str]
    classifier_pooling: str  # of our config


FRAMEWORK = Layout("framework", "backbone.", True, ("head.fc.*", "classifier.*"), "stages")
STANDALONE = Layout("standalone", "", False, ("head.*", "classifier.*"), "centers")


def key_names(layout: Layout, depths: list[int]) -> dict[str, str]:
    """Every key of a released checkpoint, in the file's order, and the same tensor's key in our image classifier."""
    pairs = [STEM]
    for stage, depth in enumerate(depths):
        place = {"stage": stage, "number": stage + 1, "place": 2 * stage}
        if stage > 0:
            pairs += formatted([DOWNSAMPLE], stage=stage, place=2 * stage - 1)
        for layer in range(depth):
            pairs += formatted(BLOCK, layer=layer, **place)
    if layout.has_stage_norms:
        for stage in range(len(depths)):
            pairs += formatted([STAGE_NORM], place=2 * stage, number=stage + 1)
    else:
        pairs += formatted([LAST_NORM], number=len(depths))
    pairs = [(layout.prefix + released, "clusterformer." + ours) for released, ours in pairs] + [layout.head]
    return {
        released.replace("*", end): ours.replace("*", end)
        for released, ours in pairs
        for end in (["weight", "bias"] if released.endswith("*") else [""])
    }


def formatted(pairs: Iterable[tuple[str, str]], **places: int) -> list[tuple[str, str]]:
    return [(released.format(**places), ours.format(**places)) for released, ours in pairs]


def parameter_shapes(config: ClusterFormerConfig) -> dict[str, torch.Size]:
    """Keys and shapes of our image classifier with this config."""
    with torch.device("meta"):
        model = ClusterFormerForImageClassification(config)
    return {key: value.shape for key, value in model.state_dict().items()}


def check_keys(state_dict: dict[str, torch.Tensor], expected: dict[str, torch.Size]):
    """Raises [`ConversionError`] naming every key of `state_dict` that is missing, unknown or of another shape."""
    problems = {
        "Missing keys": [f"`{key}`" for key in expected if key not in state_dict],
        "Unknown keys": [f"`{key}`" for key in state_dict if key not in expected],
        "Wrong shapes": [
            f"`{key}` is {tuple(value.shape)} and not {tuple(expected[key])}"
            for key, value in state_dict.items()
            if key in expected and value.shape != expected[key]
        ],
    }
    problems = [f"{problem}: {listing(keys)}." for problem, keys in problems.items() if keys]
    if problems:
        raise ConversionError(" ".join(problems))


def listing(entries: Iterable[str], limit: int = 20) -> str:
    """The entries separated by commas; how many more there are after the first `limit`."""
    entries = list(entries)
    return ", ".join(entries[:limit]) + (f" and {len(entries) - limit} more" if len(entries) > limit else "")
