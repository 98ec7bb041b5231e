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
Publishes a saved ClusterFormer on the Hub, with all that it takes to load it where this package is not installed.

    python scripts/push_to_hub.py --model outputs/mine --repo-id USER/NAME --dry-run
    python scripts/push_to_hub.py --model outputs/mine --repo-id USER/NAME

The repository is written to `outputs/hub/USER/NAME`, anew each time, and `--dry-run` stops there. Log in with
`hf auth login` or set HF_TOKEN. The numbers of the model card are those of `eval_results.json` in the model's folder
and the rest is from its `training_record.json`; the training scripts write both.
"""

import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from transformers import AutoImageProcessor, HfArgumentParser

import clusterformer_hf
from clusterformer_hf import ClusterFormerConfig
from clusterformer_hf.data.images import open_image
from clusterformer_hf.hub import (
    AUTO_CLASSES,
    RESULTS_NAME,
    HubError,
    check_repo_id,
    export_repository,
    publish,
)
from clusterformer_hf.loading import summarise
from clusterformer_hf.model_card import RECORD_NAME, known_license
from clusterformer_hf.provenance import ForeignResultsError


@dataclass
class Arguments:
    model: Path = field(metadata={"help": "Folder of a saved model with its image processor."})
    repo_id: str = field(metadata={"help": "USER/NAME or ORGANISATION/NAME."})
    private: bool = field(default=False, metadata={"help": "Make the repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to upload to, made if there is none."})
    dry_run: bool = field(default=False, metadata={"help": "Write the folder and print what would be uploaded."})
    example: Path | None = field(
        default=None, metadata={"help": "Picture for the repository that you may publish; one is drawn if unset."}
    )
    license: str | None = field(
        default=None,
        metadata={
            "help": "License of the weights, by its name on the Hub. If unset, that of the README.md in the model's "
            "folder or in the record of its training: apache-2.0 after a start from random weights, or that of the "
            "checkpoint."
        },
    )


def load_model(folder: Path):
    """
    The model that was saved in a folder, as its own class. Only safetensors are read.

    Raises:
        `ValueError`: if there is none, or it has not all weights.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder} is no folder of a saved model: it has no config.json.")
    names = ClusterFormerConfig.from_pretrained(folder).architectures or []
    if len(names) != 1 or names[0] not in AUTO_CLASSES:
        raise ValueError(
            f"--model {folder} cannot be published: its config names {names}, and not one of {', '.join(AUTO_CLASSES)}."
        )
    model_class = getattr(clusterformer_hf, names[0])
    try:
        model, report = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except OSError as error:
        raise ValueError(f"--model {folder} has no weights as safetensors: {error}") from error
    misfits = {name: sorted(map(str, report[f"{name}_keys"])) for name in ("missing", "unexpected", "mismatched")}
    misfits = [f"{name}: {summarise(keys)}" for name, keys in misfits.items() if keys]
    if misfits:
        raise ValueError(f"--model {folder} holds other weights than {names[0]} has. {'; '.join(misfits)}.")
    return model


def load_image_processor(folder: Path):
    try:
        return AutoImageProcessor.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"--model {folder} has no image processor; save one to it: {error}") from error


def open_example(path: Path | None) -> Image.Image | None:
    try:
        return open_image(path) if path is not None else None
    except ValueError as error:
        raise ValueError(f"--example {error}") from error


def export(args: Arguments) -> Path:
    """
    Writes the repository in place of an earlier one.

    Raises:
        `ValueError`: if the model is in the folder that is written, or cannot be published.
    """
    folder = Path("outputs", "hub", args.repo_id)
    if args.model.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--model {args.model} is in {folder}, which is written anew. Move it elsewhere first.")
    model, image_processor, example = (
        load_model(args.model),
        load_image_processor(args.model),
        open_example(args.example),
    )
    results, record = (args.model / name for name in (RESULTS_NAME, RECORD_NAME))
    license = args.license or known_license(args.model)
    if license is None:
        print(f"README.md names no license: nothing in {args.model} tells it. --license does.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        written = export_repository(
            model,
            image_processor,
            Path(temporary, folder.name),
            args.repo_id,
            results=results if results.is_file() else None,
            record=record if record.is_file() else None,
            example=example,
            license=license,
        )
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
        written.rename(folder)
    return folder


def print_contents(folder: Path, args: Arguments):
    visibility = "private" if args.private else "public, if it is new"
    print(f"{args.repo_id} ({visibility}), branch {args.revision or 'main'}, from {folder}:")
    for path in sorted(folder.rglob("*")):
        print(f"{path.stat().st_size:>14,}  {path.relative_to(folder)}")


def main(args: list[str] | None = None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args)
    try:
        check_repo_id(args.repo_id)
        folder = export(args)
        print_contents(folder, args)
        if args.dry_run:
            flags = ["--private"] if args.private else []
            flags += ["--revision", args.revision] if args.revision is not None else []
            print(
                "Nothing was uploaded. The command without --dry-run writes the folder anew; to change it by hand and "
                f"upload it as it is: {shlex.join(['hf', 'upload', args.repo_id, str(folder), *flags])}"
            )
        else:
            commit = publish(folder, args.repo_id, private=args.private, revision=args.revision)
            print(f"Published as {commit.commit_url}")
    except ForeignResultsError as error:
        sys.exit(f"{error}\nMeasure this model again with --do_eval, or move the file away.")
    except (HubError, ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
