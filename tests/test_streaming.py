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
"""Training on shards: every picture once an epoch, also after a resume, over processes and workers."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clusterformer_hf.data import streaming
from clusterformer_hf.data.digits import write_digits
from clusterformer_hf.data.images import open_image
from clusterformer_hf.data.shards import PictureShards, count_samples, find_shards, load_whole
from clusterformer_hf.data.shards import main as write_shards
from clusterformer_hf.data.streaming import StreamingDataset
from clusterformer_hf.training import ClusterFormerTrainingArguments
from scripts.run_image_classification import DataArguments, load_shards, main
from tests import nano


ROOT = Path(__file__).parents[1]
NANO = nano.CLASSIFIER | {"drop_path_rate": 0.2}


@pytest.fixture(autouse=True, scope="module")
def settings(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    folder = str(tmp_path_factory.mktemp("cache"))
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder))
    patch.setenv("HF_DATASETS_CACHE", folder)  # for subprocesses
    patch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Eighty digits in six shards, five of fifteen and one of five, and ten for validation in one."""
    root = tmp_path_factory.mktemp("shards")
    write_digits(root / "digits", num_train=80, num_val=10)
    write_shards(["--dataset_name", str(root / "digits"), "--output", str(root / "shards"), "--shard_size=15"])
    return root / "shards"


def collate(examples: list[dict]) -> dict:
    return {
        "names": [example["name"] for example in examples],
        "pixels": [example["pixel_values"] for example in examples],
    }


def epoch_names(parts, workers, epoch, skipped=0) -> list[list[list[str]]]:
    """For each process the names in its batches, without the skipped ones."""
    args = ClusterFormerTrainingArguments(
        output_dir="unused", use_cpu=True, report_to="none", dataloader_num_workers=workers
    )
    found = []
    for part in parts:
        part.set_epoch(epoch, skipped)
        loader = part.loader(args, collate)
        batches = [batch.get("names") for batch in loader]
        assert len(batches) == len(loader) and batches[:skipped] == [None] * skipped
        found.append(batches[skipped:])
    return found


def parts_of(pictures, processes=2, batch_size=4, seed=3) -> list[StreamingDataset]:
    def transform(image):
        return torch.rand(2) + np.asarray(image).mean()

    ids = list(range(10))
    return [StreamingDataset(pictures, transform, ids, seed, batch_size, rank, processes) for rank in range(processes)]


def flat(batches) -> list[str]:
    return [name for process in batches for batch in process for name in batch]


def test_every_picture_once(shards, monkeypatch):
    """Two processes of two workers; also when resumed in mid-epoch, in windows of seven."""
    monkeypatch.setattr(streaming, "WINDOW", 7)
    pictures = find_shards(str(shards))["train"]
    assert len(pictures) == 80 and sorted(pictures.sizes) == [5, 15, 15, 15, 15, 15]
    parts = parts_of(pictures)
    whole = epoch_names(parts, workers=2, epoch=1)
    assert len(flat(whole)) == len(set(flat(whole))) == 80
    assert [len(process) for process in whole] == [10, 10]
    for done in (1, 4, 9):
        assert epoch_names(parts, 2, 1, skipped=done) == [process[done:] for process in whole]
    other = epoch_names(parts, workers=2, epoch=2)
    assert set(flat(other)) == set(flat(whole)) and other != whole
    assert epoch_names(parts, 2, 1) == whole
    # Batches are mixed over shards, not only the order of the shards.
    assert len({name.split(":")[0] for batch in whole[0][:4] for name in batch}) > 1


def test_shards_are_opened_once(shards, monkeypatch):
    """However many windows their pictures are mixed in."""
    monkeypatch.setattr(streaming, "WINDOW", 7)
    opened, read = [], PictureShards.read
    monkeypatch.setattr(
        PictureShards, "read", lambda self, shard, *place: opened.append(shard) or read(self, shard, *place)
    )
    (part,) = parts_of(find_shards(str(shards))["train"], processes=1)
    assert len(list(part)) == 80 and sorted(opened) == list(range(6))


def test_a_worker_without_a_batch_reads_nothing(shards, monkeypatch):
    """Of two workers, the one batch is the first one's."""
    (part,) = parts_of(find_shards(str(shards))["train"], 1, 1000)
    read = []
    monkeypatch.setattr(part, "_read", lambda *place: read.append(place) or iter(()))
    info = SimpleNamespace(id=1, num_workers=2)
    monkeypatch.setattr("clusterformer_hf.data.streaming.get_worker_info", lambda: info)
    assert list(part) == [] and read == []


