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
Speed and memory of ClusterFormer beside models of its size, with random weights and nothing to download.

    python scripts/benchmark.py
    python scripts/benchmark.py --sections inference --sizes 224 --batch_sizes 1 8 --rounds 10 --output results.json

All contestants of a table take turns in one process (A, B, C, A, B, C, ...), so that a change of the machine's load
meets them alike; a time is the median over the rounds. A large matrix product takes its turn too: multiply-accumulates
over time against its own give the share of the machine's peak. The ratios come first: they carry over to other
machines, the times do not.

A section is a function from [`Settings`] to tables; a new task is one more entry of `SECTIONS`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median

import torch
from plain_released import PlainReleasedClustering
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    HfArgumentParser,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    PreTrainedModel,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    SwinConfig,
    SwinForImageClassification,
    set_seed,
)
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from clusterformer_hf import (
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    ClusterFormerForUniversalSegmentation,
)
from clusterformer_hf.data.digits import write_digits
from clusterformer_hf.provenance import environment, machine


# A call faster than this is repeated within its turn: the clock and the wait for an accelerator cost time too.
SHORTEST_TURN = 0.05  # seconds
NUM_LABELS = 1000
# COCO's, with those that its file leaves out, and its classes of things and stuff.
DETECTION_LABELS, SEGMENTATION_LABELS = 91, 133
BACKBONE_STAGES = ["stage1", "stage2", "stage3", "stage4"]
# A training on files whose loader and model take about as long as each other, on one core each.
LOADED_DIGITS, LOADED_BATCH_SIZE = 4000, 64
LOADED_MODEL = {
    "image_size": 32,
    "hidden_sizes": [16, 32, 64, 80],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "center_grid": [4, 4, 4, 4],
    "sr_ratios": [2, 1, 1, 1],
}
# Sides of the pictures of `growth` and `compilation`.
GROWTH_SIDES, COMPILED_SIDE = (256, 1024), 224
TIMED_IMPORTS = """
from time import perf_counter
start = perf_counter()
from transformers import SwinForImageClassification
between = perf_counter()
import clusterformer_hf
print(between - start, perf_counter() - between)
"""
AUGMENTATION = ["--crop_scale=1", "--affine=12", "--randaugment_magnitude=9", "--random_erasing=0.25"]


