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
"""Repositories for the Hub: what is in them, that they load alone, their upload, and their cards."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import BadRequestError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    DeformableDetrImageProcessor,
    Mask2FormerImageProcessor,
    SegformerImageProcessor,
    ViTImageProcessor,
)
from transformers.pipelines import SUPPORTED_TASKS

from clusterformer_hf import (
    ClusterFormerBackbone,
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    ClusterFormerForSemanticSegmentation,
    ClusterFormerForUniversalSegmentation,
    ClusterFormerModel,
)
from clusterformer_hf.hub import HubError, draw_example, explained_errors, export_repository
from clusterformer_hf.loading import ModelArguments
from clusterformer_hf.model_card import TrainingRecord, known_license, render_model_card
from clusterformer_hf.provenance import ForeignResultsError, command, fingerprint, provenance
from clusterformer_hf.training import ClusterFormerTrainer, ClusterFormerTrainingArguments, own_results
from scripts import (
    run_image_classification,
    run_object_detection,
    run_semantic_segmentation,
    run_universal_segmentation,
)
from scripts.push_to_hub import main
from tests.local_hub import LocalHub


NANO = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 32, 32],
    "num_attention_heads": [1, 1, 2, 2],
    "center_grid": [2, 2, 2, 2],
    "image_size": 64,
    "decoder_hidden_size": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "train_num_points": 64,
    "id2label": {0: "cat", 1: "dog | <script>"},
    "label2id": {"cat": 0, "dog | <script>": 1},
}
SIZE = {"height": 64, "width": 64}
KINDS = {
    "backbone": (ClusterFormerModel, ViTImageProcessor),
    "classifier": (ClusterFormerForImageClassification, ViTImageProcessor),
    "detector": (ClusterFormerForObjectDetection, DeformableDetrImageProcessor),
    "semantic": (ClusterFormerForSemanticSegmentation, SegformerImageProcessor),
    "universal": (ClusterFormerForUniversalSegmentation, Mask2FormerImageProcessor),
}
METRICS = {
    "backbone": {},
    "classifier": {"eval_accuracy": 0.75, "eval_top5_accuracy": 1.0},
    "detector": {"eval_AP": 0.25, "eval_AP50": 0.5, "eval_APl": -1.0, "eval_AP_dog | <script>": 0.125},
    "semantic": {"eval_mIoU": 0.625},
    "universal": {"eval_PQ": 0.375, "eval_AP": 0.25, "eval_mIoU": 0.625},
}
TASKS = {
    "backbone": "image-feature-extraction",
    "classifier": "image-classification",
    "detector": "object-detection",
    "semantic": "image-segmentation",
    "universal": "image-segmentation",
}
AUTO_CLASSES = {
    "backbone": ["AutoModel"],
    "classifier": ["AutoModelForImageClassification"],
    "detector": ["AutoModelForObjectDetection"],
    "semantic": ["AutoModelForSemanticSegmentation", "AutoModelForImageSegmentation"],
    "universal": [
        "AutoModelForUniversalSegmentation",
        "AutoModelForInstanceSegmentation",
        "AutoModelForImageSegmentation",
    ],
}
MODELLING_FILES = {
    f"{part}_clusterformer.py" for part in ("configuration", "clustering", "kernels", "decoder", "loss", "modeling")
}
TOKEN, STRANGER = "hf_" + "a" * 34, "hf_" + "b" * 34


def build(kind: str) -> ClusterFormerModel:
    torch.manual_seed(0)
    return KINDS[kind][0](ClusterFormerConfig(**NANO)).eval()


def save_run(kind: str, folder: Path):
    """What a training script leaves: the model, its image processor, results and the record of the training."""
    model = build(kind)
    model.save_pretrained(folder)
    KINDS[kind][1](size=SIZE).save_pretrained(folder)
    results = METRICS[kind] | {"eval_loss": 1.5, "eval_runtime": 2.0, "eval_samples": 8, "epoch": 3.0}
    results["provenance"] = provenance(model, "someone/pictures")
    (folder / "eval_results.json").write_text(json.dumps(results))
    course = [{"Training Loss": 2.0, "Epoch": 1.0, "Step": 4, "Validation Loss": 1.75}]
    record = TrainingRecord(
        "Trained for a test.", "It knows two classes.", "Eight.\n\n![Course](curves.png)", course=course
    )
    Image.new("RGB", (8, 8)).save(folder / "curves.png")
    record.license = "apache-2.0"
    record.datasets, record.hyperparameters = ["someone/pictures"], {"learning_rate": 0.001}
    record.save(folder / "training_record.json", model)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(f"run_{kind}") for kind in KINDS}
    for kind, folder in folders.items():
        save_run(kind, folder)
    return folders


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory) -> dict[str, Path]:
    """Repositories as the script writes them, in folders of their own names."""
    folder = tmp_path_factory.mktemp("exported")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for kind, run in runs.items():
            main([f"--model={run}", f"--repo-id=me/{kind}", "--dry-run"])
    finally:
        os.chdir(before)
    return {kind: folder / "outputs" / "hub" / "me" / kind for kind in KINDS}


# Loading alone


BLOCKED = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # cannot be imported, as where it is not installed
"""
# Transformers, PyTorch, torchvision and pillow are left, and what Trainer and the matcher of detectors need themselves.
NOT_NEEDED = (
    "clusterformer_hf,datasets,evaluate,pycocotools,faster_coco_eval,hotcoco,torchmetrics,mlxtend,skimage,imgviz,triton"
)

