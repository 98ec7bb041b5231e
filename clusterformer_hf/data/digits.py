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
The built-in pictures for classification: 5,000 real digits (MNIST), written as a folder of class folders.

    python -m clusterformer_hf.data.digits --output digits

`digits/train/0/0000.png` and so on: 4,000 for training in `train`, and 1,000 others in `val`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import HfArgumentParser

from .digit_scenes import load_digits
from .folders import require_new


def write_digits(output: str | Path, num_train: int = 4000, num_val: int = 1000) -> Path:
    """
    Writes the pictures, 28 x 28 and grey, and returns their folder; of fewer as many of each class as of the others.

    Raises:
        `FileExistsError`: if the folder is there and not empty.
    """
    output = Path(output)
    require_new(output)
    for folder, split, number in (("train", "train", num_train), ("val", "test", num_val)):
        pixels, labels = load_digits(split)
        for digit in range(10):
            path = output / folder / str(digit)
            path.mkdir(parents=True)
            for index in np.flatnonzero(labels == digit)[: number // 10]:
                Image.fromarray(pixels[index]).save(path / f"{index:04}.png")
    return output


@dataclass
class Arguments:
    """Where the digits go."""

    output: str = field(metadata={"help": "Folder to write; it must be empty or not exist yet."})


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    print(f"4,000 training and 1,000 validation digits are in {write_digits(args.output)}.")


if __name__ == "__main__":
    main()
