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
The authors' config files, read without running them: assignments of literals and of `dict(...)`, and `_base_` files.

Only `model.backbone` and `img_norm_cfg` matter for a conversion.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path

from mmcls_keys import FRAMEWORK, ConversionError

from clusterformer_hf import ClusterFormerConfig
from clusterformer_hf.configuration_clusterformer import as_pair


# The authors' two registered models, and ours of their shape.
VARIANTS = {"tiny": ClusterFormerConfig.released_tiny, "small": ClusterFormerConfig.released_small}
TYPES = {"cluster_tiny": "tiny", "cluster_small": "small"}

# Arguments of the released backbone: which of our fields each one sets,
SETTINGS = {
    "num_clustering": "num_iterations",
    "drop_path_rate": "drop_path_rate",
    "drop_rate": "hidden_dropout_prob",
    "layer_scale_init_value": "layer_scale_init_value",
}
# or each pair, whose first entry counts the rows,
GRIDS = {"center_grid": ("center_w", "center_h"), "window_grid": ("window_w", "window_h")}
# or which field, known from the weights already, it must agree with;
SHAPES = {
    "layers": "depths",
    "embed_dims": "hidden_sizes",
    "heads": "num_attention_heads",
    "head_dim": "head_dims",
    "mlp_ratios": "mlp_ratios",
    "in_patch_size": "patch_size",
    "in_stride": "patch_size",
}
# the only values that the released checkpoints and this model know;
CONSTANTS = {
    "in_pad": 0,
    "down_patch_size": 3,
    "down_stride": 2,
    "down_pad": 1,
    "use_layer_scale": True,
    "return_center": False,
}
# and those that change nothing once there are weights.
WITHOUT_EFFECT = ("style", "init_cfg", "pretrained", "img_w", "img_h", "num_classes", "downsamples")


@dataclass
class AuthorsConfig:
    """
    Args:
        name (`str`): Where it comes from.
        settings (`dict`): Fields of our config.
        variant (`str` or `None`): `"tiny"` or `"small"`, if the backbone is of that registered type.
        image_mean, image_std (`list[float]` or `None`): The normalisation of pixels in [0, 1].
        entries (`dict[str, str]`): What became of each entry.
    """

    name: str
    settings: dict = field(default_factory=dict)
    variant: str | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    entries: dict[str, str] = field(default_factory=dict)


class Unreadable:
    """
    An expression that is neither a literal nor `dict(...)`, or what a name holds after a statement that is not read.

    Args:
        node (`ast.AST`): The expression or the statement.
        names (`dict`): Those assigned before; the values of those that `node` mentions may be parts of its own.
    """

    def __init__(self, node: ast.AST, names: dict):
        self.text, self.line = ast.unparse(node).split("\n")[0], node.lineno
        self.is_statement = isinstance(node, ast.stmt)
        self.parts = [names[name] for name in mentioned(node) if name in names]

    def describe(self, path: str) -> str:
        if self.is_statement:
            return f"`{path}`, which line {self.line}, `{self.text}`, may have changed"
        return f"`{path}={self.text}` in line {self.line}, which is no literal"


def read_config_file(path: str | Path, extended_by: tuple[Path, ...] = ()) -> dict:
    """
    The names that a config file assigns, with those of its `_base_` files, whose dicts it extends.

    Args:
        path (`str` or `Path`): The file.
        extended_by (`tuple[Path, ...]`): The files whose `_base_` led to it.

    Raises:
        [`ConversionError`]: if a file is missing, no Python or its own `_base_`, or changes `model` in another way than
            by assignments.
    """
    path = Path(path)
    if path.resolve() in extended_by:
        raise ConversionError(f"The config {path} is a `_base_` of itself.")
    if not path.is_file():
        raise ConversionError(f"There is no config file {path}.")
    values = read_config_text(path.read_bytes(), str(path))
    merged = {}
    bases = values.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConversionError(f"The config {path} has a `_base_` that is no list of file names.")
    for base in bases:
        merged = merge(merged, read_config_file(path.parent / base, (*extended_by, path.resolve())))
    return merge(merged, values)


