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
Trains a nano detector on digit scenes and shows what each box was read from: half an hour to an hour on one CPU core.

    python scripts/demo_detection.py [--output_dir DIR] [--max_steps N] [--resume_from_checkpoint true]

The settings are those of `scripts/recipes/object_detection_digit_scenes.yaml`; further flags of
`scripts/run_object_detection.py` override them. Written: the scenes (`scenes_3000_300/`), the model (`model/`), the
numbers (`results.json`) and, for some test scenes, the boxes (`predictions/NAME.png`) and beside each box the pixels
that it was read from (`predictions/clusters/NAME.png`).
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import predict
import run_object_detection
from transformers import AutoModelForObjectDetection, HfArgumentParser

from clusterformer_hf.data.digit_scenes import write_digit_scenes


RECIPE = Path(__file__).parent / "recipes" / "object_detection_digit_scenes.yaml"
METRICS = ("AP", "AP50", "AP75")


@dataclass
class Arguments:
    output_dir: Path = field(default=Path("outputs/demo_detection"), metadata={"help": "Where the results go."})
    num_train: int = field(default=3000, metadata={"help": "Number of training scenes."})
    num_test: int = field(default=300, metadata={"help": "Number of test scenes."})
    num_pictures: int = field(default=8, metadata={"help": "Number of test scenes that are drawn."})


def write_scenes(args: Arguments) -> Path:
    """Writes the scenes, unless an earlier run has written them all."""
    folder = args.output_dir / f"scenes_{args.num_train}_{args.num_test}"
    if not folder.exists():
        print(f"Writing {args.num_train} training and {args.num_test} test scenes to {folder} ...")
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_digit_scenes(unfinished, args.num_train, args.num_test).rename(folder)
    return folder


def collect_results(model: Path) -> dict[str, float]:
    """Average precision on the test scenes, `seconds` of the training and `parameters`."""
    trained, evaluated = (json.loads((model / f"{split}_results.json").read_text()) for split in ("train", "eval"))
    return {
        **{name: evaluated[f"eval_{name}"] for name in METRICS},
        "seconds": round(trained["train_runtime"], 1),
        "parameters": AutoModelForObjectDetection.from_pretrained(model).num_parameters(),
    }


def print_table(results: dict[str, float]):
    print("\n   AP   AP50   AP75  seconds  parameters")
    print("{AP:5.3f}  {AP50:5.3f}  {AP75:5.3f}  {seconds:7.0f}  {parameters:10,d}".format(**results))


def main(args: list[str] | None = None):
    args, training_flags = HfArgumentParser(Arguments).parse_args_into_dataclasses(args, return_remaining_strings=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scenes, model = write_scenes(args), args.output_dir / "model"
    flags = [f"--dataset_name={scenes}", f"--output_dir={model}"]
    run_object_detection.main([str(RECIPE), *flags, *training_flags])

    predictions, results = args.output_dir / "predictions", collect_results(model)
    pictures = [str(path) for path in sorted((scenes / "test").glob("*.png"))[: args.num_pictures]]
    predict.main([*pictures, f"--model={model}", f"--output_dir={predictions}", "--clusters"])
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    print(f"\nThe model, results.json and the pictures, predictions/clusters/*.png, are in {args.output_dir}.")


if __name__ == "__main__":
    main()
