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
"""A complete repository for the Hub from a trained model, and its upload."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from PIL import Image, ImageDraw
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from .model_card import TrainingRecord, render_model_card
from .modeling_clusterformer import ClusterFormerPreTrainedModel
from .provenance import read_for


logger = logging.get_logger(__name__)

EXAMPLE_NAME = "example.png"
RESULTS_NAME = "eval_results.json"
PICTURE = re.compile(r"!\[[^\]]*\]\(([\w.-]+)\)")  # of the same folder, in Markdown
# What Auto classes load each model from its repository, where this package is not installed, beside AutoModel and
# AutoBackbone. Pipelines take the first that they find, so a class that would read the weights in another way is not
# named. A ClusterFormerBackbone is not published: AutoModel and the pipeline would read its weights as those of a
# ClusterFormerModel, which AutoBackbone loads as well.
AUTO_CLASSES = {
    "ClusterFormerModel": (),
    "ClusterFormerForImageClassification": ("AutoModelForImageClassification",),
    "ClusterFormerForObjectDetection": ("AutoModelForObjectDetection",),
    "ClusterFormerForSemanticSegmentation": ("AutoModelForSemanticSegmentation", "AutoModelForImageSegmentation"),
    "ClusterFormerForUniversalSegmentation": (
        "AutoModelForUniversalSegmentation",
        "AutoModelForInstanceSegmentation",
        "AutoModelForImageSegmentation",
    ),
}
# Files of an earlier upload, at a repository's top, that would be taken for the new model's weights, code or results.
STALE_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "*_clusterformer.py",
    RESULTS_NAME,
)


class HubError(Exception):
    """An upload that did not happen, and what to do about it."""


def export_repository(
    model: ClusterFormerPreTrainedModel,
    image_processor: BaseImageProcessor,
    out_dir: str | Path,
    repo_id: str,
    *,
    results: str | Path | None = None,
    record: str | Path | None = None,
    example: Image.Image | None = None,
    license: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """
    Writes the folder of a Hub repository: weights as safetensors, config, image processor, the modelling files that the
    weights need, README.md, an example picture and the evaluation's results. It loads with `trust_remote_code=True`
    where only Transformers and PyTorch are installed.

    Args:
        out_dir: A new or an empty folder.
        repo_id: `USER/NAME`, where the code of README.md loads the model from.
        results: The JSON file of the model's evaluation. Without it README.md has no numbers.
        record: The `training_record.json` of the model's training. Pictures beside it that it shows are taken too.
        example: A picture that may be published. Without it one is drawn.
        license: The weights' license, by its name on the Hub; that of the record if unset.
        max_shard_size: Weights of more bytes (a number, or as `"5GB"`) are split into files of this size.

    Raises:
        `ValueError`: if the model, the name or a file does not fit; [`ForeignResultsError`] if a file is of other
            weights than the model's.
        `FileExistsError`: if `out_dir` is not empty.
    """
    check_repo_id(repo_id)
    if type(model).__name__ not in AUTO_CLASSES or not isinstance(model, ClusterFormerPreTrainedModel):
        raise ValueError(
            f"{type(model).__module__}.{type(model).__name__} cannot be published, only {', '.join(AUTO_CLASSES)}."
        )
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} is not an empty folder.")
    # Before anything is written.
    training = TrainingRecord.load(record, model) if record is not None else None
    numbers = read_for(model, results) if results is not None else None
    pictures = [Path(record).with_name(name) for name in PICTURE.findall(training.data)] if training else []
    missing = [str(path) for path in pictures if not path.is_file()]
    if missing:
        raise ValueError(f"{record} shows pictures that are not there: {', '.join(missing)}.")

    model.save_pretrained(out_dir, max_shard_size=max_shard_size)
    image_processor.save_pretrained(out_dir)
    write_auto_map(model, out_dir / CONFIG_NAME)
    if numbers is not None:
        shutil.copyfile(results, out_dir / RESULTS_NAME)
    for path in pictures:
        shutil.copyfile(path, out_dir / path.name)
    (example or draw_example(model.config.image_size)).convert("RGB").save(out_dir / EXAMPLE_NAME)
    license = license or (training.license if training else None)
    card = render_model_card(model, repo_id, training, numbers, license, EXAMPLE_NAME)
    card.save(out_dir / "README.md")
    return out_dir


def write_auto_map(model: PreTrainedModel, path: Path):
    """Lets every Auto class of the model's task load it; `save_pretrained` names one of them."""
    config = json.loads(path.read_text(encoding="utf-8"))
    modelling, configuration = (type(part).__module__.split(".")[-1] for part in (model, model.config))
    config["auto_map"] = {
        "AutoConfig": f"{configuration}.ClusterFormerConfig",
        "AutoModel": f"{modelling}.ClusterFormerModel",
        "AutoBackbone": f"{modelling}.ClusterFormerBackbone",
    }
    config["auto_map"] |= {name: f"{modelling}.{type(model).__name__}" for name in AUTO_CLASSES[type(model).__name__]}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def draw_example(size: int | list[int] | tuple[int, int]) -> Image.Image:
    """A disc and a square on a gradient: a picture that anybody may publish."""
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    sky = np.stack([80 + 60 * columns, 120 + 60 * rows, 200 - 90 * rows], axis=-1)
    picture = Image.fromarray(sky.astype(np.uint8))
    draw, unit = ImageDraw.Draw(picture), min(height, width) / 8
    draw.ellipse([unit, unit, 4 * unit, 4 * unit], fill=(240, 200, 60))
    draw.rectangle([width - 4 * unit, height - 4 * unit, width - unit, height - unit], fill=(190, 60, 50))
    return picture


