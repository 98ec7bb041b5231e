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
"""scripts/predict.py on real pictures, with a small classifier, a small detector and small models for segmentation."""

import base64
import functools
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hotcoco.panoptic import PanopticEval
from PIL import Image
from pycocotools.coco import COCO
from skimage import data
from transformers import (
    ConvNextImageProcessor,
    DeformableDetrImageProcessor,
    Mask2FormerImageProcessor,
    SegformerImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
)

from clusterformer_hf import (
    ClusterFormerBackbone,
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    ClusterFormerForSemanticSegmentation,
    ClusterFormerForUniversalSegmentation,
    ClusterFormerModel,
)
from clusterformer_hf.data.coco_masks import read_coco_masks
from clusterformer_hf.data.coco_panoptic import open_segments, read_panoptic
from clusterformer_hf.data.label_maps import open_label_map, read_class_names
from clusterformer_hf.segmentation_pictures import MAX_ENTRIES, add_legend, draw_segments, segment_colors, side_by_side
from clusterformer_hf.visualization import box_assignment, palette
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
UNIVERSAL_PROCESSOR = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=4)
SEMANTIC_PROCESSOR = SegformerImageProcessor(size={"height": 64, "width": 64})
DETECTOR_PROCESSOR = DeformableDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    return save(ClusterFormerForImageClassification, CLASSIFIER_PROCESSOR, tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    return save(ClusterFormerForObjectDetection, DETECTOR_PROCESSOR, tmp_path_factory.mktemp("detector"))


def save(model_class, processor, folder: Path, **fields) -> Path:
    torch.manual_seed(0)
    model = model_class(ClusterFormerConfig(**NANO | fields))
    for head in getattr(model, "class_heads", []):
        # Each centre finds one of the classes: scores of about .73, and .27 for the others.
        head.weight.data *= 0.05
        head.bias.data.copy_(torch.tensor([1, -1, -1]))
    if hasattr(model, "class_head"):
        torch.nn.init.constant_(model.class_head.bias[-1:], -5)  # every centre finds something
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def with_discs(forward):
    """
    A model's forward with masks and classes that do not hang on random weights: discs in the four quarters of a
    picture, which overlap, and of each a probability of one class.
    """

    @functools.wraps(forward)
    def forward_with_discs(self, pixel_values, pixel_mask=None, **kwargs):
        outputs = forward(self, pixel_values, pixel_mask=pixel_mask, **kwargs)
        pixel_mask = torch.ones_like(pixel_values[:, 0]) if pixel_mask is None else pixel_mask
        quarters = itertools.product((0.25, 0.75), repeat=2)
        for k, (label, (row, column)) in enumerate(zip((2, 0, 2, 1), quarters, strict=True)):
            outputs.class_queries_logits[:, k] = -4
            outputs.class_queries_logits[:, k, label] = -2 + 0.5 * k
            for i, mask in enumerate(outputs.masks_queries_logits[:, k]):
                real = pixel_mask[i].amax(dim=1).sum() / 4, pixel_mask[i].amax(dim=0).sum() / 4
                rows, columns = ((torch.arange(size) + 0.5) / side for size, side in zip(mask.shape, real))
                mask.copy_(4 - 40 * ((rows[:, None] - row).square() + (columns - column).square()))
        return outputs

    return forward_with_discs


@pytest.fixture(scope="module")
def universal(tmp_path_factory) -> Iterator[Path]:
    """Of three classes with ids of their own, the last of which has no instances."""
    folder = tmp_path_factory.mktemp("universal")
    fields = {"original_category_ids": [3, 7, 90], "label_ids_to_fuse": [2]}
    save(ClusterFormerForUniversalSegmentation, UNIVERSAL_PROCESSOR, folder, **fields)
    with pytest.MonkeyPatch.context() as patch:
        discs = with_discs(ClusterFormerForUniversalSegmentation.forward)
        patch.setattr(ClusterFormerForUniversalSegmentation, "forward", discs)
        yield folder


@pytest.fixture(scope="module")
def semantic(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("semantic")
    return save(ClusterFormerForSemanticSegmentation, SEMANTIC_PROCESSOR, folder, center_grid=[2, 2, 2, 4])


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
    command += ["--model", detector, "--output_dir", output_dir, "--clusters", "--threshold=0.5", "--batch_size=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "2 of 5 have no predictions" in done.stderr and "notes.txt" in done.stderr
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
        assert len(result["predictions"]) == 4
        assert_same_detections(result["predictions"], detections_of(detector, result["file"], 0.5))
        drawn = output_dir / result["picture"]
        assert Image.open(drawn).size == (result["size"]["width"], result["size"]["height"])
        assert_boxes_are_drawn(drawn, result)
        tiles = 1 + len(result["predictions"])
        width, height = np.array(Image.open(result["file"]).size) * 256 // max(Image.open(result["file"]).size)
        rows, columns = -(-tiles // min(tiles, 4)), min(tiles, 4)
        panel = Image.open(output_dir / "clusters" / result["picture"])
        assert np.abs(np.array(panel.size) - (8 + columns * (width + 8), 8 + rows * (height + 8))).max() <= 4
        page = page_data(output_dir / "clusters" / result["picture"].replace(".png", ".html"))
        assert len(page["objects"]) == len(result["predictions"]) and len(page["stages"]) == 4
        for row, found in zip(result["predictions"], page["objects"]):
            assert found["text"] == f"{row['label']} {row['score']:.2f}" and found["kind"] == "box"
    expected = {"cat.png", "cat_2.png", "person.png", "predictions.json", "clusters"}
    assert {path.name for path in output_dir.iterdir()} == expected
    assert len(list((output_dir / "clusters").iterdir())) == 6


def page_data(page: Path) -> dict:
    """What the page of a picture's clusters shows."""
    text = page.read_text("utf-8")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


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


def test_pictures_that_the_model_does_not_take(detector, pictures, tmp_path):
    """A line of pixels, which has no height in the model's size, is named; file names may be no text."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for name in ("a", "z"):
        shutil.copy(pictures / "one" / "cat.png", folder / f"{name}.png")
    Image.new("RGB", (1500, 1)).save(folder / "line.png")
    with pytest.raises(SystemExit, match="1 of 3 have no predictions:\n.*line.png: 1500 x 1 pixels: "):
        main([str(folder), f"--model={detector}", f"--output_dir={tmp_path / 'out'}", "--batch_size=3", "--clusters"])
    results = entries(tmp_path / "out")
    assert [Path(result["file"]) for result in results] == [folder / name for name in ("a.png", "line.png", "z.png")]
    assert [result.get("picture") for result in results] == ["a.png", None, "z.png"]


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


def test_clusters_of_a_classifier(pictures, tmp_path):
    """The page shows the picture as the model saw it, cut by its processor, and says what it was taken for."""
    processor = ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.5)
    model = save(ClusterFormerForImageClassification, processor, tmp_path / "model")
    file = pictures / "one" / "cat.png"
    main([str(file), f"--model={model}", f"--output_dir={tmp_path / 'out'}", "--clusters"])
    (result,) = entries(tmp_path / "out")
    page = page_data(tmp_path / "out" / "clusters" / "cat.html")
    assert page["objects"] == [] and [stage["heads"] for stage in page["stages"]] == [1, 2, 2, 2]
    best = result["predictions"][0]
    title = f"<title>cat.png: {best['label']} {best['score']:.3f}, "
    assert title in (tmp_path / "out" / "clusters" / "cat.html").read_text("utf-8")
    shown = Image.open(io.BytesIO(base64.b64decode(page["picture"].split(",")[1])))
    middle = Image.open(file).resize((192, 128), Image.Resampling.BICUBIC).crop((64, 32, 128, 96))
    assert shown.size == (64, 64) and np.abs(np.asarray(shown).astype(int) - np.asarray(middle)).mean() < 3
    assert Image.open(tmp_path / "out" / "clusters" / "cat.png").height == 20 + 200


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
    with pytest.raises(SystemExit, match="2 of 2 have no predictions") as error:
        main([broken, str(tmp_path / "empty"), f"--model={classifier}", f"--output_dir={tmp_path / 'out'}"])
    assert f"{broken}: not a picture" in str(error.value) and "empty: no pictures in this folder" in str(error.value)
    assert [(Path(row["file"]).name, "error" in row) for row in entries(tmp_path / "out")] == [
        ("broken.png", True),
        ("empty", True),
    ]


# ---- segmentation ----------------------------------------------------------------------------------------------------

FILES = ("one/cat.png", "two/cat.jpg", "two/person.png")


def segment(model: Path, pictures: Path, output_dir: Path, *flags: str) -> list[dict]:
    """Runs the script on all three pictures, of two sizes."""
    main([*(str(pictures / name) for name in FILES), f"--model={model}", f"--output_dir={output_dir}", *flags])
    return entries(output_dir)


def outputs_of(model_class, processor, folder: Path, path: str, **kwargs):
    """The model's outputs for a picture, without the pipeline, and the picture's height and width."""
    picture = Image.open(path).convert("RGB")
    with torch.no_grad():
        outputs = model_class.from_pretrained(folder).eval()(**processor(picture, return_tensors="pt"), **kwargs)
    return outputs, picture.size[::-1]


def assert_overlay(output_dir: Path, result: dict, on_top: np.ndarray, colors: np.ndarray):
    """The picture shows through the colours of its segments (-1 where there is none), and a legend names them."""
    original = np.asarray(Image.open(result["file"]).convert("RGB")).astype(float)
    drawn = np.asarray(Image.open(output_dir / result["picture"]).convert("RGB")).astype(float)
    height, width = on_top.shape
    assert drawn.shape[0] > height + 10 and drawn.shape[1] == max(width, 240)
    expected = np.where(on_top[..., None] < 0, original, 0.4 * original + 0.6 * colors[on_top])
    line = (drawn[:height, :width] == 255).all(axis=-1)
    assert line.mean() < 0.3 and np.abs(drawn[:height, :width] - expected)[~line].max() < 2.5
    legend = drawn[height:].reshape(-1, 3)
    shown = colors[np.unique(on_top[on_top >= 0])].round()
    assert all((np.abs(legend - color).max(axis=1) < 1.5).sum() > 30 for color in shown)


def test_panoptic_segments(universal, pictures, tmp_path, capsys):
    """They are those of the image processor, with those of stuff joined, and COCO's tools read the files."""
    results = segment(universal, pictures, tmp_path / "out", "--threshold=0.3", "--batch_size=2")
    printed = capsys.readouterr().out
    truth = read_panoptic("/", tmp_path / "out" / "panoptic", tmp_path / "out" / "panoptic.json")
    assert truth.categories == {3: "cat", 7: "coffee", 90: "person"} and truth.is_thing.tolist() == [True, True, False]
    labels = [[row["label"] for row in result["predictions"]] for result in results]
    assert all(labels) and max(map(len, labels)) > 1 and "person" in labels[0]
    joined = 0
    for row, result in enumerate(results):
        outputs, size = outputs_of(
            ClusterFormerForUniversalSegmentation, UNIVERSAL_PROCESSOR, universal, result["file"]
        )
        (found,) = UNIVERSAL_PROCESSOR.post_process_panoptic_segmentation(
            outputs, threshold=0.3, label_ids_to_fuse=set(), target_sizes=[size]
        )
        expected = {}
        for info in found["segments_info"]:
            # All stuff under one key, each instance under its own.
            key = "person" if info["label_id"] == 2 else info["id"]
            mask, score, _ = expected.get(key, (np.zeros(size, bool), 0, 0))
            mask = mask | (found["segmentation"] == info["id"]).numpy()
            expected[key] = mask, max(score, info["score"]), NAMES[info["label_id"]]
        joined += len(found["segments_info"]) - len(expected)
        expected = sorted(expected.values(), key=lambda value: -value[1])
        picture, segments, classes, _ = truth.open(row)
        assert picture.size == size[::-1] and segments.shape == size
        assert [NAMES[label] for label in classes.tolist()] == [name for _, _, name in expected]
        for number, (prediction, (mask, score, name)) in enumerate(
            zip(result["predictions"], expected, strict=True), 1
        ):
            np.testing.assert_array_equal(segments == number, mask)
            assert prediction["id"] == number and prediction["label"] == name and prediction["area"] == mask.sum()
            assert prediction["score"] == pytest.approx(score, abs=1e-5)
        assert_overlay(tmp_path / "out", result, segments - 1, segment_colors(classes))
        assert f"{result['file']}: " in printed
    assert joined > 0
    evaluation = PanopticEval(*[str(tmp_path / "out" / "panoptic.json")] * 2)
    evaluation.evaluate()
    assert evaluation.results()["All"]["pq"] == 1


def test_instances(universal, pictures, tmp_path):
    """Their masks are cut out at the picture's own size; none is of a class without; COCO's tools read the file."""
    results = segment(universal, pictures, tmp_path / "out", "--subtask=instance", "--threshold=0.2")
    file = tmp_path / "out" / "instances.json"
    instances, problems = read_coco_masks("/", file)
    assert problems == [] and instances.class_names == ["cat", "coffee"] and instances.category_ids == [3, 7]
    coco = COCO(str(file))
    scores = [annotation["score"] for annotation in coco.dataset["annotations"]]
    assert len(coco.loadRes(coco.dataset["annotations"]).anns) == len(scores) > 4 and min(scores) >= 0.2
    for row, result in enumerate(results):
        outputs, size = outputs_of(
            ClusterFormerForUniversalSegmentation, UNIVERSAL_PROCESSOR, universal, result["file"]
        )
        masks = F.interpolate(outputs.masks_queries_logits, size=size, mode="bilinear", align_corners=False)[0]
        expected = []
        for logits, classes in zip(masks, outputs.class_queries_logits[0].softmax(dim=-1)):
            inside = logits > 0
            sure = logits.sigmoid()[inside].mean().item() if inside.any() else 0
            expected += [(classes[label].item() * sure, NAMES[label], inside.numpy()) for label in (0, 1)]
        expected = sorted((value for value in expected if value[0] >= 0.2), key=lambda value: -value[0])
        picture, found, classes, _ = instances.open(row)
        assert len(found) == len(expected) == len(result["predictions"])
        for mask, label, prediction, (score, name, inside) in zip(found, classes, result["predictions"], expected):
            np.testing.assert_array_equal(mask, inside)
            assert NAMES[label] == name == prediction["label"] and prediction["score"] == pytest.approx(score, abs=1e-5)
            assert coco.anns[prediction["id"]]["bbox"] == prediction["bbox"]
        on_top = np.full(size, -1)
        for number in reversed(range(len(found))):
            on_top[found[number]] = number
        assert_overlay(tmp_path / "out", result, on_top, segment_colors(classes))


@pytest.mark.parametrize("kind", ["universal", "semantic"])
def test_label_maps(kind, universal, semantic, pictures, tmp_path, capsys):
    """As the image processor finds them, of both kinds of models."""
    model, processor, model_class, flags = {
        "universal": (
            universal,
            UNIVERSAL_PROCESSOR,
            ClusterFormerForUniversalSegmentation,
            ["--subtask=semantic"],
        ),
        "semantic": (semantic, SEMANTIC_PROCESSOR, ClusterFormerForSemanticSegmentation, []),
    }[kind]
    results = segment(model, pictures, tmp_path / "out", *flags)
    printed = capsys.readouterr().out
    assert read_class_names(tmp_path / "out" / "semantic_labels.json") == list(NAMES.values())
    for result in results:
        outputs, size = outputs_of(model_class, processor, model, result["file"])
        (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
        found = open_label_map(tmp_path / "out" / "semantic" / result["picture"])
        np.testing.assert_array_equal(found, expected.numpy())
        areas = {NAMES[label]: int((found == label).sum()) for label in np.unique(found)}
        assert {row["label"]: row["area"] for row in result["predictions"]} == areas
        largest = max(areas, key=areas.get)
        assert f"{result['file']}: {largest} {areas[largest] / found.size:.1%}" in printed
        assert_overlay(tmp_path / "out", result, found, segment_colors([0, 1, 2], 3))


def test_without_stuff_instances_are_the_default(universal, pictures, tmp_path):
    folder = shutil.copytree(universal, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_ids_to_fuse": []}))
    for model, file in ((folder, "instances.json"), (universal, "panoptic.json")):
        segment(model, pictures, tmp_path / file)
        assert {path.name for path in (tmp_path / file).glob("*.json")} == {file, "predictions.json"}


@pytest.mark.parametrize("subtask, file", [("panoptic", "panoptic.json"), ("instance", "instances.json")])
def test_no_segments(subtask, file, universal, pictures, tmp_path, capsys):
    results = segment(universal, pictures, tmp_path / "out", f"--subtask={subtask}", "--threshold=1")
    assert all(result["predictions"] == [] for result in results) and "nothing found" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / file).read_text())
    assert len(content["images"]) == 3
    assert all(annotation["segments_info"] == [] for annotation in content["annotations"])
    if subtask == "panoptic":
        assert not open_segments(tmp_path / "out" / "panoptic" / "cat.png").any()
    drawn, picture = (np.asarray(Image.open(path)) for path in (tmp_path / "out" / "cat.png", results[0]["file"]))
    np.testing.assert_array_equal(drawn[: picture.shape[0], : picture.shape[1]], picture)


def test_wrong_subtasks_are_refused(universal, semantic, classifier, pictures):
    with pytest.raises(ValueError, match="holds ClusterFormerForSemanticSegmentation, which has no --subtask panoptic"):
        run_model(semantic, pictures, "--subtask=panoptic")
    with pytest.raises(ValueError, match="ClusterFormerForImageClassification, which has no --subtask semantic"):
        run_model(classifier, pictures, "--subtask=semantic")


@pytest.mark.parametrize("kind", ["panoptic", "instance", "semantic"])
def test_clusters_of_segments(kind, universal, semantic, pictures, tmp_path):
    """The page has every segment with its mask, and the assignment of a centre whose mask it is."""
    folder, model_class, processor = {
        "semantic": (semantic, ClusterFormerForSemanticSegmentation, SEMANTIC_PROCESSOR),
    }.get(kind, (universal, ClusterFormerForUniversalSegmentation, UNIVERSAL_PROCESSOR))
    results = segment(folder, pictures, tmp_path / "out", "--threshold=0.3", "--clusters", f"--subtask={kind}")
    for result in results:
        outputs, size = outputs_of(model_class, processor, folder, result["file"], output_cluster_assignments=True)
        page = page_data(tmp_path / "out" / "clusters" / result["picture"].replace(".png", ".html"))
        assert len(page["stages"]) == 4 and len(page["objects"]) == len(result["predictions"]) > 0
        for row, found in zip(result["predictions"], page["objects"]):
            measured = f"{row['area'] / (size[0] * size[1]):.1%}" if kind == "semantic" else f"{row['score']:.2f}"
            assert found["text"] == f"{row['label']} {measured}" and found["kind"] == "mask"
            step = -(-max(size) // 128)
            mask = unpack(found["mask"])
            assert mask.shape == (-(-size[0] // step), -(-size[1] // step))
            assert mask.mean() == pytest.approx(row["area"] / (size[0] * size[1]), abs=0.03)
            heat = box_assignment(outputs, 0, found["query"])
            np.testing.assert_allclose(unpack(found["heat"]) / 255, heat, atol=0.51 / 255 + 1e-5)
            if kind != "semantic":
                fits = fits_of(outputs, mask > 0, list(NAMES.values()).index(row["label"]), kind)
                assert fits[found["query"]] > 0.9 * max(fits) > min(fits)  # the map is coarser than the picture
        panel = Image.open(tmp_path / "out" / "clusters" / result["picture"])
        assert panel.height == 20 + 200 and panel.width > 5 * 100  # the picture and four stages


def fits_of(outputs, mask: np.ndarray, label: int, kind: str) -> list[float]:
    """How well each centre fits: an instance's by its mask, a panoptic segment's by the pixels of it that it won."""
    masks = F.interpolate(outputs.masks_queries_logits, size=mask.shape, mode="bilinear")[0]
    if kind == "instance":
        return [float((own & mask).sum() / (own | mask).sum()) for own in (masks > 0).numpy()]
    best = outputs.class_queries_logits[0].softmax(dim=-1).max(dim=-1)
    weights = masks.sigmoid() * (best.values * (best.values > 0.3) * (best.indices == label))[:, None, None]
    winners = weights.argmax(dim=0).numpy()[mask]
    return [float((winners == query).mean()) for query in range(len(masks))]


def unpack(values: dict) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(values["values"]))
    return np.frombuffer(data, np.uint8).reshape(values["height"], values["width"])


def test_segments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"Masks of \(4, 5\) do not fit a picture of \(5, 4\)"):
        draw_segments(Image.new("RGB", (4, 5)), np.zeros((1, 4, 5)), segment_colors([0]))


def test_long_legends_end_with_a_number():
    picture = Image.new("RGB", (300, 20), "navy")
    long, longer = (add_legend(picture, ["cat"] * number, segment_colors(range(number))) for number in (40, 400))
    assert MAX_ENTRIES == 40 and long.width == longer.width == 300
    assert 0 <= longer.height - long.height < 30  # one entry more
    assert not np.array_equal(np.asarray(longer)[-15:], np.asarray(long)[-15:])
    panel = side_by_side([picture, long], ["one", "two"])
    assert panel.width == 2 * 300 + 3 * 8 and panel.height > long.height + 10


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
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(image_size=32, **sizes)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="--clusters needs a ClusterFormer, and .*vit holds ViTForImageClassification"):
        run_model(tmp_path / "vit", pictures, "--clusters")
    with pytest.raises(ValueError, match="nowhere is no folder with a saved model"):
        run_model(tmp_path / "nowhere", pictures)
    with pytest.raises(ValueError, match=r"--threshold must be in \[0, 1\], got 50.0"):
        run_model(classifier, pictures, "--threshold=50")
    with pytest.raises(ValueError, match="--batch_size must be at least 1, got 0"):
        run_model(classifier, pictures, "--batch_size=0")