@pytest.mark.parametrize("processes, workers, batch_size", [(1, 0, 8), (1, 3, 8), (3, 2, 5), (7, 1, 4)])
def test_sizes_that_do_not_divide(processes, workers, batch_size, shards):
    pictures = find_shards(str(shards))["train"]
    parts = parts_of(pictures, processes, batch_size)
    found = epoch_names(parts, workers, epoch=0)
    names = flat(found)
    assert len(set(names)) == 80 and len(names) == processes * -(-80 // processes)
    assert len({tuple(map(len, process)) for process in found}) == 1  # processes wait for each other
    assert epoch_names(parts, workers, 0, skipped=2) == [process[2:] for process in found]


def test_random_numbers_come_with_the_picture(shards):
    """Whatever process and worker augments it."""
    pictures = find_shards(str(shards))["train"]

    def examples(processes):
        return {example["name"]: example for part in parts_of(pictures, processes) for example in part}

    one, two = examples(1), examples(2)
    assert one.keys() == two.keys()
    for name, example in one.items():
        assert torch.equal(example["pixel_values"], two[name]["pixel_values"]) and example["seed"] == two[name]["seed"]


def test_labels_and_pixels(shards):
    """The pictures and classes of the folder, through TAR and through Parquet."""
    digits = shards.parent / "digits"
    expected = {(path.parent.name, path.read_bytes()) for path in digits.glob("train/*/*.png")}
    pictures = find_shards(str(shards))["train"]
    read = [sample for shard, size in enumerate(pictures.sizes) for sample in pictures.read(shard, 0, size)]
    assert {(str(label), image["bytes"]) for _, image, label in read} == expected
    assert len(list(pictures.read(0, 4, 9))) == 5

    rows = load_whole(pictures)
    assert len(rows) == 80 and rows.features["label"].names == [str(digit) for digit in range(10)]
    (shards.parent / "parquet").mkdir(exist_ok=True)
    rows = rows.cast_column("image", datasets.Image())
    rows.select(range(30)).to_parquet(shards.parent / "parquet" / "train-00000.parquet")
    rows.select(range(30, 80)).to_parquet(shards.parent / "parquet" / "train-00001.parquet")
    pictures = find_shards(str(shards.parent / "parquet"))["train"]
    assert pictures.sizes == [30, 50] and pictures.class_names == [str(digit) for digit in range(10)]
    read = [sample for shard, size in enumerate(pictures.sizes) for sample in pictures.read(shard, 0, size)]
    assert {(str(label), image["bytes"]) for _, image, label in read} == expected


def test_pictures_of_several_formats(tmp_path):
    """In one archive, whatever their endings."""
    contents = {}
    for number, ending in enumerate(("jpg", "jpeg", "png", "PNG", "webp", "jpg")):
        path = tmp_path / "pictures" / f"class_{number % 2}" / f"{number}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(path)
        contents[path.read_bytes()] = number % 2
    write_shards(["--dataset_name", str(tmp_path / "pictures"), "--output", str(tmp_path / "shards")])
    pictures = find_shards(str(tmp_path / "shards"))["train"]
    read = [(image["bytes"], label) for _, image, label in pictures.read(0, 0, 6)]
    whole = [(row["image"]["bytes"], row["label"]) for row in load_whole(pictures)]
    assert sorted(read) == sorted(whole) == sorted(contents.items())


def test_named_columns(tmp_path):
    """Where shards have two of a kind, those that are named are read, for training and for evaluation."""
    pictures, kind = [Image.new("RGB", (8, 8), (grey,) * 3) for grey in (0, 255)], datasets.ClassLabel(names=["a", "b"])
    columns = {"image": pictures, "thumbnail": pictures[::-1], "label": [0, 1], "fine": [1, 0]}
    features = {"image": datasets.Image(), "thumbnail": datasets.Image(), "label": kind, "fine": kind}
    rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
    rows.to_parquet(tmp_path / "train-00000.parquet")
    with pytest.raises(
        ValueError, match="one picture .any name.*got image, thumbnail, label, fine.*--image_column_name"
    ):
        find_shards(str(tmp_path))
    with pytest.raises(ValueError, match=r"one class \(kind\), got image"):
        find_shards(str(tmp_path), None, "thumbnail", "kind")
    arguments = DataArguments(str(tmp_path), streaming=True, image_column_name="thumbnail", label_column_name="fine")
    training = ClusterFormerTrainingArguments(str(tmp_path / "out"), do_train=True, use_cpu=True)
    found = load_shards(arguments, training)[0]["train"]
    read = [(open_image(image).getpixel((0, 0))[0], label) for _, image, label in found.read(0, 0, 2)]
    whole = [(open_image(row["image"]).getpixel((0, 0))[0], row["label"]) for row in load_whole(found)]
    assert read == whole == [(255, 1), (0, 0)]


def flags(shards, output_dir, *more) -> list[str]:
    run = [f"--dataset_name={shards}", f"--output_dir={output_dir}", "--streaming", "--do_train", "--do_eval"]
    run += ["--use_cpu", "--report_to=none", "--disable_tqdm=true", f"--config_overrides={json.dumps(NANO)}"]
    run += ["--per_device_train_batch_size=8", "--total_train_batch_size=16", "--dataloader_num_workers=2"]
    return [*run, "--learning_rate=1e-3", "--mixup_alpha=0.2", "--num_train_epochs=2", "--save_steps=2", *more]


def test_training_and_resuming(shards, tmp_path):
    """Two epochs of five steps; a run resumed in the second has the same weights."""
    main(flags(shards, tmp_path / "whole"))
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    assert state["global_step"] == 10 and state["epoch"] == 2
    assert json.loads((tmp_path / "whole" / "train_results.json").read_text())["train_samples"] == 80
    assert json.loads((tmp_path / "whole" / "eval_results.json").read_text())["eval_samples"] == 10
    for step in (4, 8):
        resumed = f"--resume_from_checkpoint={tmp_path / 'whole' / f'checkpoint-{step}'}"
        main(flags(shards, tmp_path / str(step), resumed))
        expected = load_file(tmp_path / "whole" / "model.safetensors")
        for name, tensor in load_file(tmp_path / str(step) / "model.safetensors").items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_two_processes_of_two_workers(shards, tmp_path):
    """As a user starts it; names of the pictures of both epochs, also where it was resumed."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        "from clusterformer_hf.data.augmentation import ClassificationCollator as Collator\n"
        "from scripts import run_image_classification as script\n"
        "class Names(Collator):\n"
        "    def __call__(self, examples):\n"
        "        if 'name' in examples[0]:\n"
        "            with open(f'{sys.argv[1]}-{os.environ[\"RANK\"]}-{os.getpid()}', 'a') as file:\n"
        "                file.writelines(example['name'] + '\\n' for example in examples)\n"
        "        return super().__call__(examples)\n"
        "script.ClassificationCollator = Names\n"
        "script.main(sys.argv[2:])\n"
    )

    def run(name, *more):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
        command += [str(tmp_path / name / "names"), *flags(shards, tmp_path / name / "out", *more)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=500)
        assert ended.returncode == 0, ended.stderr[-5000:]
        return sorted(line for path in (tmp_path / name).glob("names-*") for line in path.read_text().splitlines())

    names = run("whole", "--num_train_epochs=1", "--save_steps=2", "--eval_strategy=no")
    assert len(names) == len(set(names)) == 80
    resumed = f"--resume_from_checkpoint={tmp_path / 'whole' / 'out' / 'checkpoint-2'}"
    rest = run("resumed", "--num_train_epochs=1", resumed)
    assert len(rest) == len(set(rest)) == 48 and set(rest) < set(names)  # behind two steps of 16


def test_bad_input(shards, tmp_path):
    with pytest.raises(ValueError, match="There are no shards in .*nowhere.*\n?.*Expected are shards"):
        find_shards(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is no shard. Expected are shards"):
        find_shards(str(shards.parent / "digits"))
    with pytest.raises(ValueError, match="--streaming needs --dataset_name and takes no --max_train_samples"):
        main(flags(shards, tmp_path, "--max_train_samples=3"))

    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "png")
    path = tmp_path / "train-00000.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in (
            ("a.png", content.getvalue()),
            ("a.cls", b"0"),
            ("b.png", content.getvalue()),
            ("b.cls", b"7"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert count_samples(str(path)) == 2
    with pytest.raises(ValueError, match="Nothing names the classes of .*train-00000.tar"):
        find_shards(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"train-00000.tar: b has a picture and the class 7, which should be in .0, 2."
    ):
        list(PictureShards([str(path)], [2], ["cat", "dog"]).read(0, 0, 2))
    with pytest.raises(FileExistsError):
        write_shards(["--dataset_name", str(shards.parent / "digits"), "--output", str(shards)])