@dataclass
class BenchmarkArguments:
    """Command line of the benchmark."""

    sections: list[str] = field(
        default_factory=lambda: list(SECTIONS), metadata={"help": "Tables to print, in this order."}
    )
    sizes: list[int] = field(
        default_factory=lambda: [224, 512, 1024], metadata={"help": "Image sides of `inference`, in pixels."}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Batch sizes of `inference`."})
    training_size: int = field(default=224, metadata={"help": "Image side of `training`, in pixels."})
    training_batch_size: int = field(default=16, metadata={"help": "Batch size of `training`."})
    released_sizes: list[int] = field(
        default_factory=lambda: [256, 512],
        metadata={"help": "Image sides of `released`, in pixels: multiples of 128."},
    )
    detection_sizes: list[str] = field(
        default_factory=lambda: ["800x1333"], metadata={"help": "Images of `detection`, height x width in pixels."}
    )
    segmentation_sizes: list[str] = field(
        default_factory=lambda: ["512x512", "1024x1024"],
        metadata={"help": "Images of `segmentation`, height x width in pixels."},
    )
    segmentation_training_size: str = field(
        default="512x512", metadata={"help": "Images of the training step of `segmentation`."}
    )
    rounds: int = field(default=3, metadata={"help": "Least number of rounds that a median is taken over."})
    min_seconds: float = field(default=5.0, metadata={"help": "Rounds go on for at least this long a table."})
    devices: list[str] = field(
        default_factory=lambda: ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"],
        metadata={"help": "Devices to measure on."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "float32, bfloat16 or float16; float32 on the CPU and bfloat16 elsewhere if not given. Training "
            "keeps float32 weights and uses autocast."
        },
    )
    compile: bool = field(default=False, metadata={"help": "Compile all models with torch.compile."})
    channels_last: bool = field(default=False, metadata={"help": "Give all models weights and images channels last."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write the results to."})


@dataclass
class Settings:
    """What the sections share: the command line and the device with its precision."""

    arguments: BenchmarkArguments
    device: torch.device
    dtype: torch.dtype

    def place(self, tensor_or_module, dtype: torch.dtype | None = None):
        memory_format = torch.channels_last if self.arguments.channels_last else torch.contiguous_format
        return tensor_or_module.to(self.device, dtype or self.dtype, memory_format=memory_format)

    def compiled(self, model: nn.Module) -> nn.Module:
        return torch.compile(model) if self.arguments.compile else model

    def images(self, batch_size: int, size: tuple[int, int], dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.place(torch.randn(batch_size, 3, *size), dtype)


@dataclass
class Contestant:
    """
    One line of a table.

    Args:
        name (`str`): Its name.
        run (`Callable`): The call that is measured.
        gmacs (`float`): Billions of multiply-accumulates of the call.
    """

    name: str
    run: Callable[[], object]
    gmacs: float


def clusterformer(**kwargs) -> nn.Module:
    return ClusterFormerForImageClassification(ClusterFormerConfig.tiny(num_labels=NUM_LABELS, **kwargs))


def swin() -> nn.Module:
    # Without stochastic depth, as the others.
    return SwinForImageClassification(SwinConfig(num_labels=NUM_LABELS, drop_path_rate=0.0))


def convnext() -> nn.Module:
    return ConvNextForImageClassification(ConvNextConfig(num_labels=NUM_LABELS))


def released(form: str) -> nn.Module:
    config = ClusterFormerConfig.released_tiny(num_labels=NUM_LABELS, clustering=form)
    return ClusterFormerForImageClassification(config)


def plain_released(form: str, weights: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """The same model with the plain transcription of the clustering."""
    model = released(form)
    for stage_idx, stage in enumerate(model.clusterformer.encoder.stages):
        for layer in stage.layers:
            layer.clustering = PlainReleasedClustering(model.config, stage_idx)
    if weights is not None:
        model.load_state_dict(weights)
    return model


CLASSIFIERS = {"ClusterFormer-T": clusterformer, "Swin-T": swin, "ConvNeXt-T": convnext}


def detector() -> nn.Module:
    return ClusterFormerForObjectDetection(ClusterFormerConfig.tiny(num_labels=DETECTION_LABELS))


def detr() -> nn.Module:
    backbone = ResNetConfig(out_features=BACKBONE_STAGES[-1:])  # a ResNet-50
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, num_labels=DETECTION_LABELS))


def deformable_detr() -> nn.Module:
    backbone = ResNetConfig(out_features=BACKBONE_STAGES[1:])
    return DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=backbone, num_labels=DETECTION_LABELS))


class PadToMultiple(nn.Module):
    """Pads images at the right and at the bottom."""

    def __init__(self, multiple: int):
        super().__init__()
        self.multiple = multiple

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        return nn.functional.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))


def rt_detr() -> nn.Module:
    # It takes multiples of 32 only.
    return nn.Sequential(PadToMultiple(32), RTDetrForObjectDetection(RTDetrConfig(num_labels=DETECTION_LABELS)))


def segmenter() -> nn.Module:
    return ClusterFormerForUniversalSegmentation(ClusterFormerConfig.tiny(num_labels=SEGMENTATION_LABELS))


def swin_backbone() -> SwinConfig:
    """Swin-T without stochastic depth, as our backbone."""
    return SwinConfig(out_features=BACKBONE_STAGES, drop_path_rate=0.0)


def mask2former() -> nn.Module:
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=swin_backbone(), num_labels=SEGMENTATION_LABELS)
    )


def maskformer() -> nn.Module:
    decoder = DetrConfig(dropout=0.0)  # as the others
    config = MaskFormerConfig(backbone_config=swin_backbone(), decoder_config=decoder, num_labels=SEGMENTATION_LABELS)
    return MaskFormerForInstanceSegmentation(config)


