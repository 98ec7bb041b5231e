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
Reading pictures as people have them, and finding the ones that cannot be read before a training run starts.

All pictures become upright 8-bit RGB, which is what the image processors and `pipeline` take:

- EXIF orientation is applied; of animations and multi-page files the first frame is read.
- 16-bit grey is scaled to 8 bit. (transformers' own loader clips it: give `pipeline` an `open_image(path)` there.)
- Transparency is dropped and not composited, as transformers' loader does, so training and `pipeline` agree.
- Grey, palette, CMYK and other modes are converted by Pillow. Floating-point pixels have no fixed range: an error.
"""

import io
import os

import numpy as np
from PIL import Image, ImageOps


def open_image(source: str | os.PathLike | bytes | dict | Image.Image) -> Image.Image:
    """
    Reads a whole picture.

    Args:
        source: A path, the bytes of a file, a `{"path", "bytes"}` dict (the datasets library's undecoded `Image`), or
            an open picture.

    Returns:
        `PIL.Image.Image`: upright, of mode RGB (8 bit).

    Raises:
        `ValueError`: if the picture cannot be read or its pixels have no fixed range; names the file and the reason.
    """
    try:
        return _to_rgb(load_image(source))
    except Exception as error:  # Pillow's readers raise any kind on damaged files
        raise ValueError(f"{image_name(source)}: {_reason(error)}") from error


def image_problem(source: str | os.PathLike | bytes | dict | Image.Image) -> str | None:
    """Why the picture cannot be read, or None. Decodes it as training will."""
    try:
        open_image(source)
    except ValueError as error:
        return _reason(error.__cause__)
    return None


def image_name(source, row: int | None = None) -> str:
    """The path of a picture where there is one, else its row in the data set."""
    path = source.get("path") if isinstance(source, dict) else getattr(source, "filename", source)
    if isinstance(path, str | os.PathLike) and str(path):
        return str(path)
    return "picture" if row is None else f"row {row}"


def load_image(source) -> Image.Image:
    if source is None:
        raise ValueError("no picture in this row")
    if isinstance(source, dict):
        source = source["bytes"] if source["bytes"] is not None else source["path"]
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, Image.Image):
        return source
    with Image.open(source) as image:
        image.load()
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save the picture with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"pixels from {pixels.min()} to {pixels.max()} exceed 16 bits")
        # The high byte, as Pillow takes it from 16-bit colour.
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    # Pillow repeats the file, or the address of a buffer, in this error.
    if type(error).__name__ == "UnidentifiedImageError":
        return "not a picture, or of a kind that Pillow cannot read"
    return " ".join(str(error).split()) or type(error).__name__