def check_repo_id(repo_id: str):
    """Raises `ValueError` if it is no name of a repository with its owner."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository, USER/NAME: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no name of a repository: it must be USER/NAME or ORGANISATION/NAME.")


def find_token(token: str | None = None) -> str:
    """This token or, if unset, that of `hf auth login` or HF_TOKEN; [`HubError`] if there is none."""
    token = token or get_token()
    if token is None:
        raise HubError("There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
    return token


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """
    Uploads a folder to a model repository, which is made if there is none. It is one commit: until it is done, the
    repository is what it was before.

    Args:
        private: Make the repository private. One that exists must be private already.
        revision: A branch, which is made if there is none; `main` if unset.
        token: A token with write access; that of `hf auth login` or HF_TOKEN if unset.

    Raises:
        [`HubError`]: if nothing was published.
    """
    api = HfApi(token=find_token(token))
    with explained_errors(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise HubError(f"{repo_id} exists and is public. Make it private on its page, or leave --private away.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = commit_operations(Path(folder), api.list_repo_files(repo_id, revision=revision))
        stale = [each.path_in_repo for each in operations if isinstance(each, CommitOperationDelete)]
        if stale:
            logger.warning(f"Deleted from {repo_id}, as they were of an earlier model: {', '.join(stale)}")
        # Not `upload_folder`, which may spread a large folder over several commits.
        return api.create_commit(repo_id, operations, commit_message="Upload a ClusterFormer model", revision=revision)


def commit_operations(folder: Path, published: list[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Adds every file of the folder, and deletes another model's weights, code and results from the repository."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    others = [name for name in published if name not in files and "/" not in name]
    stale = [name for name in others if any(fnmatch(name, pattern) for pattern in STALE_FILES)]
    deletions = [CommitOperationDelete(name) for name in stale]
    return deletions + [CommitOperationAdd(name, path) for name, path in files.items()]


@contextmanager
def explained_errors(repo_id: str) -> Iterator[None]:
    """Says what the answers of the Hub mean for an upload."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubError("Nothing was uploaded: HF_HUB_OFFLINE is set.") from error
    except HfHubHTTPError as error:
        reason = {
            401: "the Hub does not know the token. Make a new one and log in with `hf auth login`.",
            403: f"the token may not write to {repo_id}. It needs write access, and its user must own the repository "
            "or be in its organisation.",
            404: "there is no such repository or branch, or the token may not see it.",
        }.get(error.response.status_code, str(error))
        raise HubError(f"Nothing was uploaded to {repo_id}: {reason}") from error
    except ValueError as error:  # from `create_commit`, of the card's metadata; some answers of the Hub are one too
        raise HubError(f"Nothing was uploaded: the Hub does not take README.md. {error}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # HTTPError: no answer at all
        raise HubError(
            f"The upload to {repo_id} broke off: {error.__cause__ or error}\n"
            "The repository has all of the new files or none of them."
        ) from error