def with_auxiliary_loss(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes, with a loss on every decoder layer, which ours and Mask2Former have by default."""
    model = build()
    if isinstance(model, MaskFormerForInstanceSegmentation):
        model.config.use_auxiliary_loss = True
        model.config.output_hidden_states = True  # of the layers, without which there is no auxiliary loss
    return model


DETECTORS = {
    "ClusterFormer-T": detector,
    "DETR-R50": detr,
    "Deformable DETR-R50": deformable_detr,
    "RT-DETR-R50": rt_detr,
}
SEGMENTERS = {"ClusterFormer-T": segmenter, "Mask2Former-Swin-T": mask2former, "MaskFormer-Swin-T": maskformer}


def inference(settings: Settings):
    """Classifiers of the same size, forward pass."""
    sizes = [(side, side) for side in settings.arguments.sizes]
    yield from forward_tables("inference", CLASSIFIERS, sizes, settings.arguments.batch_sizes, settings)


def detection(settings: Settings):
    """Detectors, forward pass of one image."""
    yield from forward_tables(
        "detection", DETECTORS, map(parse_size, settings.arguments.detection_sizes), [1], settings
    )


def segmentation(settings: Settings):
    """Universal segmentation models, forward pass of one image and a training step."""
    sizes = map(parse_size, settings.arguments.segmentation_sizes)
    yield from forward_tables("segmentation", SEGMENTERS, sizes, [1], settings)
    size = parse_size(settings.arguments.segmentation_training_size)
    corners = [torch.zeros(1, *size, device=settings.device) for _ in range(2)]
    for i, corner in enumerate(corners):
        corner[:, : size[0] // (2 + i), : size[1] // 2] = 1
    labels = {
        "mask_labels": [torch.cat(corners)],
        "class_labels": [torch.arange(len(corners), device=settings.device)],
    }
    builders = {name: partial(with_auxiliary_loss, build) for name, build in SEGMENTERS.items()}
    yield training_table("segmentation, training step", builders, 1, size, labels, settings)


def forward_tables(name: str, builders: dict, sizes, batch_sizes: list[int], settings: Settings):
    """A table for each image and batch size."""
    models = {name: settings.place(build()).eval() for name, build in builders.items()}
    compiled = {name: settings.compiled(model) for name, model in models.items()}
    for size in sizes:
        image = settings.images(1, size)
        macs = {name: forward_gmacs(model, image) for name, model in models.items()}
        for batch_size in batch_sizes:
            images = settings.images(batch_size, size)
            contestants = [
                Contestant(name, partial(forward, model, images), batch_size * macs[name])
                for name, model in compiled.items()
            ]
            yield table(f"{name}, {size[0]} x {size[1]}, batch {batch_size}", contestants, settings, batch_size)


def training(settings: Settings):
    """Classifiers of the same size, a whole training step: forward, backward, AdamW."""
    size, batch_size = settings.arguments.training_size, settings.arguments.training_batch_size
    builders = {**CLASSIFIERS, "ClusterFormer-T, gradient checkpointing": checkpointed}
    labels = {"labels": torch.randint(NUM_LABELS, (batch_size,), device=settings.device)}
    yield training_table("training step", builders, batch_size, (size, size), labels, settings)


def loading(settings: Settings):
    """Training from files: samples a second of the training script's loader, of its model, and of both together."""
    is_cpu = settings.device.type == "cpu"
    workers = 1 if is_cpu else max(1, os.cpu_count() - 1)
    speeds = training_throughput(settings, workers)
    names = {"loader": "loader alone", "model": "model alone", "both": "both together"}
    slower = min(speeds["loader"], speeds["model"])
    rows = [
        {"measured": name, "samples_per_second": speeds[key], "of_slower": speeds[key] / slower}
        for key, name in names.items()
    ]
    note = f"digits from PNG files, batch {LOADED_BATCH_SIZE}, data workers: {workers}"
    if is_cpu:
        note += f", model on one thread: to overlap, each needs an idle core for itself, of {os.cpu_count()} here"
    yield {"title": "training from files", "note": note, "rows": rows}


def training_throughput(settings: Settings, workers: int) -> dict[str, float]:
    """What `--measure_throughput` of scripts/run_image_classification.py finds, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        digits = write_digits(Path(folder, "digits"), LOADED_DIGITS, 10)
        flags = [f"--dataset_name={digits}", f"--output_dir={folder}/out", "--do_train", "--measure_throughput"]
        flags += [f"--config_overrides={json.dumps(LOADED_MODEL)}", f"--dataloader_num_workers={workers}"]
        flags += [f"--per_device_train_batch_size={LOADED_BATCH_SIZE}", "--report_to=none", *AUGMENTATION]
        flags += {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}.get(settings.dtype, [])
        variables = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache"}
        if settings.device.type == "cpu":
            flags.append("--use_cpu")
            variables["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, str(Path(__file__).with_name("run_image_classification.py")), *flags]
        ended = subprocess.run(command, env=variables, capture_output=True, text=True)
        if ended.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stderr[-2000:]}")
        return json.loads(Path(folder, "out", "throughput_results.json").read_text())


def training_table(title: str, builders: dict, batch_size: int, size: tuple[int, int], labels: dict, settings) -> dict:
    images = settings.images(batch_size, size, torch.float32)
    contestants = []
    for name, build in builders.items():
        model = settings.place(build(), torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters())
        run = partial(training_step, settings.compiled(model), optimizer, images, labels, settings.dtype)
        # As usual: the backward pass counts twice the forward pass, recomputation does not count.
        macs = 3 * batch_size * forward_gmacs(model.eval(), images[:1])
        model.train()
        contestants.append(Contestant(name, run, macs))
    return table(f"{title}, {size[0]} x {size[1]}, batch {batch_size}", contestants, settings, batch_size)


def released_forms(settings: Settings):
    """The released forms against their plain transcription with the same weights."""
    for form in ("release", "release_flash"):
        ours = released(form)
        models = {"ours": ours, "plain transcription": plain_released(form, ours.state_dict())}
        models = {name: settings.place(model).eval() for name, model in models.items()}
        compiled = {name: settings.compiled(model) for name, model in models.items()}
        for side in settings.arguments.released_sizes:
            images = settings.images(1, (side, side))
            contestants = [
                Contestant(name, partial(forward, model, images), forward_gmacs(models[name], images))
                for name, model in compiled.items()
            ]
            logits = [contestant.run().logits.double() for contestant in contestants]
            result = table(f"{form}, {side} x {side}, batch 1", contestants, settings, 1)
            result["largest_difference"] = ((logits[0] - logits[1]).abs().max() / logits[1].abs().max()).item()
            yield result


def growth(settings: Settings):
    """How time and memory of the classifiers grow with the picture, forward pass of one image."""
    small, large = GROWTH_SIDES
    models = {name: settings.compiled(settings.place(build()).eval()) for name, build in CLASSIFIERS.items()}
    images = [settings.images(1, (side, side)) for side in GROWTH_SIDES]
    runs = [partial(forward, model, image) for model in models.values() for image in images]
    memory = [peak_memory(run, settings.device) for run in runs]  # the profiled call also warms up
    times, rounds = interleaved_medians(runs, settings.arguments.rounds, settings.arguments.min_seconds)
    rows = [
        {"model": name, "time_growth": times[i + 1] / times[i], "memory_growth": memory[i + 1] / memory[i]}
        for i, name in zip(range(0, len(runs), 2), models)
    ]
    note = f"{rounds} rounds, {(large / small) ** 2:g} times the pixels"
    yield {"title": f"growth from {small} x {small} to {large} x {large}, batch 1", "note": note, "rows": rows}


def compilation(settings: Settings):
    """Classifiers with and without `torch.compile`, forward pass."""
    models = {name: settings.place(build()).eval() for name, build in CLASSIFIERS.items()}
    for batch_size in settings.arguments.batch_sizes:
        images = settings.images(batch_size, (COMPILED_SIDE, COMPILED_SIDE))
        rows = [compilation_row(name, model, images, settings) for name, model in models.items()]
        note = f"at least {settings.arguments.rounds} rounds of each model"
        yield {
            "title": f"torch.compile, {COMPILED_SIDE} x {COMPILED_SIDE}, batch {batch_size}",
            "note": note,
            "rows": rows,
        }


def compilation_row(name: str, model: nn.Module, images: torch.Tensor, settings: Settings) -> dict:
    torch.compiler.reset()  # or a second batch size would compile a graph for any
    with torch.no_grad():
        graph_breaks = torch._dynamo.explain(model)(images).graph_break_count
    torch.compiler.reset()
    runs = [partial(forward, each, images) for each in (model, torch.compile(model))]
    eager, compiled = warm_milliseconds(runs, settings)
    return {
        "model": name,
        "compiled_speed": eager / compiled,
        "eager_milliseconds": eager,
        "compiled_milliseconds": compiled,
        "graph_breaks": graph_breaks,
    }


def start_up(settings: Settings):
    """What the package adds to an import of Transformers; loading saved weights, and reading their file."""
    rounds = settings.arguments.rounds
    commands = [[sys.executable, "-c", TIMED_IMPORTS]] * rounds
    times = [map(float, subprocess.check_output(command, text=True).split()) for command in commands]
    names = ("Swin of Transformers", "clusterformer_hf after it")
    rows = [{"measured": name, "milliseconds": 1e3 * median(column)} for name, column in zip(names, zip(*times))]
    yield {"title": "import", "note": f"{rounds} new processes", "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        rows = [loading_row(name, build(), Path(folder, name), settings) for name, build in CLASSIFIERS.items()]
    yield {"title": "from_pretrained", "note": f"at least {rounds} rounds of each model", "rows": rows}


def loading_row(name: str, model: PreTrainedModel, folder: Path, settings: Settings) -> dict:
    model.save_pretrained(folder)
    runs = [partial(type(model).from_pretrained, folder), (folder / SAFE_WEIGHTS_NAME).read_bytes]
    loading, reading = warm_milliseconds(runs, settings)
    return {
        "model": name,
        "times_reading": loading / reading,
        "loading_milliseconds": loading,
        "reading_milliseconds": reading,
    }


SECTIONS = {
    "inference": inference,
    "growth": growth,
    "compilation": compilation,
    "training": training,
    "loading": loading,
    "detection": detection,
    "segmentation": segmentation,
    "released": released_forms,
    "start_up": start_up,
}


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from `HEIGHTxWIDTH`."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"A size must be HEIGHTxWIDTH in pixels, such as 800x1333, got {text!r}.")
    return int(sides[0]), int(sides[1])


@torch.no_grad()
def forward(model: nn.Module, images: torch.Tensor):
    return model(images)


def training_step(model, optimizer, images, labels, dtype) -> torch.Tensor:
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = model(images, **labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def checkpointed() -> nn.Module:
    model = clusterformer()
    model.gradient_checkpointing_enable()
    return model


def cluster_flops(keys_shape, values_shape, centers_shape, *others, **kwargs) -> int:
    """Of the clustering in kernels: the products of the E-steps, the M-steps and the queries."""
    (batch_size, num_pixels, num_heads, channels), num_centers = keys_shape, centers_shape[2]
    macs = num_centers * channels * (2 * num_pixels + channels)
    return 2 * batch_size * num_heads * macs * others[-1]


def forward_gmacs(model: nn.Module, images: torch.Tensor) -> float:
    """Billions of multiply-accumulates in the matrix products, convolutions and attentions of a forward pass."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # the counter hooks into gradients, and DETR's queries have none to hook into
    kernels = {torch.ops.clusterformer.cluster: cluster_flops}
    # As plain products: the counter has no entry for the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        forward(model, images)
    for parameter in trained:
        parameter.requires_grad_(True)
    return counter.get_total_flops() / 2e9


def large_product(settings: Settings) -> Contestant:
    """A square matrix product, large enough for the machine's peak."""
    side = 8192 if settings.device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=settings.device, dtype=settings.dtype) for _ in range(2))
    return Contestant("matrix product", lambda: left @ right, side**3 / 1e9)


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """
    Mebibytes that a call allocates beyond what is there before it: activations, gradients, the operators' own buffers.

    On the CPU the profiler reports every allocation and release of PyTorch's allocator, so the number is exact and the
    same in every run, unlike the process's resident memory, which depends on what the C library keeps back.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        current += event["args"]["Bytes"]
        peak = max(peak, current)
    return peak / 2**20


def seconds(run: Callable[[], object], repeats: int) -> float:
    start = timer()
    for _ in range(repeats):
        run()
    return (timer() - start) / repeats


def interleaved_medians(runs: list[Callable[[], object]], rounds: int, min_seconds: float) -> tuple[list[float], int]:
    """Median seconds of each call and the number of rounds. Every call has been warmed up before."""
    start = timer()
    times = [[seconds(run, 1) for run in runs]]
    repeats = [max(1, round(SHORTEST_TURN / time)) for time in times[0]]
    while len(times) < rounds or timer() - start < min_seconds:
        times.append([seconds(run, repeat) for run, repeat in zip(runs, repeats)])
    return [median(column) for column in zip(*times)], len(times)


def warm_milliseconds(runs: list[Callable[[], object]], settings: Settings) -> list[float]:
    for run in runs:
        run()
    times, _ = interleaved_medians(runs, settings.arguments.rounds, settings.arguments.min_seconds)
    return [1e3 * time for time in times]


def table(title: str, contestants: list[Contestant], settings: Settings, batch_size: int) -> dict:
    """Measures the contestants, the first of which the others are compared with."""
    for contestant in contestants:
        contestant.run()  # warm-up: compiles, plans convolutions, creates the optimizer's state
    memory = [peak_memory(contestant.run, settings.device) for contestant in contestants]
    product = large_product(settings)
    product.run()
    runs = [contestant.run for contestant in (*contestants, product)]
    times, rounds = interleaved_medians(runs, settings.arguments.rounds, settings.arguments.min_seconds)
    peak = product.gmacs / times[-1]
    rows = [
        {
            "model": contestant.name,
            "speed_of_first": time / times[0],
            "memory_of_first": memory[0] / mebibytes,
            "milliseconds": 1e3 * time,
            "images_per_second": batch_size / time,
            "mebibytes": mebibytes,
            "gmacs": contestant.gmacs,
            "peak_share": contestant.gmacs / time / peak,
        }
        for contestant, time, mebibytes in zip(contestants, times, memory)
    ]
    return {"title": title, "rounds": rounds, "product_gflops": 2 * peak, "rows": rows}


COLUMNS = {
    "model": ("model", "{}"),
    "speed_of_first": ("speed of the first", "{:.2f} x"),
    "memory_of_first": ("its memory", "{:.2f} x"),
    "milliseconds": ("ms", "{:.1f}"),
    "images_per_second": ("images/s", "{:.2f}"),
    "mebibytes": ("peak MiB", "{:.1f}"),
    "gmacs": ("GMACs", "{:.2f}"),
    "peak_share": ("share of peak", "{:.2f}"),
    "measured": ("measured", "{}"),
    "samples_per_second": ("samples/s", "{:.1f}"),
    "of_slower": ("of the slower alone", "{:.2f}"),
    "time_growth": ("times the time", "{:.1f}"),
    "memory_growth": ("times the memory", "{:.1f}"),
    "compiled_speed": ("compiled, speed of eager", "{:.2f} x"),
    "eager_milliseconds": ("eager, ms", "{:.1f}"),
    "compiled_milliseconds": ("compiled, ms", "{:.1f}"),
    "graph_breaks": ("graph breaks", "{}"),
    "times_reading": ("times reading the file", "{:.2f}"),
    "loading_milliseconds": ("loading, ms", "{:.1f}"),
    "reading_milliseconds": ("reading, ms", "{:.1f}"),
}


def markdown(result: dict) -> str:
    """A table as text."""
    columns = {key: COLUMNS[key] for key in result["rows"][0]}
    cells = [[title for title, _ in columns.values()]]
    cells += [[form.format(row[key]) for key, (_, form) in columns.items()] for row in result["rows"]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([f"## {result['title']}", f"({result.get('note') or rounds_note(result)})", *lines, ""])


def rounds_note(result: dict) -> str:
    note = f"{result['rounds']} rounds, matrix product at {result['product_gflops']:.0f} GFLOP/s"
    if "largest_difference" in result:
        note += f", logits differ by {result['largest_difference']:.1e} of the largest"
    return note


def describe(settings: Settings) -> dict:
    """When, where and with what the numbers were taken."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": str(settings.device),
        **environment(),
        "machine": machine(settings.device),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "dtype": str(settings.dtype).removeprefix("torch."),
    }


