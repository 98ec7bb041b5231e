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
"""Clusters beside true segments: the measures, worked by hand, and scripts/evaluate_clusters.py on digit scenes."""

import json

import numpy as np
import pytest
import torch
from skimage.segmentation import slic
from transformers import (
    DeformableDetrImageProcessor,
    Mask2FormerImageProcessor,
    SegformerImageProcessor,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTModel,
)

from clusterformer_hf import (
    ClusterFormerConfig,
    ClusterFormerForObjectDetection,
    ClusterFormerForUniversalSegmentation,
)
from clusterformer_hf.data.coco_masks import read_coco_masks
from clusterformer_hf.data.digit_scenes import write_digit_scenes
from clusterformer_hf.metrics.cluster_quality import MEASURES, cluster_quality
from clusterformer_hf.modeling_clusterformer import ClusterFormerObjectDetectionOutput
from clusterformer_hf.visualization import cluster_map, stretch
from scripts.evaluate_clusters import box_labels, load_model, main, summarise, true_segments


NANO = {
    "patch_size": 2,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
    "center_grid": [3, 3, 3, 3],
}
DECODER = {"decoder_hidden_size": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
PROCESSOR = DeformableDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})

# Six pixels of background and two segments, of four and two.
SEGMENTS = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 2, 2]])


def test_measures_by_hand():
    """Cluster 5 is background alone, 7 has half of segment 1, and 9 the other half and all of segment 2."""
    quality = cluster_quality(np.array([[5, 5, 7, 9], [5, 5, 7, 9], [5, 5, 9, 9]]), SEGMENTS)
    assert list(quality) == list(MEASURES)
    # Of the pairs, 15 + 1 + (1 + 1) are in one cluster and segment, of 22 in one cluster, 22 in one segment, 66 in all.
    expected = 22 * 22 / 66
    assert quality["adjusted_rand_index"] == pytest.approx((18 - expected) / (22 - expected))
    assert quality["foreground_purity"] == pytest.approx(4 / 6)  # 2 of cluster 7, 2 of cluster 9
    assert quality["mean_best_overlap"] == pytest.approx((2 / 4 + 2 / 4) / 2)


@pytest.mark.parametrize(
    "clusters, expected",
    [(SEGMENTS + 3, (1, 1, 1)), (np.zeros_like(SEGMENTS), (0, 0, (4 / 12 + 2 / 12) / 2))],
    ids=["the segments themselves", "one cluster"],
)
def test_best_and_worst(clusters, expected):
    assert list(cluster_quality(clusters, SEGMENTS).values()) == pytest.approx(expected)