LOAD_ALONE = """
import json, torch, transformers
from pathlib import Path
from PIL import Image
from transformers import AutoImageProcessor, Trainer, TrainingArguments, pipeline

folder, out, task, auto_classes = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5].split(",")
pixel_values = torch.load(out / "pixel_values.pt")

def tensors(model):
    with torch.no_grad():
        return {name: value for name, value in model.eval()(pixel_values).items() if isinstance(value, torch.Tensor)}

for name in auto_classes:
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0], name
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    found = tensors(model)
    torch.save(found, out / f"{name}.pt")

run = pipeline(task, model=str(folder), trust_remote_code=True)
assert type(run.model).__name__ == type(model).__name__
if task == "image-feature-extraction":
    answer = run(Image.open(folder / "example.png"), return_tensors=True)
    assert answer.shape == (1, 32, 2, 2), answer.shape
else:
    options = {} if task == "image-classification" else {"threshold": 0.0}
    answer = run(Image.open(folder / "example.png"), **options)
    assert {row["label"] for row in answer} <= set(model.config.label2id), answer
    assert len(answer) > 0 or type(model).__name__.endswith("UniversalSegmentation")

boxes = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
masks = {"class_labels": torch.tensor([1]), "masks": torch.ones(1, 64, 64)}
label = {"AutoModel": torch.tensor(1.0), "AutoModelForImageClassification": torch.tensor(1),
         "AutoModelForObjectDetection": boxes, "AutoModelForSemanticSegmentation": torch.ones(64, 64, dtype=torch.long),
         "AutoModelForUniversalSegmentation": masks}[auto_classes[0]]

def collate(rows):
    labels = [row["labels"] for row in rows]
    labels = torch.stack(labels) if isinstance(label, torch.Tensor) else labels
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}

def feature_loss(outputs, labels, num_items_in_batch=None):
    return (outputs.pooler_output.mean(-1) - labels).square().mean()

settings = TrainingArguments(str(out / "trainer"), max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True,
                             remove_unused_columns=False, use_cpu=True)
trainer = Trainer(model, settings, train_dataset=[{"pixel_values": pixels, "labels": label} for pixels in pixel_values],
                  data_collator=collate, compute_loss_func=feature_loss if task == "image-feature-extraction" else None)
trainer.train()
trained = tensors(model)
assert any(not torch.equal(trained[name], found[name]) for name in found)
again = out / f"{folder.name}_again"
model.save_pretrained(again)
AutoImageProcessor.from_pretrained(folder).save_pretrained(again)
assert {path.name for path in again.glob("*.py")} == {path.name for path in folder.glob("*.py")}
for name in auto_classes:
    loaded = getattr(transformers, name).from_pretrained(again, trust_remote_code=True)
    assert f".{again.name}" in type(loaded).__module__, type(loaded).__module__
    assert all(torch.equal(value, trained[key]) for key, value in tensors(loaded).items())
assert type(pipeline(task, model=str(again), trust_remote_code=True).model) is type(loaded)
assert not [path for path in out.rglob("*.bin") if path.name.startswith("pytorch_model")]
"""


