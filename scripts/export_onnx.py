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
Exports a saved ClusterFormer to ONNX, with transformers' exporter, and checks it against PyTorch.

    python scripts/export_onnx.py --model outputs/quickstart/model --output_dir outputs/onnx [--dynamic batch size]
        [--int8] [--dataset_name my_pictures]

Any model: encoder, backbone, classifier, detector, segmentation. Written: `model.onnx`, with --int8 `model_int8.onnx`
(weights and products in 8 bit, by onnxruntime's dynamic quantisation), the config and the image processor. The graph
takes `pixel_values` (batch, channels, height, width), float32, without padding, and gives the model's outputs in their
order.

Sizes are fixed at --batch_size, --height and --width unless --dynamic names `batch` or `size`; a dynamic size takes
minutes to export for detection and segmentation. The graph is checked on random numbers and on photographs
(--images, or those of scikit-image), at several sizes where it is dynamic, and the run fails where it differs from
PyTorch by more than 0.001 of an output's largest value. --int8 also prints how often the strongest class on the
photographs is PyTorch's, of a picture, a centre or a pixel. With --dataset_name, the accuracy of PyTorch and of each
graph: top-1 of a classifier on a folder of class folders, AP of a detector on a folder in COCO's format, which needs
`--dynamic size` unless its image processor gives all pictures one size.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir
import onnxruntime
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image
from torch.utils import _pytree as pytree
from transformers import AutoConfig, AutoImageProcessor, HfArgumentParser, PreTrainedModel, pipeline
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

import clusterformer_hf
from clusterformer_hf import ClusterFormerBackbone, ClusterFormerForSemanticSegmentation, ClusterFormerModel
from clusterformer_hf.data.classification import load_pictures, match_classes, pick_columns
from clusterformer_hf.data.coco import find_coco_splits, read_coco
from clusterformer_hf.data.detection import match_categories
from clusterformer_hf.data.detection_data import open_picture
from clusterformer_hf.data.images import open_image
from clusterformer_hf.metrics.detection import average_precision


AXES = {"batch": (0,), "size": (2, 3)}
# Largest difference to PyTorch, as a share of an output's largest value, or of 1 where that is less.
TOLERANCE = 1e-3


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder that a ClusterFormer was saved in."})
    output_dir: Path = field(metadata={"help": "Where the graph goes."})
    dynamic: list[str] = field(default_factory=list, metadata={"help": "What is left open: batch, size or both."})
    batch_size: int = field(default=1, metadata={"help": "Pictures that go through the graph together, if fixed."})
    height: int | None = field(default=None, metadata={"help": "In pixels; the config's image_size if unset."})
    width: int | None = field(default=None, metadata={"help": "In pixels; the config's image_size if unset."})
    int8: bool = field(default=False, metadata={"help": "Also write a graph with 8-bit weights."})
    images: list[Path] = field(default_factory=list, metadata={"help": "Photographs for the check."})
    dataset_name: str | None = field(default=None, metadata={"help": "Folder with labels, for the accuracy."})
    max_eval_samples: int = field(default=1000, metadata={"help": "So many pictures of it, from the first on."})
    rounds: int = field(default=20, metadata={"help": "Runs that a time is the median of."})

    def __post_init__(self):
        if set(self.dynamic) - set(AXES):
            raise ValueError(f"--dynamic takes batch and size, got {', '.join(self.dynamic)}.")
        for name in ("batch_size", "rounds", "max_eval_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


class OnnxModel:
    """
    A graph in place of a model's `forward`.

    Args:
        path: The file.
        structure: Of the model's outputs, as `pytree.tree_structure` returns it.
    """

    def __init__(self, path: Path, structure: pytree.TreeSpec):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.structure = structure

    def __call__(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None, **kwargs):
        if pixel_mask is not None and not pixel_mask.all():
            raise ValueError("The graph takes pictures without padding, and `pixel_mask` has zeros.")
        (graph_input,) = self.session.get_inputs()
        sides = zip(graph_input.shape, pixel_values.shape, strict=True)
        if any(isinstance(fixed, int) and fixed != side for fixed, side in sides):
            raise ValueError(
                f"The graph takes pixel_values of the shape {graph_input.shape}, got {list(pixel_values.shape)}. "
                "Export it for this shape, or name what differs in --dynamic: batch or size."
            )
        outputs = self.session.run(None, {"pixel_values": pixel_values.float().numpy()})
        return pytree.tree_unflatten([torch.from_numpy(output) for output in outputs], self.structure)


def load_model(folder: str) -> PreTrainedModel:
    names = AutoConfig.from_pretrained(folder).architectures or ["no model"]
    model_class = getattr(clusterformer_hf, names[0], None)
    if model_class is None:
        raise ValueError(f"--model {folder} holds {', '.join(names)}, and no ClusterFormer.")
    # The graph takes float32, whatever the weights were saved in.
    model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"--model {folder} lacks weights of {names[0]}: {', '.join(sorted(report['missing_keys']))}.")
    return model.eval()


def sample_shape(model: PreTrainedModel, args: Arguments) -> tuple[int, int, int, int]:
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    # An open axis must be longer than 1, or it is taken for one that is always 1.
    batch_size = max(args.batch_size, 2) if "batch" in args.dynamic else args.batch_size
    return batch_size, model.config.num_channels, args.height or height, args.width or width


def export(model: PreTrainedModel, shape: tuple[int, ...], dynamic: list[str], path: Path):
    """
    Writes the graph.

    Raises:
        `ValueError`: if an axis that should be open is fixed in it.
    """
    open_axes = {axis: torch.export.Dim.AUTO for name in dynamic for axis in AXES[name]}
    shapes = {"pixel_values": open_axes} if open_axes else None
    config = OnnxConfig(dynamic=bool(dynamic), dynamic_shapes=shapes)
    exported = OnnxExporter().export(model, {"pixel_values": torch.randn(shape)}, config)
    # Transformers 5.17 returns a program that has the graph, later ones what has it as its program.
    program = getattr(exported, "program", exported)
    graph = getattr(program, "model", program)
    fixed = [name for name in dynamic for axis in AXES[name] if str(graph.graph.inputs[0].shape[axis]).isdigit()]
    if fixed:
        raise ValueError(
            f"{type(model).__name__} does not export with an open {' and '.join(dict.fromkeys(fixed))}: the graph has "
            f"the shape {list(map(str, graph.graph.inputs[0].shape))}. Leave it out of --dynamic."
        )
    # Of each node the lines of code that it comes from, with the paths of this machine: as large as a small model.
    ClearMetadataAndDocStringPass()(graph)
    onnx_ir.save(graph, path)


def shapes_to_check(shape: tuple[int, ...], dynamic: list[str]) -> list[tuple[int, ...]]:
    batch_size, channels, height, width = shape
    shapes = [shape]
    if "batch" in dynamic:
        shapes += [(1, channels, height, width), (3, channels, height, width)]
    if "size" in dynamic:
        shapes += [(batch_size, channels, height + 37, width), (batch_size, channels, height, 2 * width - 13)]
    return shapes


def photographs(paths: list[Path]) -> list[Image.Image]:
    if paths:
        return [open_image(path) for path in paths]
    from skimage import data  # of the extra "demo"

    return [Image.fromarray(pixels) for pixels in (data.astronaut(), data.chelsea(), data.coffee())]


def pixels_of(pictures: list[Image.Image], shape: tuple[int, ...], image_processor) -> torch.Tensor:
    """The pictures, repeated to fill a batch, in the size and the normalisation that the model takes."""
    batch_size, _, height, width = shape
    resized = [pictures[i % len(pictures)].resize((width, height)) for i in range(batch_size)]
    if image_processor is None:
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1
    as_it_is = {"do_resize": False, "do_pad": False, "do_center_crop": False}
    return image_processor(images=resized, return_tensors="pt", **as_it_is)["pixel_values"]


@torch.no_grad()
def check(model: PreTrainedModel, onnx: OnnxModel, inputs: dict[str, torch.Tensor], tolerance: float) -> float:
    """
    The largest difference of all outputs on all inputs, as a share; raises `ValueError` if it is too large. Semantic
    logits are compared as the sums that they are the logarithm of: onnxruntime's sigmoid ends at 1e-8.
    """
    read = torch.exp if isinstance(model, ClusterFormerForSemanticSegmentation) else torch.as_tensor
    largest = 0.0
    for name, pixel_values in inputs.items():
        expected, found = (pytree.tree_leaves(run(pixel_values=pixel_values)) for run in (model, onnx))
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            one, other = read(one), read(other)
            difference = (one - other).abs().max().item() / max(one.abs().max().item(), 1)
            largest = max(largest, difference)
            if not difference <= tolerance:
                raise ValueError(
                    f"Output {number} of the graph differs from PyTorch by {difference:.2g} of its largest value on "
                    f"{name}: more than {tolerance}."
                )
    return largest


@torch.no_grad()
def agreement(model: PreTrainedModel, onnx: OnnxModel, inputs: dict[str, torch.Tensor]) -> float:
    """The share of the first output's vectors whose largest channel, a class, is PyTorch's."""
    shares = []
    for pixel_values in inputs.values():
        one, other = (pytree.tree_leaves(run(pixel_values=pixel_values))[0] for run in (model, onnx))
        dim = 1 if one.ndim == 4 else -1  # maps have their channels first
        shares.append((one.argmax(dim) == other.argmax(dim)).float().mean())
    return torch.stack(shares).mean().item()


@torch.no_grad()
def print_speed(runs: dict[str, Callable], pixel_values: torch.Tensor, rounds: int):
    """Medians of runs in turns, so that a change of the machine's load meets all alike."""
    times = {name: [] for name in runs}
    for number in range(rounds + 2):  # the first two warm up
        for name, run in runs.items():
            start = time.perf_counter()
            run(pixel_values=pixel_values)
            if number >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: median(values) for name, values in times.items()}
    shape, threads = " x ".join(map(str, pixel_values.shape)), torch.get_num_threads()
    print(f"speed at {shape}, {threads} threads: ", end="")
    print(", ".join(f"{name} {value:.1f} ms ({medians['PyTorch'] / value:.2f}x)" for name, value in medians.items()))


