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
Converts an image classifier with a released form of clustering back to a checkpoint of the released code.

    python conversion/convert_hf_to_mmcls.py --model clusterformer-tiny-released --output cluster_tiny.pth

The way back is bit-exact: the checkpoint has the keys, dtypes and values that `convert_mmcls_to_hf.py` started from.
`meta` holds the class names and a config for the authors' code.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmcls_config import config_text
from mmcls_keys import FRAMEWORK, STANDALONE, ConversionError, check_keys, key_names, parameter_shapes
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, HfArgumentParser
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from clusterformer_hf import ClusterFormerConfig


# Fields of our config that change the result and that the released code has no argument for.
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}


@dataclass
class ConversionArguments:
    """Converts an image classifier with a released form of clustering back to a checkpoint of the released code."""

    model: str = field(metadata={"help": "Folder with the model, or a repository on the Hub."})
    output: str = field(metadata={"help": "Checkpoint file to write, .pth."})


def convert(arguments: ConversionArguments) -> dict[str, str]:
    """
    Converts and writes; returns each key of the checkpoint and the key that it comes from.

    Raises:
        [`ConversionError`]: if anything does not fit. Nothing is written then.
    """
    output = Path(arguments.output)
    if output.suffix == ".safetensors" or output.is_dir():
        raise ConversionError(f"--output {output} must be a .pth file: the framework reads no other.")
    try:
        config = AutoConfig.from_pretrained(arguments.model)
        weights = load_weights(arguments.model)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConversionError(f"--model {arguments.model} cannot be read: {error}") from error
    if not isinstance(config, ClusterFormerConfig) or config.clustering == "recurrent":
        name = getattr(config, "clustering", config.model_type)
        raise ConversionError(f"--model {arguments.model} is `{name}`: only the released forms have a way back.")
    for name, value in FIXED.items():
        if getattr(config, name) != value:
            raise ConversionError(
                f"--model {arguments.model} has {name}={getattr(config, name)!r}, which a checkpoint of the released "
                f"code cannot say: there it is always {value!r}."
            )

    layout = FRAMEWORK if config.classifier_pooling == FRAMEWORK.classifier_pooling else STANDALONE
    check_keys(weights, parameter_shapes(config))
    names = key_names(layout, config.depths)
    meta = {"config": config_text(config, layout)}
    labels = [config.id2label[idx] for idx in range(config.num_labels)]
    if labels != [f"LABEL_{idx}" for idx in range(config.num_labels)]:  # which transformers makes up
        meta["CLASSES"] = labels
    write({"meta": meta, "state_dict": {released: weights[ours] for released, ours in names.items()}}, output)
    return names


def load_weights(model: str) -> dict[str, torch.Tensor]:
    """The tensors as they are in the files, which `from_pretrained` might cast to one dtype."""
    index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = [SAFE_WEIGHTS_NAME]
    if index is not None:
        files = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    weights = {}
    for file in files:
        weights.update(load_file(cached_file(model, file)))
    return weights


def write(checkpoint: dict, output: Path):
    """Writes a temporary file beside `output` first: a full disk leaves nothing behind."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        file = Path(folder, output.name)
        torch.save(checkpoint, file)
        os.replace(file, output)


def main(args: list[str] | None = None):
    (arguments,) = HfArgumentParser(ConversionArguments).parse_args_into_dataclasses(args)
    names = convert(arguments)
    for released, ours in names.items():
        print(f"{ours} -> {released}")
    print(f"{len(names)} keys converted, 0 left out.")


if __name__ == "__main__":
    try:
        main()
    except ConversionError as error:
        sys.exit(f"error: {error}")