@pytest.mark.parametrize("kind", KINDS)
def test_folder_loads_alone(kind, exported, tmp_path):
    """In a fresh process, with an empty module cache and without this package and the other packages that it uses."""
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.save(pixel_values, tmp_path / "pixel_values.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    arguments = [NOT_NEEDED, str(exported[kind]), str(tmp_path), TASKS[kind], ",".join(AUTO_CLASSES[kind])]
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED + LOAD_ALONE, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "newly initialized" not in result.stderr
    with torch.no_grad():
        expected = build(kind)(pixel_values)
    for name in AUTO_CLASSES[kind]:
        found = torch.load(tmp_path / f"{name}.pt")
        assert len(found) > 0 and all(torch.equal(value, expected[key]) for key, value in found.items())


# What is in a repository


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind, exported):
    names = {path.name for path in exported[kind].iterdir()}
    data = {"README.md", "config.json", "eval_results.json", "example.png", "curves.png", "model.safetensors"}
    assert names == data | {"preprocessor_config.json"} | MODELLING_FILES
    auto_map = json.loads((exported[kind] / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", "AutoModel", "AutoBackbone", *AUTO_CLASSES[kind]}
    for reference in auto_map.values():
        module, class_name = reference.split(".")
        assert f"class {class_name}(" in (exported[kind] / f"{module}.py").read_text()
    assert Image.open(exported[kind] / "example.png").size == (64, 64)


def test_shards_and_model_are_as_they_were(tmp_path):
    model = build("classifier")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folder = export_repository(model, ViTImageProcessor(size=SIZE), tmp_path / "out", "me/it", max_shard_size="50KB")
    shards = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and set(index["weight_map"].values()) == {shard.name for shard in shards}
    saved = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in before)
    loaded = ClusterFormerForImageClassification.from_pretrained(folder)
    assert fingerprint(loaded) == fingerprint(model)


def test_small_and_tiny_are_named(tmp_path):
    for name in ("tiny", "small"):
        config = getattr(ClusterFormerConfig, name)()
        with torch.device("meta"):
            model = ClusterFormerForImageClassification(config)
        card = render_model_card(model, "me/it")
        assert f"ClusterFormer-{name.capitalize()}, clustering `recurrent`" in card.text
    assert "ClusterFormer-" not in render_model_card(build("classifier"), "me/it").text


def test_what_is_not_exported(runs, tmp_path):
    model, processor = build("classifier"), ViTImageProcessor(size=SIZE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.py").touch()
    with pytest.raises(FileExistsError, match="full is not an empty folder"):
        export_repository(model, processor, tmp_path / "full", "me/it")
    for repo_id in ("it", "me/it/more", "me/--it", "me/it?"):
        with pytest.raises(ValueError, match="is no name of a repository"):
            export_repository(model, processor, tmp_path / "out", repo_id)
    with pytest.raises(ValueError, match="torch.*Linear cannot be published, only ClusterFormerModel, "):
        export_repository(torch.nn.Linear(1, 1), processor, tmp_path / "out", "me/it")
    assert not (tmp_path / "out").exists()


# Numbers


def test_numbers_need_a_results_file(runs, tmp_path):
    card = ModelCard(export(tmp_path / "without", "classifier"))
    assert card.data.eval_results is None and card.data.model_name is None
    assert r"It knows 2 classes: cat, dog \| &lt;script&gt;." in card.text
    assert "No evaluation of this checkpoint is recorded." in card.text
    assert "|" not in card.text.split("## Results")[1].split("## Limits")[0]


def export(folder: Path, kind: str, **files) -> str:
    export_repository(build(kind), KINDS[kind][1](size=SIZE), folder, "me/it", **files)
    return (folder / "README.md").read_text()


def test_results_of_other_weights_are_refused(runs, tmp_path):
    model = build("classifier")
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6
    files = {"results": "eval_results.json", "record": "training_record.json"}
    for argument, name in files.items():
        with pytest.raises(ForeignResultsError, match=f"{name} is of other weights"):
            path = runs["classifier"] / name
            export_repository(model, ViTImageProcessor(), tmp_path / "out", "me/it", **{argument: path})
    # A run that was not evaluated, in the folder of one that was.
    results = runs["classifier"] / "eval_results.json"
    assert own_results(results, build("classifier"))["eval_accuracy"] == 0.75
    assert own_results(results, model) is None and own_results(tmp_path / "nothing.json", model) is None

    shutil.copy(runs["classifier"] / "training_record.json", tmp_path)
    with pytest.raises(ValueError, match="shows pictures that are not there: .*curves.png"):
        export(tmp_path / "out", "classifier", record=tmp_path / "training_record.json")
    (tmp_path / "eval_results.json").write_text('{"eval_accuracy": 0.99}')
    with pytest.raises(ForeignResultsError, match="does not say which weights it is of"):
        export(tmp_path / "out", "classifier", results=tmp_path / "eval_results.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_card(kind, exported):
    card = ModelCard.load(exported[kind] / "README.md", ignore_metadata_errors=False)
    data = card.data
    assert data.pipeline_tag == TASKS[kind] and data.pipeline_tag in SUPPORTED_TASKS
    assert data.library_name == "transformers" and data.license == "apache-2.0"
    assert data.datasets == ["someone/pictures"]
    numbers = {result.metric_name: result.metric_value for result in data.eval_results or []}
    shown = {name: value for name, value in METRICS[kind].items() if value != -1 and "dog" not in name}
    assert numbers == {name.removeprefix("eval_"): value for name, value in shown.items()}
    assert {result.dataset_type for result in data.eval_results or []} <= {"someone/pictures"}
    for text in (
        "Trained for a test.",
        "It knows two classes.",
        "![Course](curves.png)",
        "learning_rate: 0.001",
        "1.75",
    ):
        assert text in card.text
    assert ("Decoder layers: " in card.text) == (kind in ("detector", "semantic", "universal"))
    results = card.text.split("## Results")[1].split("## Limits")[0]
    assert "On 8 pictures of `someone/pictures`" in results and torch.__version__ in results
    assert provenance(build(kind), None)["command"] in results
    table = [line for line in results.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}  # two cells in each row
    assert (
        ("<summary>Each class</summary>" in results) == (kind == "detector") == (r"AP_dog \| &lt;script&gt;" in results)
    )
    assert "<script>" not in card.text
    assert "APl" not in results and "{" not in results + card.text.split("## Limits")[1].split("## Citation")[0]
    # Saved and read again it is the same, as for huggingface_hub's own checks.
    assert ModelCard(str(card)).data.to_dict() == data.to_dict()


# Pickles


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["TRAP"]),))


