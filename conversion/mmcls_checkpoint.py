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
"""Checkpoints of the released ClusterFormer: reading them without running them, and what their shapes say."""

import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmcls_keys import BLOCK, FRAMEWORK, STANDALONE, ConversionError, Layout, listing
from safetensors import SafetensorError, safe_open


class Discarded:
    """Takes the place of an object in the metadata. Runs nothing and keeps nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


# What the framework stores beside tensors, numbers and text: numpy scalars, such as a hook's best score, and numpy
# arrays; its successor also log histories. No conversion needs them, so none is built.
DISCARDED = (
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "mmengine.logging.history_buffer.HistoryBuffer",
)


@dataclass
class ReleasedCheckpoint:
    """
    Args:
        layout (`Layout`): Which part of the released model it is.
        state_dict (`dict[str, torch.Tensor]`): The weights.
        file_keys (`dict[str, str]`): For each key of `state_dict` the key in the file, which may have a prefix.
        meta (`dict`): The framework's metadata, empty where there is none.
        left_out (`dict[str, str]`): Everything else in the file, and why it is no part of the model.
    """

    layout: Layout
    state_dict: dict[str, torch.Tensor] = field(default_factory=dict)
    file_keys: dict[str, str] = field(default_factory=dict)
    meta: dict = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, file_key: str, value):
        """Takes in one entry of the file's state dict."""
        key = file_key.removeprefix("module.")  # of a model that was wrapped for several GPUs
        if key.startswith("ema_"):
            # At the end of an epoch the framework's hook swaps the two sets of weights, evaluates and saves: the plain
            # keys then hold the moving average, which the framework's own scores belong to, and these the raw weights
            # to go on training with. So there is no switch to take these instead.
            self.left_out[file_key] = f"second set of weights, kept to resume training ({describe(value)})"
        elif not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise ConversionError(f"The key `{file_key}` holds no floating-point tensor but: {describe(value)}.")
        elif key in self.state_dict:
            raise ConversionError(f"The key `{key}` is there twice, with and without the prefix `module.`.")
        else:
            # A copy with a memory of its own: the file may hold views of one buffer.
            self.state_dict[key] = value.detach().clone(memory_format=torch.contiguous_format)
            self.file_keys[key] = file_key


