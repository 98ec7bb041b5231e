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
Runs a saved model on pictures: writes what it finds as JSON and draws it.

    python scripts/predict.py cat.jpg photos "more/**/*.png" --model outputs/mine --output_dir outputs/predictions

What is done depends on the model: a classifier names the classes, a detector draws boxes, a model for segmentation
draws segments; `--subtask` chooses what a universal model segments. `--clusters` also shows what a ClusterFormer
clusters, and for each box or segment the pixels that it was read from. Written into the output folder:
`predictions.json`, one entry for each picture in the order given, `NAME.png`, the picture with its result, and with
`--clusters` the page `clusters/NAME.html`, for any browser and without a network, and the panel `clusters/NAME.png`.
Segments are also written for other tools: `panoptic.json` with `panoptic/NAME.png` or `instances.json`, both in COCO's
format, or label maps, `semantic/NAME.png`.
Files that cannot be read are named there and at the end; the others are done all the same, and the exit code is 1.
"""

import glob
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    HfArgumentParser,
    Pipeline,
    pipeline,
)

from clusterformer_hf import ClusterFormerConfig
from clusterformer_hf.cluster_views import show_boxes, show_classes, show_segments
from clusterformer_hf.data.images import open_image
from clusterformer_hf.segmentation_pictures import add_legend, draw_segments, segment_colors
from clusterformer_hf.segmentation_results import (
    InstanceFiles,
    PanopticFiles,
    SegmentPipeline,
    SemanticFiles,
)
from clusterformer_hf.visualization import draw_boxes, label_font


SUBTASKS = ("panoptic", "instance", "semantic")
SEGMENT_FILES = dict(zip(SUBTASKS, (PanopticFiles, InstanceFiles, SemanticFiles)))


@dataclass
class Arguments:
    """Which model is run and what is written."""

    model: str = field(metadata={"help": "Folder that a model was saved in with its image processor."})
    output_dir: Path = field(default=Path("outputs/predictions"), metadata={"help": "Where the results go."})
    threshold: float = field(default=0.5, metadata={"help": "Detection and segmentation: least score that is kept."})
    top_k: int = field(default=5, metadata={"help": "Classification: number of classes, the likeliest first."})
    clusters: bool = field(
        default=False, metadata={"help": "Also show the clusters, and the pixels each box or segment was read from."}
    )
    subtask: str | None = field(
        default=None,
        metadata={
            "help": "Universal segmentation: panoptic, instance or semantic. If unset: panoptic, or instance "
            "for a model whose classes all have instances.",
            "choices": SUBTASKS,
        },
    )
    batch_size: int = field(
        default=1,
        metadata={"help": "Pictures that go through a model together; classifiers aside, neighbours of one size."},
    )
    device: str = field(default="cpu", metadata={"help": "Where the model runs: cpu, cuda, cuda:1, mps, ..."})

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold must be in [0, 1], got {self.threshold}.")
        if self.subtask not in (None, *SUBTASKS):
            raise ValueError(f"--subtask must be {', '.join(SUBTASKS)}, got {self.subtask}.")
        for name in ("top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


@dataclass
class Task:
    """
    What this script does with one kind of model.

    Args:
        name: Of the task, as `pipeline` calls it.
        models: The Auto class's table of models for the task.
        one_size: Whether only pictures of one size can go through the model together.
        options: The pipeline's arguments, of the command line's.
        draw: Draws a picture's predictions, as the pipeline returns them.
        show_clusters: Makes the page and the panel that `--clusters` asks for.
        summary: The predictions in a few words.
        subtasks: What `--subtask` may choose, the default first but for models without stuff.
        pipeline_class: If not the one that transformers has for the task.
    """

    name: str
    models: dict
    one_size: bool
    options: Callable[[Arguments], dict]
    draw: Callable[[Pipeline, Image.Image, list[dict]], Image.Image]
    show_clusters: Callable[[Pipeline, Image.Image, list[dict], str, dict], tuple[str, Image.Image]]
    summary: Callable[[list[dict]], str]
    subtasks: tuple[str, ...] = ()
    pipeline_class: type[Pipeline] | None = None


def draw_classes(predictor: Pipeline, picture: Image.Image, predictions: list[dict]) -> Image.Image:
    """The picture with a line for each class below it."""
    text, font = "\n".join(f"{row['label']} {row['score']:.3f}" for row in predictions), label_font(picture)
    width, height = ImageDraw.Draw(picture).multiline_textbbox((0, 0), text, font=font)[2:]
    captioned = Image.new("RGB", (max(picture.width, int(width) + 9), picture.height + int(height) + 9), "white")
    captioned.paste(picture, (0, 0))
    ImageDraw.Draw(captioned).multiline_text((4, picture.height + 4), text, fill="black", font=font)
    return captioned


def name_classes(predictions: list[dict]) -> str:
    return ", ".join(f"{row['label']} {row['score']:.3f}" for row in predictions)


def draw_detections(predictor: Pipeline, picture: Image.Image, predictions: list[dict]) -> Image.Image:
    """The picture with its boxes."""
    id2label = predictor.model.config.id2label
    ids = {label: index for index, label in id2label.items()}
    boxes = [[row["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for row in predictions]
    detections = {
        "scores": torch.tensor([row["score"] for row in predictions]),
        "labels": torch.tensor([ids[row["label"]] for row in predictions], dtype=torch.long),
        "boxes": torch.tensor(boxes).reshape(-1, 4),
    }
    return draw_boxes(picture, detections, id2label)


def count_objects(predictions: list[dict]) -> str:
    counts = Counter(row["label"] for row in predictions)
    return "nothing found" if not counts else ", ".join(f"{number} x {label}" for label, number in counts.items())


def name_segments(predictions: list[dict]) -> str:
    """How many there are of each class; for a semantic map, where there is one of each, its share of the picture."""
    if not predictions or predictions[0]["score"] is not None:
        return count_objects(predictions)
    shares = sorted(predictions, key=lambda row: -row["mask"].sum())
    return ", ".join(f"{row['label']} {row['mask'].mean():.1%}" for row in shares)


def draw_found_segments(predictor: Pipeline, picture: Image.Image, predictions: list[dict]) -> Image.Image:
    """The picture under its segments, with a legend: a colour for each class if there are no scores, else for each."""
    # The most certain one on top.
    masks = [row["mask"] for row in reversed(predictions)]
    is_semantic = all(row["score"] is None for row in predictions)
    num_labels = predictor.model.config.num_labels if is_semantic else None
    colors = segment_colors([row["label_id"] for row in predictions], num_labels)
    drawn = draw_segments(picture, np.array(masks).reshape(-1, picture.height, picture.width), colors[::-1])
    texts = [row["label"] if is_semantic else f"{row['label']} {row['score']:.2f}" for row in predictions]
    return add_legend(drawn, texts, colors)


TASKS = (
    Task(
        name="image-classification",
        models=MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        one_size=False,
        options=lambda args: {"top_k": args.top_k},
        draw=draw_classes,
        show_clusters=show_classes,
        summary=name_classes,
    ),
    Task(
        name="object-detection",
        models=MODEL_FOR_OBJECT_DETECTION_MAPPING,
        one_size=True,  # its image processors keep proportions, and pipelines do not pad
        options=lambda args: {"threshold": args.threshold},
        draw=draw_detections,
        show_clusters=show_boxes,
        summary=count_objects,
    ),
    Task(
        name="image-segmentation",
        models=MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
        one_size=True,
        options=lambda args: {"threshold": args.threshold},
        draw=draw_found_segments,
        show_clusters=show_segments,
        summary=name_segments,
        subtasks=SUBTASKS,
        pipeline_class=SegmentPipeline,
    ),
    Task(
        name="image-segmentation",
        models=MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
        one_size=True,
        options=lambda args: {},
        draw=draw_found_segments,
        show_clusters=show_segments,
        summary=name_segments,
        subtasks=("semantic",),
        pipeline_class=SegmentPipeline,
    ),
)


def find_task(args: Arguments) -> Task:
    """
    The task of a saved model, from the architecture that its config names.

    Raises:
        `ValueError`: if there is no model, no task for its architecture, no clusters or no such subtask.
    """
    model = args.model
    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"--model {model} is no folder with a saved model and no model on the Hub: {error}") from error
    names = set(config.architectures or [])
    if not names:
        raise ValueError(f"The config in {model} names no architecture. `save_pretrained` of a model writes it there.")
    for task in TASKS:
        if names & architectures(task.models, config):
            if args.clusters and config.model_type != ClusterFormerConfig.model_type:
                raise ValueError(f"--clusters needs a ClusterFormer, and {model} holds {', '.join(names)}.")
            if args.subtask not in (None, *task.subtasks):
                raise ValueError(f"{model} holds {', '.join(names)}, which has no --subtask {args.subtask}.")
            return task
    supported = ", ".join(f"{task.name} ({', '.join(architectures(task.models, config))})" for task in TASKS)
    reason = "which is not supported"
    if names & (architectures(MODEL_MAPPING, config) | architectures(MODEL_FOR_BACKBONE_MAPPING, config)):
        reason = "a backbone without a head, which predicts nothing by itself"
    raise ValueError(f"{model} holds {', '.join(names)}, {reason}. Supported: {supported}.")


def architectures(models: dict, config) -> set[str]:
    """Names of a table's model classes for this kind of config."""
    classes = models.get(type(config), ())
    return {model.__name__ for model in (classes if isinstance(classes, tuple) else (classes,))}