def check_accuracy_arguments(model: PreTrainedModel, args: Arguments):
    """Raises `ValueError` if --dataset_name is set and the accuracy cannot be measured, before minutes of export."""
    if args.dataset_name is None:
        return
    if type(model).__name__ not in ACCURACIES:
        raise ValueError(
            f"--dataset_name is for classifiers and detectors, and {args.model} is {type(model).__name__}."
        )
    if args.batch_size > 1 and "batch" not in args.dynamic:
        raise ValueError(
            f"--dataset_name takes picture by picture, and the graph would take {args.batch_size}: leave --batch_size "
            "out, or add `batch` to --dynamic."
        )


def print_accuracy(model: PreTrainedModel, args: Arguments, graphs: dict[str, OnnxModel]):
    """Top-1 or AP of PyTorch and of each graph, through the task's pipeline."""
    measure = ACCURACIES[type(model).__name__]
    forward = model.forward
    numbers = []
    for name, run in {"PyTorch": forward, **graphs}.items():
        model.forward = run
        numbers.append(f"{name} {measure(model, args):.4f}")
    model.forward = forward
    print(f"{'top-1' if measure is top_1 else 'AP'} on {args.dataset_name}: {', '.join(numbers)}")


def top_1(model: PreTrainedModel, args: Arguments) -> float:
    splits, _ = load_pictures(args.dataset_name)
    splits = pick_columns(splits, None, None)
    rows = splits["validation"] if "validation" in splits else splits["train"]
    rows = rows.select(range(min(args.max_eval_samples, len(rows))))
    class_ids = match_classes(rows.features["label"].names, model.config.label2id)
    classify = pipeline("image-classification", model=model, image_processor=args.model)
    names = [classify(open_image(row["image"]), top_k=1)[0]["label"] for row in rows]
    truth = [model.config.id2label[class_ids[label]] for label in rows["label"]]
    return float(np.mean([name == true for name, true in zip(names, truth)]))


