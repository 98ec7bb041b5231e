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
"""The built-in digit scenes: exact annotations, the same bytes for the same seed, disjoint digits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from clusterformer_hf.data import digit_scenes
from clusterformer_hf.data.digit_scenes import (
    BACKGROUND,
    BACKGROUND_CATEGORY,
    load_digits,
    make_scene,
    scene_at,
    write_digit_scenes,
)


NUM_SCENES = {"train": 12, "test": 5}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digit_scenes(tmp_path_factory.mktemp("data") / "scenes", 12, 5, seed=3, size=80)


@pytest.fixture(scope="module")
def digits():
    return {split: load_digits(split) for split in NUM_SCENES}


def read(folder, kind, split) -> dict:
    return json.loads((folder / "annotations" / f"{kind}_{split}.json").read_text())


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def tight_box(mask: np.ndarray) -> list[int]:
    y, x = np.nonzero(mask)
    return [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]


def test_splits_share_no_digit_and_have_all_classes(digits):
    (train, train_labels), (test, test_labels) = digits["train"], digits["test"]
    assert np.bincount(train_labels).tolist() == [400] * 10
    assert np.bincount(test_labels).tolist() == [100] * 10
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in test}


@pytest.mark.parametrize("split", NUM_SCENES)
def test_pictures_and_annotations_fit(split, folder):
    """pycocotools reads the boxes and masks; they are exact, and no pixel is in two digits."""
    coco = COCO(folder / "annotations" / f"instances_{split}.json")
    files = sorted(path.name for path in (folder / split).iterdir())
    assert [image["file_name"] for image in coco.imgs.values()] == files
    assert len(files) == NUM_SCENES[split]
    assert {i: category["name"] for i, category in coco.cats.items()} == {i + 1: str(i) for i in range(10)}
    for image in coco.imgs.values():
        picture = Image.open(folder / split / image["file_name"])
        assert (picture.mode, picture.size) == ("RGB", (80, 80))
        annotations = coco.imgToAnns[image["id"]]
        assert 1 <= len(annotations) <= 5
        masks = np.stack([coco.annToMask(annotation) for annotation in annotations])
        assert masks.sum(axis=0).max() == 1
        for annotation, mask in zip(annotations, masks):
            assert annotation["area"] == mask.sum() > 0
            assert annotation["bbox"] == tight_box(mask)
            assert annotation["iscrowd"] == 0


@pytest.mark.parametrize("split", NUM_SCENES)
def test_semantic_and_panoptic_maps_agree_with_the_masks(split, folder):
    coco = COCO(folder / "annotations" / f"instances_{split}.json")
    panoptic = read(folder, "panoptic", split)
    things = {category["id"]: category["isthing"] for category in panoptic["categories"]}
    assert things == {**dict.fromkeys(range(1, 11), 1), BACKGROUND_CATEGORY: 0}
    for annotation in panoptic["annotations"]:
        colours = pixels(folder / f"panoptic_{split}" / annotation["file_name"]).astype(int)
        segments = colours @ [1, 256, 65536]
        semantic = pixels(folder / f"semantic_{split}" / annotation["file_name"])
        infos = annotation["segments_info"]
        assert sorted(info["id"] for info in infos) == np.unique(segments).tolist()
        expected = np.full_like(semantic, BACKGROUND)
        for instance, info in zip(coco.imgToAnns[annotation["image_id"]], infos):
            np.testing.assert_array_equal(segments == info["id"], coco.annToMask(instance))
            assert info["category_id"] == instance["category_id"]
            expected[segments == info["id"]] = info["category_id"] - 1
        np.testing.assert_array_equal(semantic, expected)
        for info in infos:
            assert info["area"] == (segments == info["id"]).sum()
            assert info["bbox"] == tight_box(segments == info["id"])
    names = json.loads((folder / "annotations" / "semantic_labels.json").read_text())
    assert names == {**{str(i): str(i) for i in range(10)}, "10": "background"}


def test_ink_stands_out_and_sizes_vary(digits):
    scenes = [scene_at("train", index, *digits["train"], size=96) for index in range(60)]
    for scene in scenes:
        for mask in scene.masks:
            background = scene.image[scene.semantic_map() == BACKGROUND]
            assert np.abs(scene.image[mask].mean(axis=0) - background.mean(axis=0)).max() > 20
    sides = np.concatenate([scene.boxes[:, 2:].max(axis=1) for scene in scenes])
    assert sides.min() < 20 and sides.max() > 35 and sides.max() <= 0.45 * 96 + 1
    assert {len(scene.labels) for scene in scenes} == {1, 2, 3, 4, 5}


def test_digits_grow_with_the_picture(digits):
    small = [scene_at("test", index, *digits["test"], size=64).boxes[:, 2:].max() for index in range(20)]
    large = [scene_at("test", index, *digits["test"], size=256).boxes[:, 2:].max() for index in range(20)]
    assert np.mean(large) == pytest.approx(4 * np.mean(small), rel=0.25)


def test_no_box_shares_more_than_a_quarter(digits, monkeypatch):
    """However many digits are asked for."""
    place, shares = digit_scenes._place, []

    def record(generator, ink, masks, ink_areas):
        placed = place(generator, ink, masks, ink_areas)
        for mask in [] if placed is None else masks:
            shares.append(shared_share(tight_box(mask), tight_box(placed[2][-1])))
        return placed

    monkeypatch.setattr(digit_scenes, "_place", record)
    assert len(make_scene(np.random.default_rng(0), *digits["train"], size=64, max_digits=200).labels) > 10
    assert 0.1 < max(shares) <= 0.25


def shared_share(a: list[int], b: list[int]) -> float:
    """The area that two boxes share over the smaller one's."""
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(across, 0) * max(down, 0) / min(a[2] * a[3], b[2] * b[3])