def find_pictures(inputs: list[str]) -> tuple[list[Path], dict[str, str]]:
    """
    The files that are named or lie in folders that are named, each once, and for inputs that name none the reason.

    Of a folder every file with a picture's extension is taken, not those of folders in it; files without are printed.
    """
    paths, problems = {}, {}
    for text in inputs:
        # A name may look like a pattern itself.
        matches = [Path(text)] if Path(text).exists() else [Path(match) for match in glob.glob(text, recursive=True)]
        found = [path for match in sorted(matches) for path in (pictures_in(match) if match.is_dir() else [match])]
        if not found:
            problems[text] = "no pictures in this folder" if matches else "no such file or folder, and no match"
        for path in found:
            paths.setdefault(path.resolve(), path)
    return list(paths.values()), problems


def pictures_in(folder: Path) -> list[Path]:
    known = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    others = [path.name for path in files if path.suffix.lower() not in known]
    if others:
        print(f"{folder}: left out, not pictures by their names: {', '.join(others)}", file=sys.stderr)
    return [path for path in files if path.suffix.lower() in known]


def read_batches(
    paths: list[Path], batch_size: int, one_size: bool, problems: dict[str, str]
) -> Iterator[list[tuple[Path, Image.Image]]]:
    """Pictures in order, at most `batch_size` at a time; files that cannot be read go to `problems`."""
    batch = []
    for path in paths:
        try:
            picture = open_image(path)
        except ValueError as error:
            problems[str(path)] = str(error).removeprefix(f"{path}: ")
            continue
        if batch and (len(batch) == batch_size or one_size and picture.size != batch[0][1].size):
            yield batch
            batch = []
        batch.append((path, picture))
    if batch:
        yield batch


