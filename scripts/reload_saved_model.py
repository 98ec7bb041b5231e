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
"""Loads a saved classifier as a user who has transformers alone would, and checks its logits bit by bit.

    python scripts/reload_saved_model.py MODEL_FOLDER INPUTS.safetensors

INPUTS holds `pixel_values` and the `logits` that the model must give. Run by scripts/quickstart.py in a fresh process.
"""

import os
import sys
import tempfile


sys.modules["clusterformer_hf"] = None  # importing it raises ImportError, as where it is not installed
cache = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = cache.name  # read when transformers is imported

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline  # noqa: E402


def main():
    folder, inputs = sys.argv[1], load_file(sys.argv[2])
    torch.set_num_threads(int(os.environ.get("RELOAD_NUM_THREADS", torch.get_num_threads())))
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(inputs["pixel_values"]).logits
    if not torch.equal(logits, inputs["logits"]):
        raise SystemExit(f"The reloaded logits differ by up to {(logits - inputs['logits']).abs().max().item()}.")

    processor = AutoImageProcessor.from_pretrained(folder)
    classify = pipeline("image-classification", model=model, image_processor=processor)
    images = [Image.fromarray(picture) for picture in inputs["images"].numpy()]
    labels = [prediction[0]["label"] for prediction in classify(images, batch_size=8, top_k=1)]
    expected = [model.config.id2label[index] for index in logits.argmax(dim=-1).tolist()]
    if labels != expected:
        raise SystemExit(f"The pipeline answers {labels} where the model answers {expected}.")
    print(f"Reloaded {type(model).__module__}.{type(model).__name__}: {len(logits)} logits equal bit by bit,")
    print(f"and pipeline('image-classification') answers {', '.join(labels)}.")


if __name__ == "__main__":
    main()