def test_pickles_are_neither_read_nor_written(runs, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "sprung").exists()  # it works
    (tmp_path / "sprung").unlink()

    folder = tmp_path / "model"
    shutil.copytree(runs["classifier"], folder)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    monkeypatch.chdir(tmp_path)
    main([f"--model={folder}", "--repo-id=me/it", "--dry-run"])
    written = {path.name for path in (tmp_path / "outputs" / "hub" / "me" / "it").iterdir()}
    assert written == {path.name for path in exported["classifier"].iterdir()}
    ClusterFormerForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="has no weights as safetensors"):
        main([f"--model={folder}", "--repo-id=me/it", "--dry-run"])
    assert not (tmp_path / "sprung").exists()


# Publishing


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, which huggingface_hub's client in this process uses."""
    with LocalHub({TOKEN: ["me"], STRANGER: ["stranger"]}).connected(monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield hub


def environment_for(hub: LocalHub, home: Path) -> dict[str, str]:
    """Of a process whose client uses the Hub on this machine and keeps nothing of this one's."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    settings |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return own | settings


RUN_CARDS = """
import contextlib, io, json, re
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModel

for repo, revision in json.loads(sys.argv[2]).items():
    card = open(hf_hub_download(repo, "README.md"), encoding="utf-8").read()
    blocks = re.findall(r"```python\\n(.*?)```", card, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, repo, "exec"), {})
        print(repo, repr(printed.getvalue()[:300]))
    # An earlier commit, whose weights and code are others.
    name = AutoConfig.from_pretrained(repo, trust_remote_code=True).architectures[0]
    new, pinned = (
        AutoModel.from_pretrained(repo, trust_remote_code=True, revision=commit) for commit in ("main", revision)
    )
    codes = [hasattr(sys.modules[type(model).__module__], "LATER") for model in (new, pinned)]
    assert codes == [True, False], codes
    weights, others = new.state_dict(), pinned.state_dict()
    name = next(iter(weights))
    assert torch.equal(weights[name], others[name] + 1), name
