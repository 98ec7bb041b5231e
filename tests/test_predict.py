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
"""scripts/predict.py on real pictures, with a small classifier and a small detector."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from transformers import (
    DeformableDetrImageProcessor,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
)

from clusterformer_hf import (
    ClusterFormerBackbone,
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    ClusterFormerModel,
)
from clusterformer_hf.visualization import palette
from scripts.predict import main


ROOT = Path(__file__).parents[1]
NAMES = {0: "cat", 1: "coffee", 2: "person"}
NANO = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
    "center_grid": [2, 2, 2, 2],
    "decoder_hidden_size": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "id2label": NAMES,
    "initializer_range": 0.3,
}
CLASSIFIER_PROCESSOR = ViTImageProcessor(size={"height": 64, "width": 64})
DETECTOR_PROCESSOR = DeformableDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return save(ClusterFormerForImageClassification, CLASSIFIER_PROCESSOR, tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    return save(ClusterFormerForObjectDetection, DETECTOR_PROCESSOR, tmp_path_factory.mktemp("detector"))


def save(model_class, processor, folder: Path) -> Path:
    torch.manual_seed(0)
    model = model_class(ClusterFormerConfig(**NANO))
    for head in getattr(model, "class_heads", []):
        torch.nn.init.zeros_(head.bias)  # so that some scores are above the threshold and some below
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Two pictures of one name in two folders, a third, and files that are none."""
    folder = tmp_path / "pictures"
    for name, pixels, size in (
        ("one/cat.png", data.chelsea(), (180, 120)),
        ("two/cat.jpg", data.coffee(), (180, 120)),
        ("two/person.png", data.astronaut(), (100, 140)),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize(size).save(folder / name)
    (folder / "two" / "broken.png").write_text("no picture")
    (folder / "two" / "notes.txt").write_text("left out")
    (folder / "two" / ".hidden.png").write_text("left out silently")
    return folder


def entries(folder: Path) -> list[dict]:
    return json.loads((folder / "predictions.json").read_text())


def detections_of(model: Path, path: str, threshold: float) -> list[dict]:
    """What the model and its image processor find in a picture, without the pipeline."""
    picture = Image.open(path).convert("RGB")
    inputs = DeformableDetrImageProcessor.from_pretrained(model)(picture, return_tensors="pt")
    with torch.no_grad():
        outputs = ClusterFormerForObjectDetection.from_pretrained(model).eval()(**inputs)
    (found,) = DETECTOR_PROCESSOR.post_process_object_detection(outputs, threshold, [picture.size[::-1]])
    rows = zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True)
    return [{"score": score, "label": NAMES[label], "box": box} for score, label, box in rows]


