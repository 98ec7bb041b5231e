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
"""Offline replacement for transformers' utils/fetch_hub_objects_for_ci.py: Hub image URLs map to one synthetic image.
Label-map URLs (ADE *.png) map to a synthetic single-channel map."""

import pathlib
import tempfile


_ROOT = pathlib.Path(tempfile.gettempdir()) / "conformance_images"


def url_to_local_path(url, *args, **kwargs):
    if not isinstance(url, str) or not url.startswith("http"):
        return url
    import fixtures_gen
    import numpy as np
    from PIL import Image

    _ROOT.mkdir(exist_ok=True)
    name = url.rsplit("/", 1)[-1]
    p = _ROOT / name
    if not p.exists():
        if "ADE_val" in name and name.endswith(".png"):
            yy, xx = np.mgrid[0:512, 0:683]
            Image.fromarray(((xx // 64 + yy // 64) % 150).astype("uint8")).save(p)
        else:
            fixtures_gen.cats_image((683, 512) if "ADE" in name else (640, 480)).save(p)
    return str(p)