def check(arguments: BenchmarkArguments):
    for size in (*arguments.detection_sizes, *arguments.segmentation_sizes, arguments.segmentation_training_size):
        parse_size(size)
    unknown = [section for section in arguments.sections if section not in SECTIONS]
    if unknown:
        raise ValueError(f"Unknown sections {unknown}: choose from {list(SECTIONS)}.")
    if arguments.rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {arguments.rounds}.")
    if arguments.dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {arguments.dtype!r}.")


def main(argv: list[str] | None = None) -> dict:
    """Runs the benchmark with these flags; prints the tables and returns them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler announces its start and stop otherwise
    logging.disable_progress_bar()  # of weights that are saved and loaded
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    check(arguments)
    results = {"arguments": asdict(arguments), "runs": []}
    for name in arguments.devices:
        device = torch.device(name)
        dtype = arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16")
        settings = Settings(arguments, device, getattr(torch, dtype))
        run = {"machine": describe(settings), "tables": []}
        print(", ".join(f"{key} {value}" for key, value in run["machine"].items()), "\n", flush=True)
        results["runs"].append(run)
        for section in arguments.sections:
            set_seed(0)
            for result in SECTIONS[section](settings):
                run["tables"].append({"section": section, **result})
                print(markdown(result), flush=True)
                if arguments.output:
                    Path(arguments.output).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
