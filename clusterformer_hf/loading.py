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
"""The model and the image processor that a training script starts from."""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from .configuration_clusterformer import ClusterFormerConfig
from .modeling_clusterformer import ClusterFormerPreTrainedModel
from .provenance import public_name


logger = logging.getLogger(__name__)

# Weights of one part that messages name one by one.
MAX_NAMED = 3
# Of COCO's usual 800 and 1333.
LONGEST_TO_SHORTEST = 5 / 3


@dataclass
class ModelArguments:
    """Which model is trained or evaluated."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from. Without it a new ClusterFormer-Tiny is trained."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model's own code from the Hub."})
    config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": 'Config fields as JSON, for instance \'{"depths": [1, 1, 2, 1], "drop_path_rate": 0.1}\'.'},
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start with a new head where the checkpoint's has other classes."}
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if not the checkpoint's."}
    )

    def __post_init__(self):
        if isinstance(self.config_overrides, str):
            try:
                self.config_overrides = json.loads(self.config_overrides)
            except ValueError as error:
                raise ValueError(f"--config_overrides {self.config_overrides!r} is no JSON: {error}") from error
        self.config_overrides = self.config_overrides or {}

    @property
    def resizes(self) -> bool:
        """Whether pictures of another size than the checkpoint's are asked for."""
        return "image_size" in self.config_overrides

    @property
    def loading(self) -> dict:
        """What every `from_pretrained` of the checkpoint takes."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}


def load_config(args: ModelArguments) -> PreTrainedConfig:
    """The checkpoint's config, or that of ClusterFormer-Tiny, with the fields that are overridden."""
    if args.model_name_or_path is None:
        config = ClusterFormerConfig()
    else:
        config = AutoConfig.from_pretrained(args.model_name_or_path, **args.loading)
    if not args.config_overrides:
        return config
    unknown = [name for name in args.config_overrides if not hasattr(config, name)]
    if unknown:
        raise ValueError(f"--config_overrides: {', '.join(unknown)} is no field of {type(config).__name__}.")
    # Made anew, so that the fields are checked against each other and, of a new model, defaults follow from them.
    fields = {} if args.model_name_or_path is None else config.to_dict()
    return type(config).from_dict(fields | args.config_overrides)


def load_model(auto_model: type, args: ModelArguments, config: PreTrainedConfig, do_train: bool) -> PreTrainedModel:
    """
    A model of the config, with the checkpoint's weights where there is one. Says which are the checkpoint's, which are
    new and which are not used: a checkpoint of another task gives its backbone.

    Raises:
        `ValueError`: if nothing is the checkpoint's, or if the model is not trained and something would be new.
    """
    if args.model_name_or_path is None:
        if not do_train:
            raise ValueError("--do_eval alone needs --model_name_or_path: there is nothing to evaluate.")
        return auto_model.from_config(config)
    model, report = auto_model.from_pretrained(
        args.model_name_or_path,
        config=config,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        output_loading_info=True,
        **args.loading,
    )
    new = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    kept = {name for name, _ in model.named_parameters()} - new
    if not kept:
        raise ValueError(f"{args.model_name_or_path} holds no weights of {type(model).__name__}.")
    if new and not do_train:
        raise ValueError(
            f"{args.model_name_or_path} cannot be evaluated as {type(model).__name__}: it has no {summarise(new)}."
        )
    logger.info(f"Taken from {args.model_name_or_path}: {summarise(kept)}.")
    if new:
        logger.warning(f"Newly initialised, not from {args.model_name_or_path}: {summarise(new)}.")
    if report["unexpected_keys"]:
        logger.warning(f"Not used of {args.model_name_or_path}: {summarise(report['unexpected_keys'])}.")
    return model


def name_auto_classes(model: PreTrainedModel, *auto_classes: type):
    """
    Lets these Auto classes load a ClusterFormer from its folder where this package is not installed, and no others.
    `save_pretrained` alone would name the model's own one, and keep those of the checkpoint that it came from.
    """
    if isinstance(model, ClusterFormerPreTrainedModel):
        name = f"{type(model).__module__.split('.')[-1]}.{type(model).__name__}"
        model.config.auto_map = {auto_class.__name__: name for auto_class in auto_classes}


