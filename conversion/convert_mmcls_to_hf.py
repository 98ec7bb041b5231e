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
Converts a checkpoint of the released ClusterFormer to a folder for `from_pretrained`.

    python conversion/convert_mmcls_to_hf.py --checkpoint cluster_tiny.pth --variant tiny --clustering release \
        --output-dir clusterformer-tiny-released

The weights say everything but the centre grid, the window grid and the number of iterations. These are the variant's
own, or those of the authors' config, in the checkpoint or given by `--config`, or given by `--config-overrides`.
`conversion_report.json` lists every key and what became of it. Nothing in the checkpoint or the config is run.
"""

import dataclasses
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from mmcls_checkpoint import ReleasedCheckpoint, fields_from_shapes, read_checkpoint
from mmcls_config import VARIANTS, AuthorsConfig, interpret, read_config_file, read_config_text
from mmcls_keys import ConversionError, check_keys, key_names, parameter_shapes
from transformers import ConvNextImageProcessor, HfArgumentParser, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from clusterformer_hf import ClusterFormerConfig, ClusterFormerForImageClassification
from clusterformer_hf.configuration_clusterformer import as_pair
from clusterformer_hf.hub import HubError, check_repo_id, export_repository, publish
from clusterformer_hf.model_card import RECORD_NAME, TrainingRecord, describe, name_classes
from clusterformer_hf.modeling_clusterformer import check_released_input


# Which the weights do not say.
GEOMETRY = ("center_grid", "window_grid", "num_iterations")
EXAMPLES = {"center_grid": [10, 10, 10, 10], "window_grid": [32, 16, 8, 4], "num_iterations": 3}
SHAPE_FIELDS = ("depths", "hidden_sizes", "num_attention_heads", "head_dim", "mlp_ratios", "patch_size")


@dataclass
class ConversionArguments:
    """Converts a checkpoint of the released ClusterFormer to a folder for `from_pretrained`."""

    checkpoint: str = field(metadata={"help": "The framework's checkpoint, or a state dict, also as .safetensors."})
    output_dir: str = field(metadata={"help": "Folder to write; made if it is missing."})
    variant: Literal["tiny", "small", "auto"] = field(
        default="auto", metadata={"help": "The released model. `auto` tells it by the shapes of the weights."}
    )
    clustering: Literal["release", "release_flash"] = field(
        default="release", metadata={"help": "Form of the code that trained it, October or November 2023."}
    )
    config: str | None = field(default=None, metadata={"help": "The authors' config file. It is read and not run."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "JSON with config fields, such as '{\"center_grid\": [3, 3, 3, 3]}'."}
    )
    labels: str | None = field(
        default=None, metadata={"help": "Class names: a text file with one a line, or a JSON list or id2label."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository on the Hub to upload the result to."})


def convert(arguments: ConversionArguments) -> dict:
    """
    Converts and writes; returns the report.

    Raises:
        [`ConversionError`]: if anything does not fit. Nothing is written then.
    """
    output_dir = Path(arguments.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ConversionError(f"--output-dir {output_dir} is a file.")
    try:
        if arguments.push_to_hub is not None:
            check_repo_id(arguments.push_to_hub)  # now and not after the work
    except ValueError as error:
        raise ConversionError(f"--push-to-hub: {error}") from error
    checkpoint = read_checkpoint(arguments.checkpoint)
    fields = fields_from_shapes(checkpoint)
    report = {
        "checkpoint": arguments.checkpoint,
        "layout": checkpoint.layout.name,
        "clustering": arguments.clustering,
        "settings": {},
        "converted": {},
        "left_out": dict(checkpoint.left_out),
        "authors_config": {},
    }
    sources = read_authors_configs(arguments, checkpoint, fields, report)
    settings = choose_settings(arguments, fields, sources, report)
    labels = choose_labels(arguments.labels, checkpoint.meta, fields["num_labels"], report)
    config = build_config(arguments.clustering, checkpoint, fields, settings, labels)
    model = build_model(checkpoint, config, report)
    processor = build_image_processor(config, sources)
    write(model, processor, report, output_dir)
    if arguments.push_to_hub is not None:
        upload(model, processor, output_dir, arguments.push_to_hub)
    return report


def upload(model, processor, output_dir: Path, repo_id: str):
    """Makes the repository of what was written, with its model card, and publishes it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            publish(export_repository(model, processor, folder, repo_id, record=output_dir / RECORD_NAME), repo_id)
    except HubError as error:
        raise ConversionError(f"The model is in {output_dir}. {error}") from error


