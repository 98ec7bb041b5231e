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
"""Model cards: of a training's own folder, and of a repository on the Hub."""

import html
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Template
from transformers import PreTrainedModel
from transformers.modelcard import TrainingSummary, make_markdown_table
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .configuration_clusterformer import ClusterFormerConfig
from .provenance import PROVENANCE, fingerprint, read_for


logger = logging.get_logger(__name__)

TEMPLATES = Path(__file__).parent / "model_cards"
RECORD_NAME = "training_record.json"
DEFAULT_LICENSE = "apache-2.0"

# Of the task that a model's class name ends in: how the Hub calls it, the template of its usage, its main Auto class.
TASKS = {
    "ForImageClassification": ("image-classification", "image_classification", "AutoModelForImageClassification"),
    "ForObjectDetection": ("object-detection", "object_detection", "AutoModelForObjectDetection"),
    "ForSemanticSegmentation": ("image-segmentation", "semantic_segmentation", "AutoModelForSemanticSegmentation"),
    "ForInstanceSegmentation": ("image-segmentation", "universal_segmentation", "AutoModelForInstanceSegmentation"),
    "ForUniversalSegmentation": ("image-segmentation", "universal_segmentation", "AutoModelForUniversalSegmentation"),
}
BACKBONE = ("image-feature-extraction", "backbone", "AutoModel")
# Numbers of an evaluation that the card's metadata has, and their names on the Hub. Its table has all.
METRIC_TYPES = {name: name for name in ("accuracy", "top5_accuracy", "AP", "AP50", "AP75", "PQ", "SQ", "RQ")}
METRIC_TYPES |= {"mIoU": "mean_iou"}
NO_METRICS = ("runtime", "samples", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
MAX_CLASSES = 20


@dataclass
class TrainingRecord:
    """What is known of a training, kept in `training_record.json` beside its model."""

    description: str
    """What the model is and what it was trained from."""
    limits: str
    """What it must not be used for."""
    data: str
    """The training and evaluation pictures."""
    base_model: str | list[str] | None = None
    """The model on the Hub that it was trained from, be it through others that were not published."""
    license: str | list[str] | None = None
    """The weights' license, by its name on the Hub; None if it is not known."""
    datasets: list[str] = field(default_factory=list)
    """The data sets on the Hub that it was trained on."""
    hyperparameters: dict = field(default_factory=dict)
    course: list[dict] = field(default_factory=list)
    """A row for each evaluation in the training."""

    @classmethod
    def from_summary(cls, summary: TrainingSummary, description: str, limits: str, data: str) -> "TrainingRecord":
        tags = summary.dataset_tags or []
        return cls(
            description=description,
            limits=limits,
            data=data,
            base_model=summary.finetuned_from or None,
            license=summary.license,
            datasets=[tags] if isinstance(tags, str) else list(tags),
            hyperparameters=summary.hyperparameters or {},
            course=summary.eval_lines or [],
        )

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> "TrainingRecord":
        """Raises [`ForeignResultsError`] if it is the record of another model."""
        fields = read_for(model, path)
        del fields[PROVENANCE]
        return cls(**fields)

    def save(self, path: str | Path, model: PreTrainedModel):
        fields = asdict(self) | {PROVENANCE: {"weights": fingerprint(model)}}
        Path(path).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def origin(checkpoint: str) -> dict[str, str | list[str] | None]:
    """
    `finetuned_from` and `license` of a training, as [`TrainingSummary`] takes them, from the folder that it started
    from. A name on the Hub is left to [`TrainingSummary`], which asks there; an empty one is a training from scratch.
    """
    if not checkpoint:
        return {"license": DEFAULT_LICENSE}
    if not Path(checkpoint).is_dir():
        return {}
    return {"finetuned_from": _recorded(checkpoint, "base_model"), "license": known_license(checkpoint)}


def known_license(folder: str | Path) -> str | list[str] | None:
    """The license in the README.md of a model's folder, or in the record of its training; None if it is not known."""
    return _recorded(folder, "license")


def _recorded(folder: str | Path, name: str) -> str | list[str] | None:
    """A field of the README.md's metadata or of the record; a run's checkpoint without them has those of the run."""
    folder = Path(folder).resolve()
    card, record = folder / "README.md", folder / RECORD_NAME
    if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name) and not card.exists() and not record.exists():
        card, record = folder.parent / card.name, folder.parent / record.name
    found = None
    if card.is_file():
        try:
            found = ModelCard.load(card, ignore_metadata_errors=True).data.get(name)
        except (ValueError, yaml.YAMLError) as error:
            logger.warning(f"{card} cannot be read, so it does not tell the {name}: {error}")
    if not found and record.is_file():
        found = json.loads(record.read_text(encoding="utf-8")).get(name)
    return found


