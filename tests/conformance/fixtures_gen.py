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
"""Synthetic stand-ins for tests/fixtures/tests_samples/COCO (the real ones are on the Hub / in git only)."""

import json
import pathlib

import numpy as np
from PIL import Image, ImageDraw


def cats_image(size=(640, 480)):
    rng = np.random.default_rng(0)
    w, h = size
    yy, xx = np.mgrid[0:h, 0:w]
    base = np.stack([(xx * 255 / w), (yy * 255 / h), ((xx + yy) * 255 / (w + h))], -1)
    base = base * 0.7 + 40 * np.sin(xx / 23.0)[..., None] + 10
    im = Image.fromarray(np.clip(base, 0, 255).astype("uint8"))
    d = ImageDraw.Draw(im)
    for _ in range(6):
        x0, y0 = rng.integers(0, w - 120), rng.integers(0, h - 120)
        d.ellipse(
            [int(x0), int(y0), int(x0 + rng.integers(40, 120)), int(y0 + rng.integers(40, 120))],
            fill=tuple(int(v) for v in rng.integers(0, 255, 3)),
        )
    return im


BOXES = [
    (40, 70, 136, 47),
    (0, 1, 638, 471),
    (10, 55, 304, 416),
    (345, 23, 295, 347),
    (333, 76, 36, 108),
    (120, 200, 90, 90),
]
CATS = [75, 63, 17, 17, 75, 65]


def write(folder: pathlib.Path):
    folder.mkdir(parents=True, exist_ok=True)
    im = cats_image()
    im.save(folder / "000000039769.png")
    anns = []
    for i, ((x, y, w, h), c) in enumerate(zip(BOXES, CATS)):
        w, h = min(w, 639 - x), min(h, 479 - y)
        anns.append(
            {
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                "area": float(w * h),
                "iscrowd": 0,
                "image_id": 39769,
                "bbox": [float(x), float(y), float(w), float(h)],
                "category_id": c,
                "id": 1000 + i,
            }
        )
    (folder / "coco_annotations.txt").write_text(json.dumps(anns))
    # panoptic png: id = R + 256 G + 256^2 B
    pan = np.zeros((480, 640, 3), "uint8")
    infos = []
    regions = [(0, 0, 640, 240, 200), (0, 240, 320, 240, 17), (320, 240, 320, 240, 63)]
    for i, (x, y, w, h, c) in enumerate(regions):
        sid = 100 + 300 * i
        pan[y : y + h, x : x + w] = [sid % 256, (sid // 256) % 256, sid // 65536]
        infos.append({"id": sid, "category_id": c, "iscrowd": 0, "bbox": [x, y, w, h], "area": w * h})
    (folder / "coco_panoptic").mkdir(exist_ok=True)
    Image.fromarray(pan).save(folder / "coco_panoptic" / "000000039769.png")
    (folder / "coco_panoptic_annotations.txt").write_text(json.dumps(infos))