def read_authors_configs(arguments, checkpoint: ReleasedCheckpoint, fields: dict, report: dict) -> list[AuthorsConfig]:
    """What the config in the checkpoint and the one of `--config` say, in this order."""
    sources = []
    text = checkpoint.meta.get("config")
    if isinstance(text, str):
        try:
            values = read_config_text(text, "meta.config")
            sources.append(interpret(values, "meta.config", fields, checkpoint.layout))
            report["authors_config"]["meta.config"] = sources[-1].entries
        except ConversionError as error:  # only a record, which the command line can replace
            report["authors_config"]["meta.config"] = f"left out: {error}"
    if arguments.config is not None:
        values = read_config_file(arguments.config)
        sources.append(interpret(values, arguments.config, fields, checkpoint.layout))
        report["authors_config"][arguments.config] = sources[-1].entries
    return sources


def choose_settings(arguments, fields: dict, sources: list[AuthorsConfig], report: dict) -> dict:
    """Config fields beyond the shapes: the variant's, then the authors' configs', then the overrides."""
    overrides = read_overrides(arguments.config_overrides)
    variant = find_variant(arguments.variant, fields, overrides)
    settings = variant_fields(variant, GEOMETRY) if variant else {}
    origins = dict.fromkeys(settings, f"variant {variant}")
    for source in sources:
        found = dict(source.settings)
        if source.variant is not None and not differences(source.variant, fields, {}):
            found = {**variant_fields(source.variant, GEOMETRY), **found}
        settings.update(found)
        origins.update(dict.fromkeys(found, source.name))
    settings.update(overrides)
    origins.update(dict.fromkeys(overrides, "--config-overrides"))
    missing = [name for name in GEOMETRY if name not in settings]
    if missing:
        raise ConversionError(
            f"The weights do not say {', '.join(missing)}, and their shapes are those of no released model. Give the "
            "authors' config by --config, or the values by --config-overrides as in "
            f"'{json.dumps({name: EXAMPLES[name] for name in missing})}'."
        )
    report["settings"] = {name: f"{settings[name]} ({origins[name]})" for name in settings}
    return settings


def read_overrides(text: str | None) -> dict:
    if text is None:
        return {}
    try:
        overrides = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConversionError(f"--config-overrides is no JSON ({error}): {text}") from error
    if not isinstance(overrides, dict):
        raise ConversionError(f"--config-overrides needs a JSON object such as '{{\"num_iterations\": 3}}', got {text}")
    known = {entry.name for entry in dataclasses.fields(ClusterFormerConfig)} | {"out_features", "out_indices"}
    unknown = [name for name in overrides if name not in known or name.startswith("_")]
    if unknown:
        raise ConversionError(f"--config-overrides names {unknown}, which are no fields of ClusterFormerConfig.")
    return overrides


def find_variant(variant: str, fields: dict, overrides: dict) -> str | None:
    """The released model that the weights are of; `None` if they are of another with `auto`."""
    if variant == "auto":
        return next((name for name in VARIANTS if not differences(name, fields, {})), None)
    differing = differences(variant, fields, overrides)
    if differing:
        raise ConversionError(
            f"The checkpoint is no {variant}: {'; '.join(differing)}. For another model use --variant auto with "
            "--config or --config-overrides."
        )
    return variant


def differences(variant: str, fields: dict, overrides: dict) -> list[str]:
    """In which of the fields that the weights decide they differ from a variant with these overrides."""
    expected = {**variant_fields(variant, SHAPE_FIELDS), **overrides}
    return [
        f"{name} is {fields[name]} and not {expected[name]}" for name in SHAPE_FIELDS if fields[name] != expected[name]
    ]


def variant_fields(variant: str, names: tuple[str, ...]) -> dict:
    config = VARIANTS[variant]()
    return {name: getattr(config, name) for name in names}


def choose_labels(path: str | None, meta: dict, num_labels: int, report: dict) -> list[str] | None:
    """Class names from `--labels`, else from the checkpoint's metadata; reports what became of the metadata."""
    for name in meta:
        report["left_out"][f"meta.{name}"] = "record of the training"
    if isinstance(meta.get("config"), str):
        report["left_out"]["meta.config"] = "see authors_config"
    classes = meta.get("CLASSES")
    labels, source = (read_labels(path), path) if path is not None else (classes, "meta.CLASSES of the checkpoint")
    if labels is None:
        return None
    if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) for label in labels):
        raise ConversionError(f"{source} is no list of class names; give one by --labels.")
    if len(labels) != num_labels:
        raise ConversionError(f"{source} names {len(labels)} classes, but the checkpoint has {num_labels}.")
    if classes is not None:
        report["left_out"]["meta.CLASSES"] = f"replaced by {path}"
    if path is None:
        del report["left_out"]["meta.CLASSES"]
        report["converted"]["meta.CLASSES"] = "config.id2label"
    return list(labels)