def render_model_card(
    model: PreTrainedModel,
    location: str,
    record: TrainingRecord | None = None,
    results: dict | None = None,
    license: str | list[str] | None = None,
    example: str | None = None,
) -> ModelCard:
    """
    The card of a model. Its numbers are those of `results` and the course of the training, and no others.

    Args:
        location: Where its code loads the model from: a folder, or a repository on the Hub.
        record: What is known of its training.
        results: A results file with its provenance, as [`read_for`] gives it.
        license: The weights' license, by its name on the Hub.
        example: A picture in the repository, if `location` is one that has a picture.
    """
    task, template, auto_class = model_task(model)
    is_ours = model.config.model_type == ClusterFormerConfig.model_type
    record = record or TrainingRecord(describe(model), name_classes(model), "Nothing is recorded of its training.")
    name, size = Path(location).name, getattr(model.config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    values = {
        "height": height,
        "width": width,
        "name": name,
        "location": location,
        "example": example,
        "picture": f'hf_hub_download("{location}", "{example}")' if example else '"picture.jpg"',
        "auto_class": auto_class,
        "is_ours": is_ours,
        "trust": ", trust_remote_code=True" if is_ours else "",
    }
    measured = eval_results(results, task)
    tables = results_tables(results, set(map(str, model.config.id2label.values())))
    data = ModelCardData(
        base_model=record.base_model,
        datasets=record.datasets or None,
        eval_results=measured or None,
        library_name="transformers",
        license=license,
        model_name=name if measured else None,
        pipeline_tag=task,
        tags=[task, "vision", model.config.model_type],
    )
    return ModelCard.from_template(
        data,
        template_path=TEMPLATES / "card.md",
        usage=Template((TEMPLATES / f"{template}.md").read_text(encoding="utf-8")).render(values),
        architecture=architecture(model) if is_ours else None,
        results=tables[0],
        class_results=tables[1],
        measured=results and results[PROVENANCE],
        num_samples=results and results.get("eval_samples"),
        record=record,
        course=make_markdown_table(without_empty_columns(record.course)),
        **values,
    )


def model_task(model: PreTrainedModel) -> tuple[str, str, str]:
    """The task's name on the Hub, the template of its usage and the main Auto class."""
    class_name = type(model).__name__
    return next((task for ending, task in TASKS.items() if class_name.endswith(ending)), BACKBONE)


def variant(config: ClusterFormerConfig) -> str:
    """`ClusterFormer-Tiny`, `ClusterFormer-Small`, or `ClusterFormer` for other sizes."""
    for name in ("tiny", "small"):
        sizes = getattr(ClusterFormerConfig, name)()
        if all(list(getattr(config, key)) == list(getattr(sizes, key)) for key in ("depths", "hidden_sizes")):
            return f"ClusterFormer-{name.capitalize()}"
    return "ClusterFormer"


def describe(model: PreTrainedModel) -> str:
    return (
        f"`{type(model).__name__}` with {model.num_parameters():,} parameters. "
        "ClusterFormer: [Clustering As A Universal Visual Learner](https://arxiv.org/abs/2309.13196)."
    )


def architecture(model: PreTrainedModel) -> str:
    def listed(numbers) -> str:
        return ", ".join("x".join(map(str, n)) if isinstance(n, (list, tuple)) else str(n) for n in numbers)

    config = model.config
    encoder = (
        f"{variant(config)}, clustering `{config.clustering}`: stages of {listed(config.depths)} blocks, "
        f"{listed(config.hidden_sizes)} channels, {listed(config.num_attention_heads)} heads and centre grids of "
        f"{listed(config.center_grid)}, T = {config.num_iterations} (E- and M-steps of a clustering)."
    )
    if getattr(model, "decoder", None) is None:
        return encoder
    return (
        f"{encoder} Decoder layers: {config.decoder_layers}, of {config.decoder_hidden_size} channels and "
        f"{config.decoder_attention_heads} heads, T = {config.decoder_num_iterations}."
    )


def name_classes(model: PreTrainedModel) -> str:
    """A sentence with the classes that a model knows; empty for a backbone."""
    if model_task(model) == BACKBONE:
        return "It gives features and no answers: it is made to be trained further."
    return f"It knows {len(model.config.id2label)} classes: {list_classes(model.config.id2label.values())}."


def list_classes(names: Iterable[str]) -> str:
    """The names in Markdown, of many the first."""
    names = [as_text(str(name)) for name in names]
    more = f" and {len(names) - MAX_CLASSES} more" if len(names) > MAX_CLASSES else ""
    return f"{', '.join(names[:MAX_CLASSES])}{more}"


def as_text(name: str) -> str:
    """Of the name of a class, which is neither HTML nor ends a cell of a table."""
    return html.escape(name, quote=False).replace("|", r"\|")


def measured_numbers(results: dict | None) -> dict[str, float]:
    """By the metrics' names. pycocotools has -1 where there is nothing to measure."""
    names = {key: key.removeprefix("eval_") for key in results or {} if key.startswith("eval_")}
    return {name: results[key] for key, name in names.items() if name not in NO_METRICS and results[key] != -1}


def results_tables(results: dict | None, class_names: Iterable[str]) -> tuple[str, str]:
    """Markdown of the numbers of all classes together and of each class; empty without results."""
    rows, class_rows = [], []
    for name, value in measured_numbers(results).items():
        is_of_class = name.partition("_")[2] in class_names
        (class_rows if is_of_class else rows).append({"Metric": as_text(name), "Value": value})
    return make_markdown_table(rows), make_markdown_table(class_rows)


def without_empty_columns(course: list[dict]) -> list[dict]:
    """pycocotools has -1 where there is nothing to measure."""
    return [
        {name: value for name, value in row.items() if any(other.get(name) != -1 for other in course)} for row in course
    ]


def eval_results(results: dict | None, task: str) -> list[EvalResult]:
    numbers = measured_numbers(results)
    dataset = (results and results[PROVENANCE]["dataset"]) or "unknown"
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric_type,
            metric_name=name,
            metric_value=numbers[name],
        )
        for name, metric_type in METRIC_TYPES.items()
        if name in numbers
    ]
