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
"""Pictures of clusters, of boxes and of the pixels that a box was read from."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import DeformableDetrImageProcessor
from transformers.utils import ModelOutput

from clusterformer_hf import ClusterFormerConfig, ClusterFormerForObjectDetection
from clusterformer_hf.visualization import (
    box_assignment,
    cluster_map,
    detection_queries,
    draw_box_assignments,
    draw_boxes,
    draw_center_paths,
    draw_clusters,
    draw_heat,
    draw_stages,
    palette,
    segment_queries,
    spread_over,
)


NANO = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
    "center_grid": [2, 2, 2, [2, 3]],
    "decoder_hidden_size": 16,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "num_labels": 3,
    "initializer_range": 0.3,  # so that clusters differ from the cells that they start in
}


def detect(pixel_values, pixel_mask=None, dtype=torch.float64):
    """Outputs of a new detector with clusters; its boxes are the moments, since the refinement starts at zero."""
    torch.manual_seed(0)
    model = ClusterFormerForObjectDetection(ClusterFormerConfig(**NANO)).eval().to(dtype)
    torch.nn.init.normal_(model.decoder.pixel_projections.pixel_weight.weight)  # some pixels count, others do not
    with torch.no_grad():
        return model(pixel_values.to(dtype), pixel_mask, output_cluster_assignments=True)


def heats(outputs, index: int, **kwargs) -> list[np.ndarray]:
    return [box_assignment(outputs, index, query, **kwargs) for query in range(outputs.logits.shape[1])]


def box_of_moments(heat: np.ndarray) -> list[float]:
    """(center_x, center_y, width, height) in [0, 1] of the evenly filled box with the mean and variance of a map."""
    sides = []
    for axis, size in enumerate(heat.shape):
        marginal = heat.sum(axis=1 - axis) / heat.sum()
        position = (np.arange(size) + 0.5) / size
        mean = (marginal * position).sum()
        variance = (marginal * (position - mean) ** 2).sum() + 1 / (12 * size**2)  # pixels are squares, no points
        sides.append((mean, np.sqrt(12 * variance)))
    (row, height), (column, width) = sides
    return [column, row, min(width, 0.999), min(height, 0.999)]  # the model's bound


def test_boxes_are_the_moments_of_the_assignment():
    """At sizes that the strides divide, to rounding: weights, heads and levels are those of the M-step."""
    outputs = detect(torch.randn(2, 3, 96, 160))
    for index in range(2):
        boxes = [box_of_moments(heat) for heat in heats(outputs, index)]
        np.testing.assert_allclose(boxes, outputs.pred_boxes[index], atol=1e-9)
        assert np.ptp(boxes, axis=0).min() > 0.1  # not all the same


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and mask of an image of 72 x 100 pixels and one of 40 x 61."""
    pixel_mask = torch.ones(2, 72, 100)
    pixel_mask[1, 40:], pixel_mask[1, :, 61:] = 0, 0
    return torch.randn(2, 3, 72, 100), pixel_mask


def test_boxes_are_nearly_the_moments_where_levels_do_not_align():
    """9 x 13, 5 x 7 and 3 x 4 pixels, in the second image 5 x 8, 3 x 4 and 2 x 2: within .03 to .12 pixels, by seed."""
    outputs = detect(*padded_batch())
    for index, (height, width) in enumerate([(9, 13), (5, 8)]):
        for box, heat in zip(outputs.pred_boxes[index].numpy(), heats(outputs, index), strict=True):
            assert heat.shape == (height, width)
            if heat.max() > 0:  # the second image has fewer centres
                difference = np.abs(box_of_moments(heat) - box) * [width, height, width, height]
                assert difference.max() < 0.15


def test_maps_of_all_centres_share_out_what_every_pixel_counts():
    outputs = detect(*padded_batch())
    for index in range(2):
        for layer in range(2):
            maps = np.stack(heats(outputs, index, layer=layer))
            assert maps.min() >= 0 and maps.max() <= 1
            counts = maps.sum(axis=0)
            assert counts.min() > 0 and counts.max() < 1 and np.ptp(counts) > 0.1
    first, last = (box_assignment(outputs, 0, 0, layer=layer) for layer in (0, 1))
    assert np.abs(first - last).max() > 1e-3
    np.testing.assert_array_equal(last, box_assignment(outputs, 0, 0))


def test_maps_of_a_padded_image_are_those_of_the_image_alone():
    pixel_values, pixel_mask = padded_batch()
    maps = heats(detect(pixel_values, pixel_mask), 1)
    alone = heats(detect(pixel_values[1:, :, :40, :61]), 0)
    assert len(maps) == 6 and len(alone) == 4  # two of the batch's centres have no cell in the smaller image
    np.testing.assert_allclose([heat for heat in maps if heat.max() > 0], alone, atol=1e-9)