def box_ap(model: PreTrainedModel, args: Arguments) -> float:
    splits = find_coco_splits(args.dataset_name)
    data = read_coco(*(splits.get("validation") or splits["train"]))
    data = data.select(range(min(args.max_eval_samples, len(data))))
    category_of = dict(zip(match_categories(data, model.config), data.category_ids))
    detect = pipeline("object-detection", model=model, image_processor=args.model)
    results = []
    for row, image_id in enumerate(data.image_ids.tolist()):
        picture = open_picture(data, row)
        inputs = detect.preprocess(picture)
        with torch.no_grad():
            outputs = model(**{name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs})
        size = [(picture.height, picture.width)]
        (found,) = detect.image_processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=size)
        for score, label, (left, top, right, bottom) in zip(
            *(found[key].tolist() for key in ("scores", "labels", "boxes"))
        ):
            if label in category_of:
                box = [left, top, right - left, bottom - top]
                results.append({"image_id": image_id, "category_id": category_of[label], "bbox": box, "score": score})
    return average_precision(data.ground_truth(), results)["AP"]


ACCURACIES = {"ClusterFormerForImageClassification": top_1, "ClusterFormerForObjectDetection": box_ap}


def main(args: list[str] | None = None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args)
    model = load_model(args.model)
    check_accuracy_arguments(model, args)
    try:
        image_processor = AutoImageProcessor.from_pretrained(args.model)
    except OSError:
        image_processor = None
    shape = sample_shape(model, args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path, start = args.output_dir / "model.onnx", time.perf_counter()
    export(model, shape, args.dynamic, path)
    model.config.save_pretrained(args.output_dir)
    if image_processor is not None:
        image_processor.save_pretrained(args.output_dir)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, exported in {time.perf_counter() - start:.0f} s")

    with torch.no_grad():
        structure = pytree.tree_structure(model(pixel_values=torch.randn(shape)))
    graphs = {"ONNX": OnnxModel(path, structure)}
    shapes, pictures = shapes_to_check(shape, args.dynamic), photographs(args.images)
    random = {f"random numbers of {size}": torch.randn(size) for size in shapes}
    real = {f"photographs of {size}": pixels_of(pictures, size, image_processor) for size in shapes}
    for kind, inputs in (("random numbers", random), ("photographs", real)):
        print(f"largest difference to PyTorch on {kind}: {check(model, graphs['ONNX'], inputs, TOLERANCE):.1e}")
    if args.int8:
        path = args.output_dir / "model_int8.onnx"
        quantize_dynamic(args.output_dir / "model.onnx", path, weight_type=QuantType.QInt8)
        graphs["ONNX int8"] = OnnxModel(path, structure)
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
        if isinstance(model, (ClusterFormerModel, ClusterFormerBackbone)):
            difference = check(model, graphs["ONNX int8"], real, tolerance=float("inf"))
            print(f"largest difference to PyTorch on photographs: {difference:.1e}")
        else:
            print(f"same class as PyTorch on photographs: {agreement(model, graphs['ONNX int8'], real):.1%}")
    print_speed({"PyTorch": model, **graphs}, random[f"random numbers of {shape}"], args.rounds)
    if args.dataset_name is not None:
        print_accuracy(model, args, graphs)


if __name__ == "__main__":
    main()