def predict(
    predictor: Pipeline, batch: list[tuple[Path, Image.Image]], options: dict, problems: dict[str, str]
) -> list[tuple[tuple[Path, Image.Image], list]]:
    """Each picture of the batch with its predictions; those that the model does not take go to `problems`."""
    try:
        answers = predictor([picture for _, picture in batch], batch_size=len(batch), **options)
        return list(zip(batch, answers, strict=True))
    except ValueError as error:
        if len(batch) > 1:
            return [found for each in batch for found in predict(predictor, [each], options, problems)]
        ((path, picture),) = batch
        problems[str(path)] = f"{picture.width} x {picture.height} pixels: {error}"
        return []


def output_names(paths: list[Path], output_dir: Path) -> dict[Path, str]:
    """For each file a name that no other file and no file to read has in the output folder, in upper or lower case."""
    taken = {str(path.resolve()).casefold() for path in paths}
    names = {}
    for path in paths:
        for number in count(1):
            name = path.stem if number == 1 else f"{path.stem}_{number}"
            files = {str(file.resolve()).casefold() for file in output_files(output_dir, name)}
            if not files & taken:
                break
        names[path], taken = name, taken | files
    return names


def output_files(output_dir: Path, name: str) -> list[Path]:
    """The drawn picture, the panel and the page of its clusters, and its segments."""
    files = ("{}.png", "clusters/{}.png", "clusters/{}.html", "panoptic/{}.png", "semantic/{}.png")
    return [output_dir / file.format(name) for file in files]