def test_maps_are_read_from_half_precision():
    outputs = detect(torch.randn(1, 3, 64, 64), dtype=torch.bfloat16)
    boxes = [box_of_moments(heat) for heat in heats(outputs, 0)]
    np.testing.assert_allclose(boxes, outputs.pred_boxes[0], atol=1e-3)


def test_spread_over():
    np.testing.assert_array_equal(spread_over(np.array([[1.0, 2.0]]), (2, 4)), [[1, 1, 2, 2], [1, 1, 2, 2]])
    np.testing.assert_allclose(spread_over(np.array([[1.0, 2.0]]), (1, 3)), [[1, 1.5, 2]])
    np.testing.assert_allclose(spread_over(np.array([[3.0], [6.0], [9.0]]), (2, 1)), [[4], [8]])


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"index": 1}, r"`index` must be in \[0, 1\), got 1"),
        ({"query": 6}, r"`query` must be in \[0, 4\), got 6"),
        ({"query": -1}, r"`query` must be in \[0, 4\), got -1"),
        ({"layer": 2}, r"`layer` must be in \[-2, 2\), got 2"),
    ],
)
def test_no_such_assignment(keywords, message):
    outputs = detect(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=message):
        box_assignment(outputs, **{"index": 0, "query": 0, **keywords})


def test_outputs_without_assignments():
    with pytest.raises(ValueError, match="output_cluster_assignments=True"):
        box_assignment(ModelOutput(logits=torch.zeros(1, 4, 3)), 0, 0)


@pytest.mark.parametrize("threshold, top_k", [(0.5, 100), (0.3, 100), (0.0, 7), (0.999, 100)])
def test_detection_queries_are_those_of_the_image_processor(threshold, top_k):
    """Boxes taken by our indices are the processor's, one by one, and so are scores and classes."""
    outputs = ModelOutput(logits=torch.randn(3, 50, 4), pred_boxes=torch.rand(3, 50, 4))
    processed = DeformableDetrImageProcessor().post_process_object_detection(outputs, threshold, None, top_k)
    queries = detection_queries(outputs, threshold, top_k)
    assert len(queries) == 3
    for index, (query, detections) in enumerate(zip(queries, processed, strict=True)):
        assert len(query) == len(detections["scores"]) and (threshold > 0.9 or len(query) > 0)
        centers, sizes = outputs.pred_boxes[index, query].split(2, dim=-1)
        assert torch.equal(torch.cat([centers - sizes / 2, centers + sizes / 2], dim=-1), detections["boxes"])
        scores = outputs.logits[index, query, detections["labels"]].sigmoid()
        assert torch.equal(scores, detections["scores"])


# ---- pictures --------------------------------------------------------------------------------------------------------


def found(boxes, labels, scores=None) -> dict[str, torch.Tensor]:
    scores = [0.9] * len(labels) if scores is None else scores
    return {
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels, dtype=torch.long),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
    }


def color_of(label: int) -> list[int]:
    return palette(label + 1)[label].round().astype(int).tolist()


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 90, 90))


def test_boxes_are_drawn_where_they_are():
    drawn = draw_boxes(grey(200, 120), found([[20, 40, 80, 100], [120, 60, 180.4, 110]], [2, 5]))
    pixels = np.asarray(drawn)
    assert drawn.size == (200, 120) and drawn.mode == "RGB"
    for (left, top, right, bottom), label in (((20, 40, 80, 100), 2), ((120, 60, 180, 110), 5)):
        assert (pixels[top : bottom + 1, [left, right]] == color_of(label)).all()
        assert (pixels[[top, bottom], left : right + 1] == color_of(label)).all()
        assert (pixels[top + 2 : bottom - 1, left + 2 : right - 1] == 90).all()  # two pixels wide
        assert (pixels[top - 8 : top, left] == color_of(label)).all()  # the label's background, above the box
        assert (pixels[top - 12 : top, left : left + 40] < 40).all(axis=-1).any()  # its text
    assert color_of(2) != color_of(5)
    outside = np.ones((120, 200), dtype=bool)
    outside[20:101, 20:120], outside[40:111, 120:] = False, False
    assert (pixels[outside] == 90).all()