"""


def test_publish_and_load_from_the_hub(hub, runs, exported, tmp_path, capsys):
    """Each kind twice, the second with other weights and code; the code of the cards runs as it is printed."""
    pinned = {}
    for kind, run in runs.items():
        main([f"--model={run}", f"--repo-id=me/{kind}"])
        repository = hub.repositories[f"me/{kind}"]
        pinned[f"me/{kind}"] = repository.branches["main"]
        assert len(repository.commits) == 2  # the empty repository, and everything at once
        files = {path.name: path.read_bytes() for path in exported[kind].iterdir()}
        published = dict(repository.commits[repository.branches["main"]])
        del published[".gitattributes"]
        assert published == files
        model = build(kind)
        with torch.no_grad():
            next(iter(model.parameters())).add_(1)
        model.save_pretrained(tmp_path / kind)
        KINDS[kind][1](size=SIZE).save_pretrained(tmp_path / kind)
        main([f"--model={tmp_path / kind}", f"--repo-id=me/{kind}"])
        assert f"Published as {hub.url}/me/{kind}/commit/{repository.branches['main']}" in capsys.readouterr().out
        published = repository.commits[repository.branches["main"]]
        later_code = published["modeling_clusterformer.py"] + b"LATER = True\n"
        repository.commit("main", published | {"modeling_clusterformer.py": later_code})
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED + RUN_CARDS, NOT_NEEDED, json.dumps(pinned)],
        env=environment_for(hub, tmp_path / "home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for kind, expected in {"backbone": "torch.Size([1, 32, 2, 2])", "classifier": "% cat"}.items():
        assert expected in result.stdout, f"{kind}: {result.stdout}"
    assert result.stdout.count("(1, 2, 4, 2, 2)") == len(KINDS)  # the clusters of the last stage


def test_branch_and_private_repository(hub, runs, capsys):
    run = f"--model={runs['classifier']}"
    main([run, "--repo-id=me/it", "--private", "--revision=trial"])
    repository = hub.repositories["me/it"]
    assert repository.private
    assert set(repository.commits[repository.branches["main"]]) == {".gitattributes"}
    assert "model.safetensors" in repository.commits[repository.branches["trial"]]
    main([run, "--repo-id=me/open"])
    before = dict(hub.repositories["me/open"].branches)
    with pytest.raises(SystemExit, match="me/open exists and is public"):
        main([run, "--repo-id=me/open", "--private"])
    assert hub.repositories["me/open"].branches == before


def test_files_of_another_model_are_replaced(hub, runs, tmp_path, caplog):
    """Old shards, pickles, code and results would be taken for parts of the new model; other files stay."""
    main([f"--model={runs['classifier']}", "--repo-id=me/it"])
    repository = hub.repositories["me/it"]
    old = (
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "old_clusterformer.py",
    )
    kept = {"notes.md", "notes.bin", "handler.py", "examples/app.py", "onnx/model.safetensors"}
    repository.commit("main", repository.commits[repository.branches["main"]] | dict.fromkeys((*old, *kept), b"{}"))
    shutil.copytree(runs["detector"], tmp_path / "unmeasured", ignore=shutil.ignore_patterns("eval_results.json"))
    main([f"--model={tmp_path / 'unmeasured'}", "--repo-id=me/it"])
    names = set(repository.commits[repository.branches["main"]])
    assert names == {path.name for path in Path("outputs/hub/me/it").iterdir()} | {".gitattributes"} | kept
    assert "eval_results.json" not in names
    (message,) = [record.getMessage() for record in caplog.records if "Deleted from me/it" in record.getMessage()]
    assert all(name in message for name in (*old, "eval_results.json")) and not any(name in message for name in kept)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"token": None}, "There is no token for the Hub. Log in with `hf auth login`, or set HF_TOKEN."),
        ({"token": "hf_" + "c" * 34}, "Nothing was uploaded to me/it: the Hub does not know the token."),
        ({"token": STRANGER}, "the token may not write to me/it. It needs write access"),
        ({"token": STRANGER, "exists": True}, "the token may not write to me/it. It needs write access"),
        ({"offline": True}, "Nothing was uploaded: HF_HUB_OFFLINE is set."),
        ({"repo_id": "it"}, "'it' is no name of a repository: it must be USER/NAME or ORGANISATION/NAME."),
        ({"repo_id": "me/it/main"}, "'me/it/main' is no name of a repository, USER/NAME: "),
        ({"refused": True}, "the Hub does not take README.md. .*\n- license must be one of them"),
        ({"breaks": True}, "The upload to me/it broke off: .*\nThe repository has all of the new files or none"),
        ({"gone": True}, "The upload to me/it broke off: "),
    ],
)
def test_uploads_that_fail(settings, message, hub, runs, monkeypatch, capsys):
    """They say why, change nothing and name no token."""
    if settings.get("exists"):
        main([f"--model={runs['classifier']}", "--repo-id=me/it"])
    before = {name: dict(repository.branches) for name, repository in hub.repositories.items()}
    token = settings.get("token", TOKEN)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    if settings.get("offline"):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if settings.get("gone"):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.breaks_commits, hub.refuses_cards = settings.get("breaks", False), settings.get("refused", False)
    with pytest.raises(SystemExit, match=message) as failure:
        main([f"--model={runs['classifier']}", f"--repo-id={settings.get('repo_id', 'me/it')}"])
    output = "".join([*capsys.readouterr(), str(failure.value)])
    assert not any(secret in output for secret in (TOKEN, STRANGER, "c" * 34))
    if settings.get("breaks") or settings.get("refused"):
        repository = hub.repositories["me/it"]
        assert set(repository.commits[repository.branches["main"]]) == {".gitattributes"}
    else:
        assert {name: repository.branches for name, repository in hub.repositories.items()} == before


def test_wrong_model_folders(tmp_path, runs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "clusterformer", "architectures": ["SwinModel"]}')
    ClusterFormerBackbone(ClusterFormerConfig(**NANO)).save_pretrained(tmp_path / "backbone")
    build("classifier").save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "half")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "broken.png").write_bytes(b"no picture")
    draw_example(256).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-1000])
    run = str(runs["classifier"])
    for flags, message in {
        ("--model=nowhere",): "--model nowhere is no folder of a saved model: it has no config.json.",
        ("--model=empty",): "--model empty is no folder of a saved model",
        ("--model=other",): "--model other cannot be published: its config names \\['SwinModel'\\], and not one of",
        ("--model=backbone",): "--model backbone cannot be .*Backbone'\\], and not one of ClusterFormerModel, ",
        ("--model=half",): "--model half holds other weights than .*Classification has. missing: classifier.bias.",
        ("--model=plain",): "--model plain has no image processor; save one to it",
        (f"--model={run}", "--example=broken.png"): "--example broken.png: not a picture",
        (f"--model={run}", "--example=half.png"): "--example half.png: .*truncated",
    }.items():
        with pytest.raises(SystemExit, match=message):
            main([*flags, "--repo-id=me/it", "--dry-run"])
    assert not (tmp_path / "outputs").exists()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "mine.png")
    main([f"--model={run}", "--repo-id=me/it", "--dry-run", "--example=mine.png", "--license=mit"])
    repository = tmp_path / "outputs" / "hub" / "me" / "it"
    assert Image.open(repository / "example.png").size == (30, 20)
    assert ModelCard.load(repository / "README.md").data.license == "mit"
    # What cannot be written leaves what was there.
    (tmp_path / "bad").mkdir()
    shutil.copytree(run, tmp_path / "bad", dirs_exist_ok=True)
    (tmp_path / "bad" / "eval_results.json").write_text('{"eval_accuracy": 0.99}')
    with pytest.raises(SystemExit, match="does not say which weights it is of"):
        main(["--model=bad", "--repo-id=me/it", "--dry-run"])
    assert ModelCard.load(repository / "README.md").data.license == "mit"
    assert [path.name for path in repository.parent.iterdir()] == ["it"]


def test_dry_run_of_a_private_branch(tmp_path, runs, monkeypatch, capsys):
    """The command that it names makes no public repository; a link in the folder's place is replaced."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    Path("outputs/hub/me").mkdir(parents=True)
    Path("outputs/hub/me/it").symlink_to(tmp_path / "elsewhere")
    main([f"--model={runs['classifier']}", "--repo-id=me/it", "--dry-run", "--private", "--revision=try"])
    assert "hf upload me/it outputs/hub/me/it --private --revision try\n" in capsys.readouterr().out
    assert not Path("outputs/hub/me/it").is_symlink() and not list((tmp_path / "elsewhere").iterdir())