def read_labels(path: str) -> list[str]:
    """Class names in the order of their ids, from a text file, a JSON list or a JSON object id -> name."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        labels = json.loads(text) if path.endswith(".json") else text.splitlines()
    except (OSError, ValueError) as error:
        raise ConversionError(f"--labels {path} cannot be read: {error}.") from error
    if isinstance(labels, dict):
        ids = [str(number) for number in range(len(labels))]
        if set(ids) != set(labels):
            raise ConversionError(
                f"--labels {path} needs the ids 0 to {len(labels) - 1} as keys, got {list(labels)[:20]}."
            )
        labels = [labels[number] for number in ids]
    return labels


def build_config(clustering: str, checkpoint, fields: dict, settings: dict, labels) -> ClusterFormerConfig:
    names = {"num_labels": fields["num_labels"]}
    if labels is not None:
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: idx for idx, label in enumerate(labels)}}
    fields = {name: fields[name] for name in SHAPE_FIELDS}
    pooling = {"clustering": clustering, "classifier_pooling": checkpoint.layout.classifier_pooling}
    try:
        config = ClusterFormerConfig.released_tiny(**{**fields, **pooling, **names, **settings})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"The config does not come out right: {error}") from error
    if config.clustering == "recurrent":
        raise ConversionError("clustering='recurrent' is another model than the released one.")
    if "image_size" not in settings:
        # 224, which the released configs say, cannot be cut into their windows: the next larger size that can.
        multiple = size_multiple(config)
        config.image_size = -(-224 // multiple) * multiple
    try:
        check_released_input(config, torch.empty(1, 3, *as_pair(config.image_size), device="meta"), None)
    except ValueError as error:
        raise ConversionError(f"image_size={config.image_size}: {error}") from error
    return config


def size_multiple(config: ClusterFormerConfig) -> int:
    """Sides of a square image must be multiples of this for the windows of every stage to be whole."""
    strides = []
    for stage, windows in enumerate(map(as_pair, config.window_grid)):
        if min(windows) > 1:
            strides += [config.patch_size * 2**stage * number for number in windows]
    return math.lcm(*strides)


def build_model(checkpoint, config: ClusterFormerConfig, report: dict) -> ClusterFormerForImageClassification:
    """The image classifier with the checkpoint's own tensors, after all keys and shapes are found to fit."""
    names, shapes = key_names(checkpoint.layout, config.depths), parameter_shapes(config)
    expected = {released: shapes.pop(ours) for released, ours in names.items() if ours in shapes}
    check_keys(checkpoint.state_dict, {**expected, **shapes})
    with torch.device("meta"):
        model = ClusterFormerForImageClassification(config)
    model.load_state_dict({names[key]: value for key, value in checkpoint.state_dict.items()}, assign=True)
    for key, name in checkpoint.file_keys.items():
        report["converted"][name] = names[key]
    return model.eval()


def build_image_processor(config: ClusterFormerConfig, sources: list[AuthorsConfig]):
    """
    The released evaluation, at the config's image size: the short side resized to 248/224 of the crop, bicubic, centre
    crop, ImageNet's mean and standard deviation. ConvNeXt's processor does exactly this below 384 pixels, and resizes
    without a crop from there on; ViT's does that for sizes that are not square.
    """
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    for source in sources:
        mean, std = source.image_mean or mean, source.image_std or std
    if len(mean) != config.num_channels:
        raise ConversionError(
            f"num_channels={config.num_channels} needs an `img_norm_cfg` with as many means in --config, not {mean}."
        )
    common = {"resample": PILImageResampling.BICUBIC, "image_mean": list(mean), "image_std": list(std)}
    height, width = as_pair(config.image_size)
    if height == width:
        return ConvNextImageProcessor(size={"shortest_edge": height}, crop_pct=224 / 248, **common)
    return ViTImageProcessor(size={"height": height, "width": width}, **common)


def write(model, processor, report: dict, output_dir: Path):
    """Writes everything into a temporary folder beside `output_dir` first: a full disk leaves nothing behind."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        TrainingRecord(
            description=f"{describe(model)} Converted from a checkpoint of the authors' code.",
            limits=name_classes(model),
            data="The checkpoint does not say what it was trained on.",
        ).save(Path(folder, RECORD_NAME), model)
        Path(folder, "conversion_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        output_dir.mkdir(exist_ok=True)
        for file in Path(folder).iterdir():
            os.replace(file, output_dir / file.name)


def print_report(report: dict):
    for key, name in report["converted"].items():
        print(f"{key} -> {name}")
    for key, reason in report["left_out"].items():
        print(f"{key}: left out, {reason}")
    for name, entries in report["authors_config"].items():
        print(f"{name}: {entries if isinstance(entries, str) else ''}")
        for entry, outcome in entries.items() if isinstance(entries, dict) else ():
            print(f"  {entry}: {outcome}")
    for name, value in report["settings"].items():
        print(f"config.{name} = {value}")
    print(f"{len(report['converted'])} keys converted, {len(report['left_out'])} left out.")


def main(args: list[str] | None = None):
    (arguments,) = HfArgumentParser(ConversionArguments).parse_args_into_dataclasses(args)
    print_report(convert(arguments))


if __name__ == "__main__":
    try:
        main()
    except ConversionError as error:
        sys.exit(f"error: {error}")