def test_names_and_scores_are_written():
    boxes, picture = [[10, 40, 100, 100]], grey(200, 120)
    drawings = [
        draw_boxes(picture, found(boxes, [1]), {1: "cat"}),
        draw_boxes(picture, found(boxes, [1]), {1: "dog"}),
        draw_boxes(picture, found(boxes, [1], [0.8]), {1: "cat"}),
        draw_boxes(picture, found(boxes, [1])),
    ]
    assert len({drawing.tobytes() for drawing in drawings}) == 4
    (cat, dog, *_) = (np.asarray(drawing) for drawing in drawings)
    assert (cat[40:] == dog[40:]).all()  # nothing but the text differs


@pytest.mark.parametrize("box", [[-30, -20, 50, 60], [150, 70, 230, 200], [-5, -5, 300, 300]])
def test_what_lies_outside_is_cut_off(box):
    pixels = np.asarray(draw_boxes(grey(200, 120), found([box], [0])))
    left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], 199), min(box[3], 119)
    assert (pixels[bottom, left : right + 1] == color_of(0)).all()
    assert (pixels[top + 20 : bottom + 1, [left, right]] == color_of(0)).all()
    assert ((pixels == color_of(0)).all(axis=-1)).sum() > 2 * (right - left)


def test_the_most_certain_box_lies_on_top():
    same = [[20, 40, 80, 100]] * 2
    pixels = np.asarray(draw_boxes(grey(200, 120), found(same, [2, 5], [0.9, 0.8])))
    assert (pixels[30:100, 20] == color_of(2)).all()  # label and box


def test_no_detections_change_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw_boxes(grey(40, 30), found([], []))
    assert drawn.tobytes() == grey(40, 30).tobytes()


def test_boxes_on_grey_and_tiny_pictures():
    assert draw_boxes(Image.new("L", (40, 30)), found([[5, 5, 20, 20]], [0])).mode == "RGB"
    assert draw_boxes(Image.new("RGB", (1, 1)), found([[0, 0, 1, 1]], [0])).size == (1, 1)


def test_heat_colours_the_pixels_of_the_map():
    heat = np.zeros((2, 4))
    heat[0, 3] = 0.2  # the highest is the strongest, whatever its value
    pixels = np.asarray(draw_heat(grey(80, 40), heat)).astype(int)
    assert (pixels[30:, :30] == 90).all()
    assert (pixels[:8, 72:] == pixels[0, -1]).all() and pixels[0, -1].tolist() == [230, 230, 13]
    assert (np.asarray(draw_heat(grey(80, 40), np.zeros((2, 4)))) == 90).all()


def left_half_outputs() -> ModelOutput:
    """Three centres: the first has the left half of the picture, the third the right, the second nothing."""
    level = torch.zeros(1, 2, 3, 4, 8)
    level[:, :, 0, :, :4], level[:, :, 2, :, 4:] = 1, 1
    logits = torch.full((1, 3, 2), -9.0)
    logits[0, 0, 1], logits[0, 2, 0] = 2.0, 3.0
    boxes = torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.1, 0.1], [0.75, 0.5, 0.5, 1.0]]])
    return ModelOutput(logits=logits, pred_boxes=boxes, decoder_cluster_assignments=((level,),))


def test_panel_shows_each_box_on_its_own_pixels():
    outputs, picture = left_half_outputs(), grey(400, 200)
    (detections,) = DeformableDetrImageProcessor().post_process_object_detection(outputs, 0.5, [(200, 400)])
    (queries,) = detection_queries(outputs)
    assert queries.tolist() == [2, 0]
    panel = draw_box_assignments(picture, outputs, detections, queries, side=200, columns=2)
    assert panel.size == (8 + 2 * 208, 8 + 2 * 108)
    pixels = np.asarray(panel).astype(int)
    tiles = [pixels[y : y + 100, x : x + 200] for y in (8, 116) for x in (8, 216)]
    np.testing.assert_array_equal(tiles[0][50, [20, 180]], [[90] * 3] * 2)  # all boxes, no heat
    assert (tiles[0][99, 20] == color_of(1)).all() and (tiles[0][99, 180] == color_of(0)).all()
    for tile, hot, cold, label in ((tiles[1], 180, 20, 0), (tiles[2], 20, 180, 1)):
        assert tile[50, hot].tolist() == [230, 230, 13] and tile[50, cold].tolist() == [90, 90, 90]
        assert (tile[99, hot] == color_of(label)).all() and (tile[99, cold] == 90).all()
    assert (tiles[3] == 255).all()


def test_panel_of_no_detections_is_the_picture():
    outputs = left_half_outputs()
    panel = draw_box_assignments(grey(400, 200), outputs, found([], []), torch.zeros(0, dtype=torch.long), side=200)
    assert panel.size == (216, 116) and (np.asarray(panel)[8:108, 8:208] == 90).all()