def test_license_is_that_of_the_training(tmp_path, runs, monkeypatch, capsys):
    """Where nothing tells it, it is not guessed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs["classifier"], "run")
    record = json.loads(Path("run/training_record.json").read_text())
    Path("run/training_record.json").write_text(json.dumps(record | {"license": None}))
    flags = ["--model=run", "--repo-id=me/it", "--dry-run"]

    def license() -> str | None:
        main(flags)
        return ModelCard.load("outputs/hub/me/it/README.md").data.license

    assert license() is None and "README.md names no license" in capsys.readouterr().out
    Path("run/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert license() == "cc-by-nc-4.0"
    flags.append("--license=mit")
    assert license() == "mit"


def test_license_is_that_of_the_checkpoint(tmp_path, runs):
    """Also where it reached this machine as a folder, and was trained once before, as far as a checkpoint."""
    start = runs["classifier"]

    def train(checkpoint: Path | None, name: str) -> ModelCard:
        load = ClusterFormerForImageClassification.from_pretrained
        model = build("classifier") if checkpoint is None else load(checkpoint)
        output_dir = tmp_path / name
        args = ClusterFormerTrainingArguments(str(output_dir), use_cpu=True, report_to="none")
        trainer = ClusterFormerTrainer(model, args, train_dataset=[{}])
        trainer.save_model()
        trainer.create_model_card("Trained.", "None.", "Some.")
        return ModelCard.load(output_dir / "README.md")

    assert train(None, "scratch").data.license == "apache-2.0"
    assert train(tmp_path / "scratch", "from_scratch").data.license == "apache-2.0"
    base = shutil.copytree(start, tmp_path / "download")
    (base / "training_record.json").unlink()
    assert train(base, "unknown").data.license is None and known_license(tmp_path / "unknown") is None
    (base / "README.md").write_text("---\nlicense: a: b\n---\n")
    assert train(base, "unreadable").data.license is None
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: someone/base\n---\n")
    train(base, "once")
    without_record = shutil.ignore_patterns("training_record.json")
    card = train(shutil.copytree(start, tmp_path / "once" / "checkpoint-5", ignore=without_record), "twice")
    assert card.data.license == "cc-by-nc-4.0" and card.data.base_model == "someone/base"
    assert known_license(tmp_path / "twice") == "cc-by-nc-4.0"

    # A folder of its own is asked first, whatever its name; only a run's checkpoint without a card has the run's.
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    for name, license in (
        ("checkpoint-7", "cc-by-nc-4.0"),
        ("checkpoint_best", "cc-by-nc-4.0"),
        ("checkpoint-8", None),
    ):
        (base / name).mkdir()
        if license is not None:
            (base / name / "README.md").write_text(f"---\nlicense: {license}\n---\n")
        assert known_license(base / name) == (license or "mit")

    # From Python: that of the record, and none without one.
    model, processor = build("classifier"), ViTImageProcessor()
    for record, license in ((start / "training_record.json", "apache-2.0"), (None, None)):
        folder = export_repository(model, processor, tmp_path / f"of_{license}", "me/it", record=record)
        assert ModelCard.load(folder / "README.md").data.license == license


class Pictures(list):
    """As much of a data set as the cards ask for."""

    boxes = classes = ()

    def __init__(self, class_names: list[str]):
        self.class_names = class_names


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "backbone"])
def test_card_of_a_training(kind, tmp_path):
    """Names of classes are text, of many the first are named, and no folder of this machine is."""
    script = {
        "classifier": run_image_classification,
        "detector": run_object_detection,
        "semantic": run_semantic_segmentation,
        "universal": run_universal_segmentation,
    }[kind]
    names = ["<pad>", "<img src=x>", *(f"class {number}" for number in range(30))]
    model, data = build(kind), Pictures(names)
    model.config.label_ids_to_fuse = [1]
    more = [names] if kind == "classifier" else []
    arguments = ModelArguments(model_name_or_path=str(tmp_path))
    paragraphs = script.card_paragraphs(arguments, model, {"train": data}, *more, [])
    card = render_model_card(model, "me/it", TrainingRecord(**paragraphs))
    assert "&lt;pad&gt;, &lt;img src=x&gt;, class 0" in card.text and "<img" not in card.text
    assert "class 17 and 12 more" in card.text and "class 18" not in card.text
    assert f"fine-tuned from `{tmp_path.name}`." in card.text and str(tmp_path.parent) not in card.text


def test_a_repository_is_not_its_own_model(tmp_path, runs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs["classifier"], "outputs/hub/me/it/checkpoint-4")
    for model in ("outputs/hub/me/it", "outputs/hub/me/../me/it/checkpoint-4"):
        with pytest.raises(SystemExit, match=f"--model {model} is in outputs/hub/me/it, which is written anew."):
            main([f"--model={model}", "--repo-id=me/it", "--dry-run"])
    main(["--model=outputs/hub/me/it/checkpoint-4", "--repo-id=me/other", "--dry-run"])
    Path("outputs/hub/me/file").write_text("no folder")
    with pytest.raises(SystemExit, match="outputs/hub/me/file"):
        main([f"--model={runs['classifier']}", "--repo-id=me/file", "--dry-run"])


def test_killed_upload(hub, runs, tmp_path):
    """The process dies while it sends the weights: nothing loads, and the same command does it all later."""
    command = [sys.executable, str(Path(__file__).parents[1] / "scripts" / "push_to_hub.py")]
    command += [f"--model={runs['classifier']}", "--repo-id=me/it"]
    environment = environment_for(hub, tmp_path / "home") | {"HF_TOKEN": TOKEN}
    hub.holds_uploads = True
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
        assert hub.upload_arrived.wait(120), (tmp_path / "log").read_text()
        process.kill()
        process.wait()
    repository = hub.repositories["me/it"]
    assert set(repository.commits[repository.branches["main"]]) == {".gitattributes"} and not hub.large_files
    with pytest.raises(OSError, match="me/it"):
        ClusterFormerForImageClassification.from_pretrained("me/it", cache_dir=tmp_path / "cache")

    hub.holds_uploads = False
    main(command[2:])
    assert len(repository.commits) == 2
    model = ClusterFormerForImageClassification.from_pretrained("me/it", cache_dir=tmp_path / "later")
    assert fingerprint(model) == fingerprint(build("classifier"))
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        assert TOKEN.encode() not in path.read_bytes(), path


def test_tokens_and_folders_are_left_out_of_commands(monkeypatch):
    oauth, organisation = f"hf_oauth_{'d' * 12}.{'e' * 12}.{'f-' * 6}", "api_org_" + "g" * 34
    words = {
        f"--hub_token {TOKEN}": "--hub_token ...",
        f"--hub_token={TOKEN}": "--hub_token=...",
        "--hub-token secret": "--hub-token ...",
        "--hub-token='a secret'": "--hub-token=...",
        "--data 'a b'": "--data 'a b'",
        f"--name={TOKEN}": "--name=hf_...",
        f"--name {oauth}": "--name hf_...",
        organisation: "api_org_...",
        "--model /home/me/outputs/mine": "--model mine",
        "--output_dir=/home/me/outputs/mine/": "--output_dir=mine",
        "--model outputs/mine": "--model outputs/mine",
        "--hub_token secret": "--hub_token ...",
    }
    monkeypatch.setattr(sys, "argv", [str(Path.cwd() / "scripts" / "run.py"), *shlex.split(" ".join(words))])
    assert command() == " ".join(["python scripts/run.py", *words.values()])
    monkeypatch.setattr(sys, "argv", ["scripts/run.py", "--hub_token=one\ntwo", "--lr=1e-3"])
    assert command().endswith("scripts/run.py --hub_token=... --lr=1e-3")
    monkeypatch.setattr(sys, "argv", ["/home/alice/run.py"])
    assert command() == "python run.py"


def test_answers_of_the_hub_are_not_blamed_on_the_card():
    """Some are a `ValueError` too, as what huggingface_hub says of a card's metadata."""
    response = Mock(status_code=400, headers={})
    with pytest.raises(HubError, match="Nothing was uploaded to me/it: the name is reserved"):
        with explained_errors("me/it"):
            raise BadRequestError("the name is reserved", response=response)
