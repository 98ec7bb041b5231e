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
One HTML page that shows an image's clusters: pixel by pixel, stage, head and iteration by slider, and for each box or
mask the assignment that it was read from.

The page holds all it needs and loads nothing. Texts come from outside and stay texts: they are data of a script that is
the only one the page's policy lets run.
"""

import base64
import hashlib
import html
import io
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image

from .cluster_iterations import StageIterations
from .visualization import palette


# Clusters that are kept of a pixel, the strongest.
KEPT = 3
# Of maps and masks with more pixels along a side only every second one is kept, or third and so on.
MAX_SIDE = 128
MAX_PICTURE_SIDE = 768
# Up to here a picture is kept without loss.
SMALL_PICTURE = 256 * 256


@dataclass
class FoundObject:
    """
    A box or a mask and the centre that it was read from.

    Args:
        text (`str`): Label and score, as the page shows them.
        query (`int`): The decoder's centre, and the encoder's of the last stage that it started from.
        heat (`np.ndarray` of shape `(height, width)`):
            The share of each pixel in the centre, in [0, 1], as [`box_assignment`] returns it.
        color (`tuple[int, int, int]`): RGB in [0, 255].
        box (`list[float]`, *optional*): x_min, y_min, x_max, y_max in [0, 1] of the picture's sides.
        mask (`np.ndarray` of shape `(height, width)`, *optional*): In place of a box, bool, of the picture's size.
    """

    text: str
    query: int
    heat: np.ndarray
    color: tuple[int, int, int]
    box: list[float] | None = None
    mask: np.ndarray | None = None

    def __post_init__(self):
        if (self.box is None) == (self.mask is None):
            raise ValueError(f"An object has either a box or a mask: {self.text!r}.")


def cluster_page(
    picture: Image.Image, stages: list[StageIterations], objects: list[FoundObject] = (), title: str = "Clusters"
) -> str:
    """
    The page.

    Args:
        picture (`PIL.Image.Image`): What the model saw, in any size: the maps are stretched over it.
        stages (`list[StageIterations]`): See [`trace_clusters`].
        objects (`list[FoundObject]`): What was found, the best first.
        title (`str`): Of the page, any text.

    Returns:
        `str`: HTML.
    """
    data = {
        "picture": _picture_url(picture),
        "iterations": len(stages[0].assignments) - 1,
        "colours": palette(max(stage.assignments.shape[2] for stage in stages)).round().astype(int).tolist(),
        "stages": [_stage_data(stage) for stage in stages],
        "objects": [_object_data(found) for found in objects],
    }
    script = _resource("cluster_page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = title.encode("utf-8", "replace").decode()  # the name of a file may have bytes that are no text
    return Template(_resource("cluster_page.html")).substitute(
        title=html.escape(title), script=script, script_hash=f"sha256-{digest}", data=_script_json(data)
    )


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")


def _script_json(data: dict) -> str:
    """JSON that cannot end the script element it stands in, nor open another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _stage_data(stage: StageIterations) -> dict:
    """
    Of each pixel the `KEPT` strongest clusters, uint16, and their shares in steps of 1/255, uint8, both (iterations,
    heads, kept, height, width), and the centres' places, float32 (iterations, heads, clusters, 2).
    """
    step = _step(stage.assignments.shape[-2:])
    assignments = stage.assignments[..., ::step, ::step]
    shares, clusters = assignments.topk(min(KEPT, assignments.shape[2]), dim=2)
    shares = (shares * 255).round()
    # A share that rounds to none has no cluster; the first one's is kept, so that each real pixel has one.
    shares[:, :, 0] = torch.where(assignments.sum(dim=2) > 0, shares[:, :, 0].clamp_min(1), 0)
    _, heads, kept, height, width = shares.shape
    return {
        "heads": heads,
        "kept": kept,
        "height": height,
        "width": width,
        "step": step,
        "map_size": list(stage.assignments.shape[-2:]),
        "num_clusters": assignments.shape[2],
        "clusters": _packed(clusters.numpy(), np.uint16),
        "shares": _packed(shares.numpy(), np.uint8),
        "places": _packed(stage.places.numpy(), np.float32),
    }


def _object_data(found: FoundObject) -> dict:
    data = {"text": found.text, "query": int(found.query), "colour": list(map(int, found.color))}
    if found.box is not None:
        left, top, right, bottom = map(float, found.box)
        shape = {"kind": "box", "box": [left, top, right, bottom], "area": (right - left) * (bottom - top)}
    else:
        shape = {"kind": "mask", "mask": _map_data(found.mask), "area": float(found.mask.mean())}
    return {**data, **shape, "heat": _map_data((found.heat * 255).round())}


def _map_data(values: np.ndarray) -> dict:
    step = _step(values.shape)
    values = values[::step, ::step]
    return {"height": values.shape[0], "width": values.shape[1], "values": _packed(values, np.uint8)}


def _step(size: tuple[int, int]) -> int:
    return -(-max(size) // MAX_SIDE)


def _packed(values: np.ndarray, dtype: type) -> str:
    """Compressed and in base64, little-endian."""
    data = np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _picture_url(picture: Image.Image) -> str:
    picture, content = picture.convert("RGB"), io.BytesIO()
    picture.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    kind = "png" if picture.width * picture.height <= SMALL_PICTURE else "jpeg"
    picture.save(content, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