def test_hidden_digits_keep_half_of_their_ink(digits, monkeypatch):
    """However many others lie over them, even where boxes may overlap at will."""
    place, ink_areas = digit_scenes._place, []

    def record(*args):
        placed = place(*args)
        ink_areas.extend([] if placed is None else [placed[2][-1].sum()])
        return placed

    monkeypatch.setattr(digit_scenes, "_place", record)
    monkeypatch.setattr(digit_scenes, "MAX_BOX_OVERLAP", 1)
    scene = make_scene(np.random.default_rng(0), *digits["train"], size=64, max_digits=200)
    assert 0.5 <= (scene.masks.sum(axis=(1, 2)) / ink_areas).min() < 0.6


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_bytes(folder, tmp_path):
    """In another process too, and a larger set begins with a smaller one's scenes."""
    command = [sys.executable, "-m", "clusterformer_hf.data.digit_scenes", "--output", tmp_path / "again"]
    numbers = ["--num-train=12", "--num-test=5", "--seed=3", "--size=80"]
    output = subprocess.run([*command, *numbers], check=True, text=True, capture_output=True, cwd=ROOT, env=os.environ)
    assert "12 training and 5 test scenes" in output.stdout
    assert contents(tmp_path / "again") == contents(folder)
    smaller = contents(write_digit_scenes(tmp_path / "smaller", 2, 2, seed=3, size=80))
    pictures = {name: content for name, content in smaller.items() if name.endswith(".png")}
    assert len(pictures) == 12
    assert pictures.items() <= contents(folder).items()
    other = contents(write_digit_scenes(tmp_path / "other", 2, 2, seed=4, size=80))
    assert all(other[name] != content for name, content in pictures.items() if name.startswith(("train", "test")))


def test_scene_in_memory_is_the_one_on_disk(folder, digits):
    scene = scene_at("test", 4, *digits["test"], seed=3, size=80)
    np.testing.assert_array_equal(scene.image, pixels(folder / "test" / "000005.png"))
    np.testing.assert_array_equal(scene.semantic_map(), pixels(folder / "semantic_test" / "000005.png"))


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="full is there already and not an empty folder"):
        write_digit_scenes(tmp_path / "full", 1, 1)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError, match="notes.txt"):
        write_digit_scenes(tmp_path / "full" / "notes.txt", 1, 1)
    for arguments, message in (
        ({"size": 63}, "at least 64.*63"),
        ({"num_test": 0}, "num_test.*0"),
        ({"seed": -1}, "-1"),
    ):
        with pytest.raises(ValueError, match=message):
            write_digit_scenes(tmp_path / "new", **{"num_train": 1, "num_test": 1} | arguments)
        assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert write_digit_scenes(tmp_path / "empty", 1, 1) == tmp_path / "empty"