def read_config_text(text: str | bytes, name: str) -> dict:
    """
    The names that the text of a config assigns; those that other statements may change are [`Unreadable`].

    Args:
        text (`str` or `bytes`): The config.
        name (`str`): For messages.

    Raises:
        [`ConversionError`]: if it is no Python, or may change `model` in another way than by assignments.
    """
    try:
        statements = ast.parse(text, name).body
    except (SyntaxError, ValueError) as error:
        raise ConversionError(f"The config {name} is no Python: {error}.") from error
    values = {}
    for statement in statements:
        changed = sharing(may_change(statement), values)
        if "model" in changed:
            raise ConversionError(
                f"The config {name} may change `model` in line {statement.lineno}, `{ast.unparse(statement)}`: it can "
                "be read only if `model = dict(...)` says it all."
            )
        assigned = {}
        if assigns_names(statement):
            assigned = dict.fromkeys((target.id for target in statement.targets), evaluate(statement.value, values))
        values.update({**dict.fromkeys(changed, Unreadable(statement, {})), **assigned})
    return values


def assigns_names(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and all(isinstance(target, ast.Name) for target in statement.targets)


def may_change(statement: ast.stmt) -> set[str]:
    """Names that a statement, which is not run, may change beside those that it plainly assigns."""
    parts = [statement]
    if assigns_names(statement):
        # `dict(...)` leaves its arguments alone; any other call may do anything to them.
        parts = [node for node in ast.walk(statement.value) if isinstance(node, (ast.Call, ast.NamedExpr))]
        parts = [node for node in parts if not is_dict_call(node)]
    return set().union(*map(mentioned, parts))


def mentioned(node: ast.AST) -> set[str]:
    """The names in a statement or an expression, those that imports and definitions assign included."""
    values = [getattr(part, name, None) for part in ast.walk(node) for name in ("id", "name", "asname", "rest")]
    return {value for value in values if isinstance(value, str)}


def sharing(names: set[str], values: dict) -> set[str]:
    """`names`, and those of `values` that share a dict or list with one; all of `values` after `import *`."""
    if "*" in names:
        return names | set(values)
    parts = {part for name in names for part in mutable_parts(values.get(name))}
    return names | {name for name, value in values.items() if not parts.isdisjoint(mutable_parts(value))}


def mutable_parts(value):
    """The identity of every dict and list in a value."""
    if isinstance(value, (dict, list)):
        yield id(value)
    entries = value.parts if isinstance(value, Unreadable) else value.values() if isinstance(value, dict) else value
    for entry in entries if isinstance(value, (dict, list, Unreadable)) else ():
        yield from mutable_parts(entry)


def is_dict_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict"


def evaluate(node: ast.AST, names: dict):
    """The value of a literal, of `dict(...)` and of names assigned before; anything else is [`Unreadable`]."""
    if isinstance(node, (ast.List, ast.Tuple)):
        return [evaluate(entry, names) for entry in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {key.value: evaluate(value, names) for key, value in zip(node.keys, node.values)}
    if is_dict_call(node) and not node.args:
        if all(keyword.arg is not None for keyword in node.keywords):
            return {keyword.arg: evaluate(keyword.value, names) for keyword in node.keywords}
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return Unreadable(node, names)


def merge(base: dict, update: dict) -> dict:
    """`update` over `base`, dicts entry by entry unless they say `_delete_=True`, as the framework does."""
    merged = dict(base)
    for key, value in update.items():
        if isinstance(value, dict):
            extends = isinstance(base.get(key), dict) and not value.get("_delete_")
            value = merge(base[key] if extends else {}, value)
        merged[key] = value
    merged.pop("_delete_", None)
    return merged


def interpret(values: dict, name: str, fields: dict, layout) -> AuthorsConfig:
    """
    What a config means for the model whose weights say `fields`.

    Args:
        values (`dict`): From [`read_config_file`].
        name (`str`): Of the config, for messages.
        fields (`dict`): From `fields_from_shapes`.
        layout (`Layout`): Of the checkpoint.

    Raises:
        [`ConversionError`]: if there is no `model.backbone`, an entry contradicts the weights or cannot be read, or
            `img_norm_cfg` cannot be read.
    """
    model = values.get("model")
    backbone = model.get("backbone") if isinstance(model, dict) else None
    for path, value in (("model", model), ("model.backbone", backbone)):
        if isinstance(value, Unreadable):
            refuse_unreadable(value, path, name)
    if not isinstance(backbone, dict):
        raise ConversionError(f"The config {name} has no readable `model = dict(backbone=dict(...))`.")
    config = AuthorsConfig(name)
    for key, value in backbone.items():
        refuse_unreadable(value, f"model.backbone.{key}", name)
        config.entries[f"model.backbone.{key}"] = interpret_entry(key, value, fields, layout, config, name)
    for grid, sides in GRIDS.items():
        given = [backbone.get(side) for side in sides]
        if given == [None, None]:
            continue
        if not all(isinstance(side, list) and len(side) == len(fields["depths"]) for side in given):
            raise ConversionError(
                f"The config {name} needs `model.backbone.{sides[0]}` and `{sides[1]}` as lists with a number for each "
                f"of the {len(fields['depths'])} stages, and has {given[0]} and {given[1]}."
            )
        config.settings[grid] = [list(pair) if pair[0] != pair[1] else pair[0] for pair in zip(*given)]
    read_normalisation(values.get("img_norm_cfg"), config)
    return config


def interpret_entry(key: str, value, fields: dict, layout, config: AuthorsConfig, name: str) -> str:
    """Notes one argument of the backbone in `config` and says what became of it."""
    if key == "type":
        config.variant = TYPES.get(value)
        return f"the released {config.variant} model" if config.variant else "left out: no type with sizes of its own"
    if key in SETTINGS:
        config.settings[SETTINGS[key]] = value
        return f"converted to {SETTINGS[key]}={value}"
    for grid, sides in GRIDS.items():
        if key in sides:
            return f"converted to {grid}"
    if key in WITHOUT_EFFECT:
        return "left out: the weights say it or it has no effect"
    if key in SHAPES:
        expected = fields[SHAPES[key]]
    elif key == "fork_feat":
        expected = layout is FRAMEWORK
    elif key in CONSTANTS:
        expected = CONSTANTS[key]
    else:
        return "left out: unknown"
    if value != expected:
        raise ConversionError(
            f"The config {name} has `model.backbone.{key}={value}`, but the checkpoint or this model has {expected}."
        )
    return "agrees with the checkpoint"


def refuse_unreadable(value, path: str, name: str):
    """Raises [`ConversionError`] if the entry `path` of the config `name` is not known without running it."""
    unreadable = next(find_unreadable(value), None)
    if unreadable is not None:
        raise ConversionError(f"The config {name} has {unreadable.describe(path)}. Nothing is run, so write it out.")


def find_unreadable(value):
    if isinstance(value, Unreadable):
        yield value
    elif isinstance(value, (dict, list)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from find_unreadable(entry)


def read_normalisation(values, config: AuthorsConfig):
    """`img_norm_cfg`, in units of 0-255. Raises [`ConversionError`] if it is not known without running the config."""
    refuse_unreadable(values, "img_norm_cfg", config.name)
    if values is None:
        return
    numbers = [values.get(key) for key in ("mean", "std")] if isinstance(values, dict) else []
    readable = all(isinstance(entry, list) and all(isinstance(n, (int, float)) for n in entry) for entry in numbers)
    if not numbers or not readable or values.get("to_rgb") is not True:
        config.entries["img_norm_cfg"] = "left out: no mean and std of RGB channels"
        return
    config.image_mean, config.image_std = ([round(number / 255, 6) for number in entry] for entry in numbers)
    config.entries["img_norm_cfg"] = "converted to image_mean and image_std"


def config_text(config: ClusterFormerConfig, layout) -> str:
    """The backbone in the form of the authors' configs, which says what the weights do not."""
    backbone = {"type": "Cluster", "fork_feat": layout is FRAMEWORK, **backbone_arguments(config)}
    for name, variant in TYPES.items():
        # These types have arguments of their own and take none of them.
        if layout is FRAMEWORK and backbone_arguments(config) == backbone_arguments(VARIANTS[variant]()):
            backbone = {"type": name}
    return f"model = {dict(type='ImageClassifier', backbone=backbone)!r}\n"


def backbone_arguments(config: ClusterFormerConfig) -> dict:
    arguments = {key: getattr(config, name) for key, name in {**SETTINGS, **SHAPES}.items()}
    for grid, sides in GRIDS.items():
        pairs = [as_pair(entry) for entry in getattr(config, grid)]
        arguments.update({side: [pair[axis] for pair in pairs] for axis, side in enumerate(sides)})
    return {**arguments, **CONSTANTS}