def test_panel_wants_the_centre_of_each_detection():
    detections = found([[0, 0, 10, 10]], [0])
    with pytest.raises(ValueError, match="There are 1 detections, but `queries` has 2"):
        draw_box_assignments(grey(40, 40), left_half_outputs(), detections, torch.tensor([0, 1]))


def test_cluster_map_and_its_picture():
    """The right column is padding; the clusters meet in the middle of the rest."""
    weights = torch.zeros(1, 2, 3, 2, 5)
    weights[0, 1, 2, :, :2], weights[0, 1, 0, :, 2:4] = 1, 1
    outputs = ModelOutput(cluster_assignments=(weights,))
    np.testing.assert_array_equal(cluster_map(outputs, stage=1, head=1), [[2, 2, 0, 0, -1]] * 2)
    pixels = np.asarray(draw_clusters(grey(40, 20), outputs, stage=1, head=1, opacity=1.0))
    assert (pixels[1:, 1:20] == color_of(2)).all() and (pixels[1:, 21:40] == color_of(0)).all()
    assert (pixels[:, 20] == 255).all()
    with pytest.raises(ValueError, match=r"`stage` must be in \[1, 1\], got 2"):
        cluster_map(outputs, stage=2)
    with pytest.raises(ValueError, match=r"`head` must be in \[0, 2\) for stage 1, got 2"):
        cluster_map(outputs, stage=1, head=2)


def test_panels_of_stages_fit_their_titles_and_flat_pictures():
    """Columns are as wide as their titles at least, and pictures at most four times as wide as a row is high."""
    outputs = ModelOutput(cluster_assignments=(torch.ones(2, 1, 16, 160, 90) / 16,) * 2)
    longest = ImageDraw.Draw(grey(1, 1)).textlength("stage 1: 16 clusters, 160 x 90")
    for sizes, width in ((((9, 160), (20, 160)), longest), (((4000, 10), (10, 10)), 4 * 100)):
        panel = draw_stages([grey(*size) for size in sizes], outputs, side=100)
        assert panel.size == (3 * (math.ceil(width) + 8) + 8, 20 + 2 * (100 + 8))


def test_paths_of_centres():
    """From the start to the end, where a dot has the cluster's colour; a centre without a place is not drawn."""
    places = torch.full((3, 2, 2, 2), torch.nan)
    places[:, 1, 1] = torch.tensor([[0.5, 0.125], [0.5, 0.5], [0.5, 0.875]])
    pixels = np.asarray(draw_center_paths(grey(81, 41), places, head=1))
    assert (pixels[20, 12:65] == 255).all() and (pixels[20, :9] == 90).all()
    assert (pixels[20, 71] == color_of(1)).all() and (pixels[:15] == 90).all()
    assert (np.asarray(draw_center_paths(grey(81, 41), places, head=0)) == 90).all()


def test_segments_have_their_centres():
    """Masks of a universal model lead to the centres whose masks they are, at any size and without the padding."""
    masks = torch.full((1, 4, 8, 12), -9.0)
    masks[0, 0, :6, :5], masks[0, 1, :6, 5:10], masks[0, 2, 2:4, 2:4], masks[0, 3, :6, :10] = 9, 9, 9, 9
    classes = torch.zeros(1, 4, 4)
    classes[0, [0, 1, 2, 3], [0, 1, 2, 0]] = torch.tensor([4.0, 4.0, 4.0, 2.0])
    real = torch.zeros(1, 1, 4, 8, 12)
    real[..., :6, :10] = 0.25
    outputs = ModelOutput(class_queries_logits=classes, masks_queries_logits=masks, cluster_assignments=(real,))
    found = np.zeros((4, 12, 20), bool)
    found[0, :, :10], found[1, :, 10:], found[2, 4:8, 4:8], found[3] = True, True, True, True
    assert segment_queries(outputs, found, [0, 1, 2, 0], subtask="instance") == [0, 1, 2, 3]
    assert segment_queries(outputs, found[3:], [3], subtask="instance") == [
        3
    ]  # no centre is sure of it: the mask decides
    assert segment_queries(outputs, found[:0], [], subtask="instance") == []
    # Shared out: the left half went to the surer centre, of the right half only a strip is left.
    found[1, :, 12:] = False
    assert segment_queries(outputs, found[:2], [0, 1], subtask="panoptic") == [0, 1]
    assert segment_queries(outputs, found[1:2], [0], subtask="panoptic") == [3]
    assert segment_queries(outputs, found[1:2], [3], subtask="semantic") == [3]  # of no centre's class
