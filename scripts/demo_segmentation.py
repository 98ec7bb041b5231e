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
Trains a nano model for panoptic segmentation on digit scenes and draws what it finds beside the truth: about an hour
on one CPU core.

    python scripts/demo_segmentation.py [--output_dir DIR] [--max_steps N] [--resume_from_checkpoint true]

The settings are those of `scripts/recipes/panoptic_segmentation_digit_scenes.yaml`; further flags of
`scripts/run_universal_segmentation.py` override them. One model is read in three ways: panoptic quality of its
segments, average precision of its instances and mean IoU of its semantic map. Written: the scenes
(`scenes_3000_300/`), the model (`model/`), the numbers (`results.json`) and some test scenes with the true segments and
those found (`comparisons/NAME.png`).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import run_universal_segmentation
from demo_detection import write_scenes
from PIL import Image
from transformers import AutoModelForUniversalSegmentation, HfArgumentParser, pipeline

from clusterformer_hf.data.coco_panoptic import PanopticData, find_panoptic_splits, read_panoptic
from clusterformer_hf.segmentation_pictures import add_legend, draw_segments, segment_colors, side_by_side
from clusterformer_hf.segmentation_results import SegmentPipeline


RECIPE = Path(__file__).parent / "recipes" / "panoptic_segmentation_digit_scenes.yaml"
METRICS = ("PQ", "PQ_things", "PQ_stuff", "SQ", "RQ", "AP", "AP50", "mIoU")
SCALE = 3


@dataclass
class Arguments:
    output_dir: Path = field(default=Path("outputs/demo_segmentation"), metadata={"help": "Where the results go."})
    num_train: int = field(default=3000, metadata={"help": "Number of training scenes."})
    num_test: int = field(default=300, metadata={"help": "Number of test scenes."})
    num_pictures: int = field(default=8, metadata={"help": "Number of test scenes that are drawn."})


def collect_results(model: Path) -> dict[str, float]:
    """Panoptic quality, average precision and mean IoU on the test scenes, `seconds` of training and `parameters`."""
    trained, evaluated = (json.loads((model / f"{split}_results.json").read_text()) for split in ("train", "eval"))
    return {
        **{name: evaluated[f"eval_{name}"] for name in METRICS},
        "seconds": round(trained["train_runtime"], 1),
        "parameters": AutoModelForUniversalSegmentation.from_pretrained(model).num_parameters(),
    }


def print_table(results: dict[str, float]):
    print("\n" + "  ".join(f"{name:>9}" for name in results))
    print("  ".join(f"{value:9.3f}" if name in METRICS else f"{value:9,.0f}" for name, value in results.items()))


def draw_comparisons(scenes: Path, model: Path, folder: Path, number: int):
    """Test scenes, the true segments and those that the model finds, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    truth = read_panoptic(*find_panoptic_splits(scenes)["validation"])
    predictor = pipeline("image-segmentation", model=str(model), device="cpu", pipeline_class=SegmentPipeline)
    for row in range(min(number, len(truth))):
        (picture, true_segments), names = true_picture(truth, row), truth.class_names
        found = [
            (f"{segment['label']} {segment['score']:.2f}", names.index(segment["label"]), segment["mask"])
            for segment in predictor(picture)
        ]
        tiles = [
            enlarged(picture),
            drawn(picture, true_segments, len(names)),
            drawn(picture, found, len(names)),
        ]
        side_by_side(tiles, ["scene", "truth", "found"]).save(folder / f"{truth.image_ids[row]:06d}.png")


def true_picture(truth: PanopticData, row: int) -> tuple[Image.Image, list[tuple[str, int, np.ndarray]]]:
    """A scene, and the name, class and mask of each of its segments."""
    picture, segments, classes, _ = truth.open(row)
    labels = classes.tolist()
    return picture, [(truth.class_names[label], label, segments == i) for i, label in enumerate(labels, start=1)]


def drawn(picture: Image.Image, segments: list[tuple[str, int, np.ndarray]], num_labels: int) -> Image.Image:
    """The enlarged scene under its segments, a colour for each class."""
    masks = [mask.repeat(SCALE, axis=0).repeat(SCALE, axis=1) for _, _, mask in segments]
    picture, colors = enlarged(picture), segment_colors([label for _, label, _ in segments], num_labels)
    overlay = draw_segments(picture, np.array(masks).reshape(-1, picture.height, picture.width), colors)
    return add_legend(overlay, [text for text, _, _ in segments], colors)


def enlarged(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)


def main(args: list[str] | None = None):
    args, training_flags = HfArgumentParser(Arguments).parse_args_into_dataclasses(args, return_remaining_strings=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scenes, model = write_scenes(args), args.output_dir / "model"
    flags = [f"--dataset_name={scenes}", f"--output_dir={model}"]
    run_universal_segmentation.main([str(RECIPE), *flags, *training_flags])

    results = collect_results(model)
    draw_comparisons(scenes, model, args.output_dir / "comparisons", args.num_pictures)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    print(f"\nThe model, results.json and the pictures, comparisons/*.png, are in {args.output_dir}.")


if __name__ == "__main__":
    main()
