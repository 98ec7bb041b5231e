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
"""Where a measured number comes from: the weights, the data, the command, the versions and the machine."""

import hashlib
import json
import os
import platform
import re
import shlex
import sys
from datetime import date
from pathlib import Path

import torch
import transformers
from torch import nn


# The key of results files that holds it.
PROVENANCE = "provenance"

TOKEN_FLAG = re.compile(r"(--[\w-]*tok[\w-]*)(?:=.*)?", re.DOTALL)
TOKEN = re.compile(r"\b(hf|api_org)_[\w.-]{20,}")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and bits of a model's weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def provenance(model: nn.Module, dataset: str | None) -> dict[str, str | None]:
    """
    What a results file says of its numbers, under the key `PROVENANCE`.

    Args:
        model: The model that is measured.
        dataset: The data that it is measured on: a path, of which the name is kept, or a name on the Hub.
    """
    return {
        "weights": fingerprint(model),
        "dataset": dataset and public_name(dataset),
        "command": command(),
        "date": date.today().isoformat(),
        **environment(),
    }


def public_name(source: str) -> str:
    """A name on the Hub as it is; of a path on this machine only its last part."""
    return Path(source).absolute().name if Path(source).exists() else source


def command() -> str:
    """
    The command line of this process, without tokens. Of this repository's scripts it has the folder and the name, of
    others and of absolute paths the name.
    """
    script = Path(sys.argv[0]).absolute()
    script = Path(*script.parts[-2:]) if script.parent.name in ("scripts", "conversion") else script.name
    words, hides = [], False
    for word in sys.argv[1:]:
        flag = TOKEN_FLAG.fullmatch(word)
        words.append(
            "..." if hides and not flag else f"{flag[1]}=..." if flag and "=" in word else without_folders(word)
        )
        hides = flag is not None and "=" not in word
    return TOKEN.sub(r"\1_...", shlex.join(["python", str(script), *words]))


def without_folders(word: str) -> str:
    """A word of a command line; of an absolute path, alone or as `--flag=path`, only its last part."""
    flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return flag + equals + (Path(value).name if Path(value).is_absolute() else value)


def environment() -> dict[str, str]:
    """Versions and machine of this process."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def machine(device: torch.device) -> str:
    """Name of the GPU, or of the processor and the number of its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


class ForeignResultsError(ValueError):
    """A file of results that does not belong to the model."""


def read_for(model: nn.Module, path: str | Path) -> dict:
    """
    A JSON file of results or of a training, if its `PROVENANCE` names the weights of this model.

    Raises:
        [`ForeignResultsError`]: if it names other weights, or none.
    """
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    weights = results.get(PROVENANCE, {}).get("weights")
    if weights is None:
        raise ForeignResultsError(f"{path} does not say which weights it is of, so it is not taken for this model's.")
    if weights != fingerprint(model):
        raise ForeignResultsError(f"{path} is of other weights than this model's.")
    return results