def assert_same_detections(found: list[dict], expected: list[dict]):
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-5)
    boxes = [[row["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for row in found]
    assert np.abs(np.array(boxes) - [row["box"] for row in expected]).max() <= 1.001  # whole pixels


def outline_colors(picture: Path, size: dict, row: dict) -> np.ndarray:
    """Colours (n, 3) of the pixels along the visible part of a box."""
    pixels = np.asarray(Image.open(picture)).astype(int)
    left, right = (min(max(row["box"][side], 0), size["width"] - 1) for side in ("xmin", "xmax"))
    top, bottom = (min(max(row["box"][side], 0), size["height"] - 1) for side in ("ymin", "ymax"))
    upright, level = pixels[top : bottom + 1, [left, right]], pixels[[top, bottom], left : right + 1]
    return np.concatenate([upright.reshape(-1, 3), level.reshape(-1, 3)])


def assert_boxes_are_drawn(picture: Path, result: dict):
    """The outline of every box has colours of classes; the most certain one's own, where no label lies over it."""
    colors = palette(len(NAMES)).round().astype(int)
    for rank, row in enumerate(result["predictions"]):
        outline = outline_colors(picture, result["size"], row)
        of_class = (outline[:, None] == colors).all(axis=-1)
        assert of_class.any(axis=-1).mean() > 0.8  # labels have letters
        if rank == 0:
            label = {name: index for index, name in NAMES.items()}[row["label"]]
            assert of_class[:, label].mean() > 0.5
    original = np.asarray(Image.open(result["file"]).convert("RGB"))
    assert (np.asarray(Image.open(picture)) == original).all(axis=-1).mean() > 0.2  # the rest is the picture


def test_detector_as_a_command(detector, pictures, tmp_path):
    """The real command: JSON, pictures and panels of all that can be read, by name what cannot, and exit code 1."""
    output_dir, missing = tmp_path / "out", str(tmp_path / "missing.png")
    command = [sys.executable, ROOT / "scripts" / "predict.py", pictures / "one", pictures / "two", missing]
    command += ["--model", detector, "--output_dir", output_dir, "--clusters", "--threshold", "0.6", "--batch_size=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "2 of 5 could not be read" in done.stderr and "notes.txt" in done.stderr
    assert "broken.png: not a picture" in done.stderr and "missing.png: no such file" in done.stderr
    assert "is not supported" not in done.stderr  # the pipeline's false alarm

    files = [pictures / name for name in ("one/cat.png", "two/broken.png", "two/cat.jpg", "two/person.png")]
    results = entries(output_dir)
    assert [result["file"] for result in results] == [*map(str, files), missing]
    assert [result.get("picture") for result in results] == ["cat.png", None, "cat_2.png", "person.png", None]
    assert [result.get("error") is None for result in results] == [True, False, True, True, False]
    for result in results:
        if "error" in result:
            assert set(result) == {"file", "error"}
            continue
        assert result["file"] in done.stdout
        assert 1 < len(result["predictions"]) < 12
        assert_same_detections(result["predictions"], detections_of(detector, result["file"], 0.6))
        drawn = output_dir / result["picture"]
        assert Image.open(drawn).size == (result["size"]["width"], result["size"]["height"])
        assert_boxes_are_drawn(drawn, result)
        tiles = 1 + len(result["predictions"])
        width, height = np.array(Image.open(result["file"]).size) * 256 // max(Image.open(result["file"]).size)
        rows, columns = -(-tiles // min(tiles, 4)), min(tiles, 4)
        panel = Image.open(output_dir / "clusters" / result["picture"])
        assert np.abs(np.array(panel.size) - (8 + columns * (width + 8), 8 + rows * (height + 8))).max() <= 4
    expected = {"cat.png", "cat_2.png", "person.png", "predictions.json", "clusters"}
    assert {path.name for path in output_dir.iterdir()} == expected
    assert len(list((output_dir / "clusters").iterdir())) == 3


def test_batches_of_mixed_sizes_change_nothing(detector, pictures, tmp_path):
    for batch_size in (1, 3):
        files = [str(pictures / name) for name in ("one/cat.png", "two/cat.jpg", "two/person.png")]
        main(
            [*files, f"--model={detector}", f"--output_dir={tmp_path / str(batch_size)}", f"--batch_size={batch_size}"]
        )
    alone, together = entries(tmp_path / "1"), entries(tmp_path / "3")
    for one, other in zip(alone, together, strict=True):
        assert one["file"] == other["file"]
        expected = [{**row, "box": [*row["box"].values()]} for row in one["predictions"]]
        assert_same_detections(other["predictions"], expected)


def test_nothing_found(detector, pictures, tmp_path, capsys):
    picture = pictures / "one" / "cat.png"
    main([str(picture), f"--model={detector}", f"--output_dir={tmp_path}", "--threshold=1", "--clusters"])
    (result,) = entries(tmp_path)
    assert result["predictions"] == [] and "cat.png: nothing found" in capsys.readouterr().out
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "cat.png")), np.asarray(Image.open(picture)))
    assert Image.open(tmp_path / "clusters" / "cat.png").size == (256 + 16, 171 + 16)  # the picture alone


def test_classifier(classifier, pictures, tmp_path, capsys):
    """Classes and scores are the model's; the picture has them below it, itself unchanged."""
    files = [pictures / "one" / "cat.png", pictures / "two" / "person.png"]
    main([*map(str, files), f"--model={classifier}", f"--output_dir={tmp_path}", "--top_k=2", "--batch_size=2"])
    out = capsys.readouterr().out
    model = ClusterFormerForImageClassification.from_pretrained(classifier).eval()
    for file, result in zip(files, entries(tmp_path), strict=True):
        picture = Image.open(file)
        assert result["file"] == str(file) and result["size"] == {"width": picture.width, "height": picture.height}
        with torch.no_grad():
            scores = model(**CLASSIFIER_PROCESSOR(picture, return_tensors="pt")).logits[0].softmax(dim=0)
        values, classes = scores.topk(2)
        assert [row["label"] for row in result["predictions"]] == [NAMES[index] for index in classes.tolist()]
        assert [row["score"] for row in result["predictions"]] == pytest.approx(values.tolist(), abs=1e-5)
        assert f"{file}: {NAMES[int(classes[0])]} {values[0]:.3f}, {NAMES[int(classes[1])]} {values[1]:.3f}" in out
        drawn, pixels = Image.open(tmp_path / result["picture"]), np.asarray(picture)
        assert drawn.height > picture.height + 15 and drawn.width >= picture.width
        np.testing.assert_array_equal(np.asarray(drawn)[: picture.height, : picture.width], pixels)
        caption = np.asarray(drawn)[picture.height :]
        assert caption.min() < 80 and caption.max() == 255  # black on white


def test_pictures_are_upright(classifier, tmp_path):
    picture = Image.fromarray(data.chelsea()).resize((60, 40))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "photo.jpg", exif=exif)
    main([str(tmp_path / "photo.jpg"), f"--model={classifier}", f"--output_dir={tmp_path / 'out'}"])
    assert entries(tmp_path / "out")[0]["size"] == {"width": 40, "height": 60}


def test_folders_and_patterns_name_each_file_once(classifier, pictures, tmp_path):
    """A pattern that looks into folders, a folder, a file again, and a name that looks like a pattern."""
    (pictures / "two" / "broken.png").unlink()
    shutil.copy(pictures / "one" / "cat.png", pictures / "one" / "cat[1].png")
    inputs = [f"{pictures}/**/*.jpg", pictures / "one", pictures / "two", pictures / "one" / "cat.png"]
    main([*map(str, inputs), str(pictures / "one" / "cat[1].png"), f"--model={classifier}", f"--output_dir={tmp_path}"])
    files = [str(pictures / name) for name in ("two/cat.jpg", "one/cat.png", "one/cat[1].png", "two/person.png")]
    assert [result["file"] for result in entries(tmp_path)] == files
    names = [result["picture"] for result in entries(tmp_path)]
    assert names == ["cat.png", "cat_2.png", "cat[1].png", "person.png"]
    for file, name in zip(files, names):
        width, height = Image.open(file).size
        drawn = np.asarray(Image.open(tmp_path / name))[:height, :width]
        np.testing.assert_array_equal(drawn, np.asarray(Image.open(file)))


def test_inputs_are_never_written_over(classifier, pictures):
    """The results go into the pictures' own folder."""
    folder = pictures / "one"
    shutil.copy(folder / "cat.png", folder / "CAT_2.png")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    main([str(folder), f"--model={classifier}", f"--output_dir={folder}"])
    assert {name: (folder / name).read_bytes() for name in before} == before
    results = entries(folder)
    assert [Path(result["file"]).name for result in results] == ["CAT_2.png", "cat.png"]
    assert [result["picture"] for result in results] == ["CAT_2_2.png", "cat_3.png"]
    assert {path.name for path in folder.iterdir()} == {*before, "CAT_2_2.png", "cat_3.png", "predictions.json"}


def test_nothing_can_be_read(classifier, pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    broken = str(pictures / "two" / "broken.png")
    with pytest.raises(SystemExit, match="2 of 2 could not be read") as error:
        main([broken, str(tmp_path / "empty"), f"--model={classifier}", f"--output_dir={tmp_path / 'out'}"])
    assert f"{broken}: not a picture" in str(error.value) and "empty: no pictures in this folder" in str(error.value)
    assert [(Path(row["file"]).name, "error" in row) for row in entries(tmp_path / "out")] == [
        ("broken.png", True),
        ("empty", True),
    ]


# ---- models that it does not run -------------------------------------------------------------------------------------


def run_model(folder: Path, pictures: Path, *flags: str):
    main([str(pictures / "one"), f"--model={folder}", f"--output_dir={folder / 'out'}", *flags])


@pytest.mark.parametrize("model_class", [ClusterFormerModel, ClusterFormerBackbone])
def test_bare_backbones_are_refused(model_class, pictures, tmp_path):
    model_class(ClusterFormerConfig(**NANO)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"holds {model_class.__name__}, a backbone without a head.*Supported: image"):
        run_model(tmp_path, pictures)


def test_other_tasks_are_refused(pictures, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTForMaskedImageModeling(ViTConfig(image_size=32, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling, which is not supported.*ViTForImage"):
        run_model(tmp_path, pictures)


@pytest.mark.parametrize(
    "names, message",
    [
        (["ClusterFormerForDreams"], "holds ClusterFormerForDreams, which is not supported"),
        (None, "names no architecture"),
    ],
)
def test_unknown_architectures_are_refused(classifier, pictures, tmp_path, names, message):
    config = json.loads((classifier / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": names}))
    with pytest.raises(ValueError, match=message):
        run_model(tmp_path, pictures)


def test_wrong_arguments_are_refused(classifier, pictures, tmp_path):
    with pytest.raises(ValueError, match="--clusters needs a detector of ClusterFormer.*ForImageClassification"):
        run_model(classifier, pictures, "--clusters")
    with pytest.raises(ValueError, match="nowhere is no folder with a saved model"):
        run_model(tmp_path / "nowhere", pictures)
    with pytest.raises(ValueError, match=r"--threshold must be in \[0, 1\], got 50.0"):
        run_model(classifier, pictures, "--threshold=50")
    with pytest.raises(ValueError, match="--batch_size must be at least 1, got 0"):
        run_model(classifier, pictures, "--batch_size=0")