def load_predictor(task: Task, args: Arguments) -> Pipeline:
    return pipeline(task.name, model=args.model, device=args.device, pipeline_class=task.pipeline_class)


def choose_subtask(task: Task, args: Arguments, config) -> str | None:
    """
    What a segmentation model segments, None for other models.

    Without stuff to fill the background, panoptic segments of a model that was trained for instances would flood it.
    """
    if args.subtask is None and "instance" in task.subtasks and getattr(config, "label_ids_to_fuse", None) == []:
        return "instance"
    return args.subtask or next(iter(task.subtasks), None)


def main(args: list[str] | None = None):
    parser = HfArgumentParser(Arguments)
    parser.add_argument("images", nargs="+", help="Pictures: files, folders or patterns such as 'photos/*.jpg'.")
    args, inputs = parser.parse_args_into_dataclasses(args)
    task = find_task(args)
    paths, problems = find_pictures(inputs.images)
    names = output_names(paths, args.output_dir)
    predictor = load_predictor(task, args)
    (args.output_dir / "clusters" if args.clusters else args.output_dir).mkdir(parents=True, exist_ok=True)
    files, options, subtask = None, task.options(args), choose_subtask(task, args, predictor.model.config)
    if subtask is not None:
        files, options["subtask"] = SEGMENT_FILES[subtask](args.output_dir, predictor.model.config), subtask

    results = {}
    for batch in read_batches(paths, args.batch_size, task.one_size, problems):
        for (path, picture), predictions in predict(predictor, batch, options, problems):
            drawn, panel_file, page_file, *_ = output_files(args.output_dir, names[path])
            task.draw(predictor, picture, predictions).save(drawn)
            if args.clusters:
                page, panel = task.show_clusters(predictor, picture, predictions, path.name, options)
                page_file.write_text(page, "utf-8")
                panel.save(panel_file)
            print(f"{path}: {task.summary(predictions)}")
            if files is not None:
                predictions = files.add(path, names[path], (picture.height, picture.width), predictions)
            size = {"width": picture.width, "height": picture.height}
            results[path] = {"file": str(path), "size": size, "picture": drawn.name, "predictions": predictions}

    if files is not None:
        files.close()
    entries = [results.get(path) or {"file": str(path), "error": problems[str(path)]} for path in paths]
    known = {entry["file"] for entry in entries}
    entries += [{"file": text, "error": problem} for text, problem in problems.items() if text not in known]
    (args.output_dir / "predictions.json").write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
    print(f"\npredictions.json and {len(results)} pictures are in {args.output_dir}.")
    if problems:
        lines = "\n".join(f"  {name}: {problem}" for name, problem in problems.items())
        raise SystemExit(f"{len(problems)} of {len(entries)} have no predictions:\n{lines}")


if __name__ == "__main__":
    main()