def read_checkpoint(path: str | Path) -> ReleasedCheckpoint:
    """
    Reads the training framework's checkpoint, or a bare state dict, or either as safetensors.

    Raises:
        [`ConversionError`]: if the file is missing or damaged, would run code, or holds another model.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"There is no file {path}.")
    entries, left_out = read_safetensors(path) if path.suffix == ".safetensors" else (read_pickle(path), {})
    if not isinstance(entries, dict):
        raise ConversionError(f"{path} holds no state dict but: {describe(entries)}.")
    meta = {}
    if isinstance(entries.get("state_dict"), dict):
        meta = entries["meta"] if isinstance(entries.get("meta"), dict) else {}
        for name, value in entries.items():
            if name != "state_dict" and value is not meta:
                left_out[str(name)] = f"no part of the model ({describe(value)})"
        entries = entries["state_dict"]
    entries = {str(key): value for key, value in entries.items()}

    checkpoint = ReleasedCheckpoint(find_layout(entries, path), meta=meta, left_out=left_out)
    for key, value in entries.items():
        checkpoint.add(key, value)
    return checkpoint


def read_pickle(path: Path):
    """The file's tensors, containers, numbers and text. Refuses what would call anything else, before it does."""
    try:
        check_sums(path)
        with torch.serialization.safe_globals([(Discarded, name) for name in DISCARDED]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ConversionError:
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise ConversionError(f"{path} is no checkpoint that is safe to read, or it is damaged.") from error
        raise ConversionError(
            f"{path} is refused: to read it would be to call `{wanted[1]}`, which might run any code. Nothing was run."
        ) from error
    except Exception as error:  # a damaged file fails in many ways
        raise ConversionError(
            f"{path} is damaged, incomplete or no checkpoint ({type(error).__name__}: {error})."
        ) from error


def check_sums(path: Path):
    """`torch.load` does not look at the checksums that `torch.save` writes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ConversionError(f"{path} is damaged: the checksum of its entry {damaged} is wrong.")


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The file's tensors, and its metadata as left out."""
    try:
        with safe_open(path, framework="pt") as file:
            left_out = {f"__metadata__.{name}": "no part of the model" for name in file.metadata() or {}}
            return {key: file.get_tensor(key) for key in file.keys()}, left_out
    except SafetensorError as error:
        raise ConversionError(f"{path} is damaged, incomplete or no safetensors file ({error}).") from error


def find_layout(entries: dict, path: Path) -> Layout:
    keys = [key.removeprefix("module.") for key in entries]
    for layout in (FRAMEWORK, STANDALONE):
        if any(key.startswith((f"{layout.prefix}network.", f"{layout.prefix}patch_embed.")) for key in keys):
            return layout
    raise ConversionError(
        f"{path} holds no released ClusterFormer: no key begins with `backbone.network.` or `network.`. "
        f"Its keys: {listing(keys)}."
    )


def describe(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor of {value.dtype}, shape {tuple(value.shape)}"
    tensors = list(find_tensors(value))
    return f"{type(value).__name__}, {len(tensors)} tensors with {sum(map(torch.numel, tensors)):,} values in it"


def find_tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from find_tensors(entry)


def fields_from_shapes(checkpoint: ReleasedCheckpoint) -> dict:
    """
    The config fields that the shapes decide: patch size, depths, widths, heads and their dimension, MLP ratios, and the
    number of classes. Also `head_dims`, the head dimension of each stage.

    Raises:
        [`ConversionError`]: naming a key that is missing or of an impossible shape.
    """
    prefix = checkpoint.layout.prefix
    stem, head = f"{prefix}patch_embed.proj.weight", checkpoint.layout.head[0].replace("*", "weight")
    rows, columns = shape_of(checkpoint, stem, 4)[2:]
    if rows != columns:
        raise ConversionError(f"The key `{stem}` has a kernel of {rows} x {columns}: the stem's patches are square.")
    names = ("hidden_sizes", "num_attention_heads", "head_dims", "mlp_ratios")
    depths = find_depths(checkpoint)
    stages = [stage_from_shapes(checkpoint, f"{prefix}network.{2 * stage}.0") for stage in range(len(depths))]
    fields = {"patch_size": rows, "depths": depths, **dict(zip(names, map(list, zip(*stages))))}
    fields["head_dim"] = fields["head_dims"]
    if all(heads * dim == size for size, heads, dim, _ in stages):
        fields["head_dim"] = None
    elif len(set(fields["head_dims"])) == 1:
        fields["head_dim"] = fields["head_dims"][0]
    fields["num_labels"] = shape_of(checkpoint, head, 2)[0]
    return fields


def stage_from_shapes(checkpoint: ReleasedCheckpoint, block: str) -> tuple[int, int, int, int | float]:
    """Width, heads, head dimension and MLP ratio of a stage, from its first block."""
    width = shape_of(checkpoint, f"{block}.norm1.weight", 1)[0]
    head_dim = shape_of(checkpoint, f"{block}.token_mixer.conv_c.weight", 4)[0]
    channels = shape_of(checkpoint, f"{block}.token_mixer.conv1.weight", 4)[0]
    if channels % head_dim:
        raise ConversionError(
            f"The key `{block}.token_mixer.conv1.weight` has {channels} output channels, which are no multiple of the "
            f"{head_dim} channels of a head in `{block}.token_mixer.conv_c.weight`."
        )
    hidden = shape_of(checkpoint, f"{block}.mlp.fc1.weight", 4)[0]
    ratio = hidden // width if hidden % width == 0 else hidden / width
    if int(width * ratio) != hidden:  # rounded below the whole number
        ratio = (hidden + 0.5) / width
    return width, channels // head_dim, head_dim, ratio


def shape_of(checkpoint: ReleasedCheckpoint, key: str, ndim: int) -> torch.Size:
    if key not in checkpoint.state_dict:
        raise ConversionError(f"Missing keys: `{key}`.")
    shape = checkpoint.state_dict[key].shape
    if len(shape) != ndim or 0 in shape:
        raise ConversionError(f"Wrong shapes: `{key}` is {tuple(shape)}, and has {ndim} dimensions in this model.")
    return shape


def find_depths(checkpoint: ReleasedCheckpoint) -> list[int]:
    """Blocks of each stage by the highest index, so that a gap below shows up as missing keys."""
    pattern = re.compile(re.escape(checkpoint.layout.prefix) + r"network\.(\d+)\.(\d+)\.(.+?)(?:\.weight|\.bias)?")
    known = {released.removeprefix("network.{place}.{layer}.").removesuffix(".*") for released, _ in BLOCK}
    depths = {0: 1}
    for match in filter(None, map(pattern.fullmatch, checkpoint.state_dict)):
        place, layer, name = int(match[1]), int(match[2]), match[3]
        if place % 2 == 0 and name in known:
            depths[place] = max(depths.get(place, 1), layer + 1)
    return [depths.get(place, 1) for place in range(0, max(depths) + 1, 2)]