def summarise(names: Iterable[str]) -> str:
    """Names of weights, or their number where a part of the model has many."""
    parts = defaultdict(list)
    for name in sorted(names):
        parts[name.split(".")[0]].append(name)
    return ", ".join(
        f"{part}.* ({len(found)} weights)" if len(found) > MAX_NAMED else ", ".join(found)
        for part, found in parts.items()
    )


def load_image_processor(args: ModelArguments) -> BaseImageProcessor | None:
    """The image processor that is named, or the checkpoint's; None if there is none."""
    if args.image_processor_name is not None:
        return AutoImageProcessor.from_pretrained(args.image_processor_name)
    if args.model_name_or_path is None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(args.model_name_or_path, **args.loading)
    except OSError:
        logger.warning(f"{args.model_name_or_path} has no image processor; a new one is made.")
        return None


def load_fitting_image_processor(
    args: ModelArguments, config: PreTrainedConfig, fits: Callable | None, new: Callable
) -> BaseImageProcessor:
    """
    The image processor that is named; or the checkpoint's, if it is for the task and `args` ask for no other size; or a
    new one, with the checkpoint's mean and standard deviation where only the size is another.

    Args:
        fits: Whether an image processor is for the task; None if any is, and a new one suits any model.
        new: Makes one from the config, of a ClusterFormer where not any is for the task.

    Raises:
        `ValueError`: if the one that is named is for another task or contradicts the `image_size` of
            `config_overrides`, or one would have to be made for another model.
    """
    image_processor = load_image_processor(args)
    is_fitting = image_processor is not None and (fits is None or fits(image_processor))
    if args.image_processor_name is not None:
        _check_named(args, image_processor, is_fitting)
        return image_processor
    if is_fitting and not args.resizes:
        return image_processor
    if fits is not None and config.model_type != ClusterFormerConfig.model_type:
        raise ValueError(f"A {config.model_type} model needs the image processor of its kind: --image_processor_name.")
    made = new(config)
    if is_fitting:
        made.image_mean, made.image_std = image_processor.image_mean, image_processor.image_std
        sizes = f"{dict(made.size)} is made; the checkpoint's is {dict(image_processor.size)}"
        logger.warning(f"A new image processor of size {sizes}.")
    elif image_processor is not None:
        logger.warning(f"A new image processor is made: {type(image_processor).__name__} is for another task.")
    return made


def _check_named(args: ModelArguments, image_processor: BaseImageProcessor, is_fitting: bool):
    name = args.image_processor_name
    if not is_fitting:
        raise ValueError(
            f"--image_processor_name {name} holds a {type(image_processor).__name__}, which is for another task."
        )
    if "image_size" not in args.config_overrides:
        return
    image_size = args.config_overrides["image_size"]
    is_cropped = getattr(image_processor, "do_center_crop", False)
    size = dict(image_processor.crop_size if is_cropped else image_processor.size)
    if min(size.values()) != (image_size if isinstance(image_size, int) else min(image_size)):
        raise ValueError(
            f"--image_processor_name {name} makes pictures of the size {size}, --config_overrides says image_size "
            f"{image_size}: leave out one of them."
        )


def proportional_size(config: PreTrainedConfig) -> dict[str, int]:
    """
    An image processor's size that keeps proportions: `image_size` is the shorter side, and the longer one is at most
    5/3 of it, as 800 and 1333 are for COCO; two numbers are the shortest and longest side.
    """
    size = config.image_size
    shortest, longest = (size, round(size * LONGEST_TO_SHORTEST)) if isinstance(size, int) else sorted(size)
    return {"shortest_edge": shortest, "longest_edge": longest}


def describe(model: PreTrainedModel, args: ModelArguments) -> str:
    """A model card's paragraph on a trained model."""
    source = args.model_name_or_path
    origin = f"fine-tuned from `{public_name(source)}`" if source else "trained from scratch"
    return (
        f"`{type(model).__name__}` with {model.num_parameters():,} parameters, {origin}. "
        "ClusterFormer: [Clustering As A Universal Visual Learner](https://arxiv.org/abs/2309.13196)."
    )