def test_every_pixel_its_own_cluster():
    quality = cluster_quality(np.arange(12).reshape(3, 4), SEGMENTS)
    assert quality["foreground_purity"] == 1 and quality["mean_best_overlap"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert quality["adjusted_rand_index"] == 0


def test_unknown_pixels_do_not_count():
    clusters = np.array([[5, 5, 7, 9], [5, 5, 7, 9], [5, 5, 9, 9]])
    wider, unknown = np.pad(clusters, 2, constant_values=7), np.pad(SEGMENTS, 2, constant_values=-1)
    assert cluster_quality(wider, unknown) == cluster_quality(clusters, SEGMENTS)


def test_pictures_without_foreground_or_background():
    clusters = np.array([[0, 0, 1, 1]] * 2)
    quality = cluster_quality(clusters, np.zeros((2, 4), int))
    assert np.isnan(quality["foreground_purity"]) and np.isnan(quality["mean_best_overlap"])
    assert list(cluster_quality(clusters, clusters + 1).values()) == [1, 1, 1]


def test_bad_maps_are_named():
    with pytest.raises(ValueError, match=r"shape \(2, 4\) and `segments` of \(3, 4\) do not match"):
        cluster_quality(np.zeros((2, 4), int), SEGMENTS)
    with pytest.raises(ValueError, match="negative at every pixel"):
        cluster_quality(SEGMENTS, np.full((3, 4), -1))


def test_heads_are_chosen_on_other_pictures():
    """The second head is best on the even pictures and bad on the odd ones, so it is scored on the odd ones alone."""
    scores = np.zeros((4, 2, 1))
    scores[:, 0, 0], scores[:, 1, 0] = (0.5, 0.6, 0.5, 0.6), (0.9, 0.1, 0.9, 0.1)
    mean, best = summarise(scores)
    assert mean["adjusted_rand_index"] == pytest.approx(0.525)
    assert best["adjusted_rand_index"] == pytest.approx((0.1 + 0.5) / 2)


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_digit_scenes(tmp_path_factory.mktemp("scenes") / "scenes", num_train=1, num_test=3)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("detector")
    ClusterFormerForObjectDetection(ClusterFormerConfig(**NANO, **DECODER)).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A model of transformers with the released form as its backbone."""
    folder = tmp_path_factory.mktemp("released")
    backbone = ClusterFormerConfig(**NANO, clustering="release", out_features=["stage1", "stage2", "stage3", "stage4"])
    config = UperNetConfig(backbone_config=backbone, hidden_size=8, auxiliary_in_channels=24, num_labels=11)
    UperNetForSemanticSegmentation(config).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def test_table_on_digit_scenes(scenes, detector, released, tmp_path, capsys):
    output = tmp_path / "new" / "clusters.json"
    main([f"--model={detector}", f"--dataset_name={scenes}", f"--released_model={released}", f"--output_file={output}"])
    printed, written = capsys.readouterr().out, json.loads(output.read_text())
    assert f"released: from {released}" in printed and written["pictures"] == 3
    kinds = ["ours", "ours, best head", "k-means", "SLIC", "released", "released, best head"]
    expected = [(stage, kind) for stage in ("1", "2", "3", "4") for kind in kinds]
    expected += [(stage, kind) for stage in ("decoder", "boxes") for kind in kinds[:4]]
    assert [(row["stage"], row["clusters"]) for row in written["rows"]] == expected
    for row in written["rows"]:
        assert all(-0.5 <= row[measure] <= 1 for measure in MEASURES) and 1 <= row["used"] <= 9
        line = f"{row['stage']:7}  {row['clusters']:19}" + "".join(f"{row[measure]:9.3f}" for measure in MEASURES)
        assert line in printed

    # The numbers of a stage, from the model and the masks themselves.
    data, _ = read_coco_masks(scenes / "test", scenes / "annotations" / "instances_test.json")
    model, ours, superpixels, decoder = ClusterFormerForObjectDetection.from_pretrained(detector).eval(), [], [], []
    for row in range(3):
        picture, segments = true_segments(data, row)
        with torch.no_grad():
            outputs = model(**PROCESSOR(picture, return_tensors="pt"), output_cluster_assignments=True)
        maps = [stretch(cluster_map(outputs, 2, head), (96, 96)) for head in range(2)]
        ours += [list(cluster_quality(labels, segments).values()) for labels in maps]
        finest = [weights.argmax(dim=0).numpy() for weights in outputs.decoder_cluster_assignments[-1][0][0]]
        decoder += [list(cluster_quality(stretch(labels, (96, 96)), segments).values()) for labels in finest]
        labels = slic(np.asarray(picture), n_segments=9, start_label=0)
        superpixels.append(list(cluster_quality(labels, segments).values()))
    rows = {row["clusters"]: [row[measure] for measure in MEASURES] for row in written["rows"] if row["stage"] == "2"}
    assert rows["ours"] == pytest.approx(np.mean(ours, axis=0).tolist())
    assert rows["SLIC"] == pytest.approx(np.mean(superpixels, axis=0).tolist())
    (row,) = (row for row in written["rows"] if (row["stage"], row["clusters"]) == ("decoder", "ours"))
    assert [row[measure] for measure in MEASURES] == pytest.approx(np.mean(decoder, axis=0).tolist())
    kmeans = {tuple(row[m] for m in MEASURES) for row in written["rows"] if row["clusters"] == "k-means"}
    assert len(kmeans) == 5  # of each stage's own features


def test_pixels_that_boxes_were_read_from():
    """Of a box are the pixels inside it that count more than the others there, however little that is."""
    maps = torch.zeros(1, 1, 4, 4, 4)
    maps[0, 0, 0, :2], maps[0, 0, 1, 3], maps[0, 0, 2], maps[0, 0, 3] = 0.8, 0.1, 0.9, 0.0
    logits = torch.tensor([[[2.0, -5.0], [-5.0, 2.0], [-5.0, -5.0], [2.0, -5.0]]])  # the third is no box
    boxes = torch.tensor([[[0.375, 0.375, 0.75, 0.75], [0.5, 0.75, 1, 0.5], [0.5, 0.5, 1, 1], [1.0, 0.5, 0, 1]]])
    labels = box_labels(
        ClusterFormerObjectDetectionOutput(logits=logits, pred_boxes=boxes, decoder_cluster_assignments=((maps,),))
    )
    assert labels.shape == (1, 16, 16)
    assert (labels[0, :7, :12] == 0).all() and (labels[0, 13:] == 1).all()
    assert (labels[0, 9:11] == 4).all() and (labels[0, :7, 12:] == 4).all()
    assert set(np.unique(labels)) == {0, 1, 4}


def test_masks_of_a_universal_model(scenes, released, tmp_path):
    """Beside the image, padding at the right: the mask's and the class's probability decide, over the real pixels."""
    torch.manual_seed(0)
    model = ClusterFormerForUniversalSegmentation(ClusterFormerConfig(**NANO, **DECODER, initializer_range=0.15)).eval()
    processor = Mask2FormerImageProcessor(size={"height": 64, "width": 64}, pad_size={"height": 96, "width": 96})
    (tmp_path / "model").mkdir()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    output = tmp_path / "clusters.json"
    flags = [f"--model={tmp_path / 'model'}", f"--dataset_name={scenes}", f"--released_model={released}"]
    main([*flags, f"--output_file={output}"])
    rows = [row for row in json.loads(output.read_text())["rows"] if row["stage"] == "masks"]
    assert [row["clusters"] for row in rows] == ["ours", "ours, best head", "k-means", "SLIC"]

    data, _ = read_coco_masks(scenes / "test", scenes / "annotations" / "instances_test.json")
    expected = []
    for row in range(3):
        picture, segments = true_segments(data, row)
        with torch.no_grad():
            outputs = model(**processor(picture, return_tensors="pt"))
        assert outputs.masks_queries_logits.shape[-2:] == (48, 48)  # of 96 pixels, 64 of them real
        classes = outputs.class_queries_logits.softmax(-1)[0, :, :-1].max(dim=-1).values
        masks = outputs.masks_queries_logits[0, :, :32, :32].sigmoid()
        labels = (masks * classes[:, None, None]).argmax(dim=0).numpy()
        expected.append(list(cluster_quality(stretch(labels, (96, 96)), segments).values()))
        assert len(np.unique(labels)) > 1
    assert [rows[0][measure] for measure in MEASURES] == pytest.approx(np.mean(expected, axis=0).tolist())


def test_random_released_weights_and_fewer_pictures(scenes, detector, tmp_path, capsys):
    flags = [f"--model={detector}", f"--dataset_name={scenes}", "--max_samples=2"]
    for number in range(2):
        main([*flags, f"--output_file={tmp_path / f'{number}.json'}"])
    assert "2 pictures" in (printed := capsys.readouterr().out) and "released: with random weights" in printed
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()


def test_overlapping_masks_and_crowds(scenes):
    data, _ = read_coco_masks(scenes / "test", scenes / "annotations" / "instances_test.json")
    row = int(np.diff(data.offsets).argmax())
    _, masks, _, _ = data.open(row)
    _, segments = true_segments(data, row)
    for number, mask in enumerate(masks, start=1):
        assert (segments[mask] == number).all()  # masks of digit scenes do not overlap
    assert (segments[~masks.any(axis=0)] == 0).all()
    data.crowds[data.offsets[row]] = True
    assert (true_segments(data, row)[1][masks[0]] == -1).all()


def test_bad_input(detector, scenes, tmp_path):
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="holds ViTModel, and no ClusterFormer is in it"):
        load_model(str(tmp_path))
    model = ClusterFormerForObjectDetection.from_pretrained(detector)
    state = model.state_dict()
    del state["decoder.center_projection.bias"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks weights of ClusterFormerForObjectDetection: decoder.center_projection"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="--max_samples must be at least 2, to choose heads and to score, got 1"):
        main([f"--model={detector}", f"--dataset_name={scenes}", "--max_samples=1"])
