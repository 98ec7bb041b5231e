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
"""Behaviour of the object detector: boxes from clusters, losses, padding, labels."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import DeformableDetrImageProcessor, RTDetrConfig
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

from clusterformer_hf import (
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    loss_clusterformer,
)
from clusterformer_hf.clustering_clusterformer import stage_geometry
from clusterformer_hf.decoder_clusterformer import (
    EVEN_EDGE,
    MAX_OFFSET,
    PyramidGeometry,
    boxes_to_moments,
    edges,
    mass_of,
    maximization,
    mixture_moments,
    moments_to_boxes,
    num_relative_features,
    relative_features,
)


NANO = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 3, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "center_grid": [4, 4, 4, 3],
    "decoder_hidden_size": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 32,
    "num_labels": 5,
}


def nano_detector(**kwargs) -> ClusterFormerForObjectDetection:
    torch.manual_seed(0)
    return ClusterFormerForObjectDetection(ClusterFormerConfig(**{**NANO, "initializer_range": 0.2, **kwargs})).eval()


def images(*size, seed=0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def targets(*counts, seed=0) -> list[dict[str, torch.Tensor]]:
    """Labels with so many random boxes, inside the image, for each image."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for count in counts:
        size = torch.rand(count, 2, generator=generator) * 0.5 + 0.05
        center = size / 2 + torch.rand(count, 2, generator=generator) * (1 - size)
        classes = torch.randint(NANO["num_labels"], (count,), generator=generator)
        labels.append({"class_labels": classes, "boxes": torch.cat([center, size], dim=-1)})
    return labels


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_documented_shapes_and_switches():
    model = nano_detector()
    pixel_values = images(2, 3, 96, 128)
    with torch.no_grad():
        plain = model(pixel_values)
        asked = model(pixel_values, output_cluster_assignments=True, output_hidden_states=True)
        trained = model(pixel_values, labels=targets(2, 0))
    assert set(plain) == {"logits", "pred_boxes", "last_hidden_state"}
    assert plain.logits.shape == (2, 9, 5) and plain.pred_boxes.shape == (2, 9, 4)
    assert plain.last_hidden_state.shape == (2, 9, 32)
    assert ((plain.pred_boxes > 0) & (plain.pred_boxes < 1)).all()
    assert len(asked.hidden_states) == 5 and len(asked.cluster_assignments) == 4
    shapes = [[tuple(level.shape) for level in layer] for layer in asked.decoder_cluster_assignments]
    assert shapes == [[(2, 4, 9, 12, 16), (2, 4, 9, 6, 8), (2, 4, 9, 3, 4)]] * 2
    for layer in asked.decoder_cluster_assignments:
        for level in layer:
            weights = level.sum(dim=2)
            assert ((weights > 0) & (weights < 1)).all()
    # One prediction of the encoder's centres, one of the first layer; the last layer's is the output.
    assert [set(output) for output in trained.auxiliary_outputs] == [{"logits", "pred_boxes"}] * 2


def test_assignments_of_a_pixel_sum_to_its_weight():
    """To what the linear map of each layer's weights says, and to nothing at padded pixels."""
    model, logits = nano_detector(), []
    weight = model.decoder.pixel_projections.pixel_weight
    weight.register_forward_hook(lambda module, args, output: logits.extend(output.split(4, dim=-1)))
    pixel_mask = torch.ones(2, 96, 128)
    pixel_mask[1, 64:], pixel_mask[1, :, 96:] = 0, 0
    with torch.no_grad():
        outputs = model(images(2, 3, 96, 128), pixel_mask, output_cluster_assignments=True)
    for levels, logit in zip(outputs.decoder_cluster_assignments, logits, strict=True):
        sums = torch.cat([level.sum(dim=2).flatten(2) for level in levels], dim=-1)
        weights = logit.sigmoid().mT
        assert weights.std() > 0.01
        torch.testing.assert_close(sums[0], weights[0])
        real = torch.cat([pixel_mask[1, ::stride, ::stride].flatten() for stride in (8, 16, 32)])
        torch.testing.assert_close(sums[1], weights[1] * real)


@pytest.mark.parametrize("size", [(64, 96), (72, 100)])
def test_a_box_starts_as_the_moments_of_its_pixels(size):
    """Also where levels do not align: 9 x 13, 5 x 7 and 3 x 4 pixels."""
    model = nano_detector().double()  # box heads start at zero
    with torch.no_grad():
        outputs = model(images(1, 3, *size).double(), output_cluster_assignments=True)
    total, moments = 0, [[0, 0], [0, 0]]
    weights = [level[0].sum(dim=0) for level in outputs.decoder_cluster_assignments[-1]]  # (K, height, width)
    for level in weights:
        total = total + level.sum(dim=(1, 2))
    for axis in range(2):
        mean = spread = 0
        for level in weights:
            side = level.shape[1 + axis]
            marginal = level.sum(dim=2 - axis)
            mean = mean + marginal @ (torch.arange(side).double() + 0.5) / side
        mean = mean / total
        for level in weights:
            side = level.shape[1 + axis]
            position = (torch.arange(side).double() + 0.5) / side
            deviation = (position - mean[:, None]).square() + 1 / (12 * side**2)
            spread = spread + (level.sum(dim=2 - axis) * deviation).sum(dim=1)
        moments[axis] = [mean, (12 * spread / total).sqrt()]
    expected = torch.stack([moments[1][0], moments[0][0], moments[1][1], moments[0][1]], dim=-1)
    torch.testing.assert_close(outputs.pred_boxes[0], expected.clamp(1e-3, 1 - 1e-3), rtol=0, atol=1e-9)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_heads_start_from_parts_that_make_up_the_cluster(heads):
    """Evenly around its mean, each smaller than the cluster, all together about as large; in units of its extent."""
    clustering = nano_detector(decoder_attention_heads=heads).decoder.layers[0].clustering.double()
    mean, extent = torch.tensor([[[0.5, 0.4]]]).double(), torch.tensor([[[0.1, 0.05]]]).double()
    with torch.no_grad():
        offset = clustering.part_offset(torch.randn(1, 1, 32).double())
        means, variances = clustering.parts(mean, extent.square(), offset)
    assert len({tuple(place) for place in means[0, :, 0].tolist()}) == heads
    torch.testing.assert_close(means.mean(dim=1), mean)
    torch.testing.assert_close(variances, extent.square()[:, None].expand_as(variances) / 2)
    together = (variances + (means - mean[:, None]).square()).mean(dim=1).sqrt()
    assert ((together / extent > 0.7) & (together / extent < 1.1)).all()


def test_moments_of_boxes_and_boxes_of_moments():
    boxes = torch.tensor([[0.5, 0.25, 0.8, 0.4], [0.3, 0.9, 0.1, 0.2]])
    mean, variance = boxes_to_moments(boxes)
    torch.testing.assert_close(mean, torch.tensor([[0.25, 0.5], [0.9, 0.3]]))
    torch.testing.assert_close(moments_to_boxes(mean, variance), boxes)


def pyramid(*sizes) -> PyramidGeometry:
    """Of levels of so many rows and columns, in float64."""
    return PyramidGeometry([stage_geometry(size, (2, 2), 1, None, torch.zeros(1).double()) for size in sizes])


def edges_of(*rows):
    """Edges along rows of a cluster with these masses of rows, on levels of so many rows."""
    geometry = pyramid(*[(len(masses), len(masses)) for masses in rows])
    marginals = [torch.tensor(sum(rows, [])).double().view(1, 1, -1, 1)] * 2
    return edges(marginals, geometry, *moments_of(marginals, geometry)).flatten()[:2]


def test_edges_are_where_mass_ends():
    nothing = torch.zeros(2).double()
    torch.testing.assert_close(edges_of([0.0] * 50 + [1] * 100 + [0] * 50), nothing, atol=1e-3, rtol=0)
    on_two_levels = edges_of([0.0] * 20 + [1] * 20 + [0] * 40, [0.0] * 10 + [1] * 10 + [0] * 20)
    torch.testing.assert_close(on_two_levels, nothing, atol=0.02, rtol=0)
    end, start = edges_of([0.0] * 50 + [1] * 60 + [0.2] * 60 + [0] * 30)  # a faint tail at the high end
    assert end > 0.2 and start < -0.1
    torch.testing.assert_close(edges_of([0.0, 2, 2, 1, 0, 0]), edges_of([0.0, 0, 1, 2, 2, 0]).flip(0))
    # Of few pixels, which are points here, and of none.
    torch.testing.assert_close(edges_of([0.0, 1, 0, 0]), nothing - EVEN_EDGE)
    torch.testing.assert_close(edges_of([0.0, 1, 1, 0]), nothing + math.log(math.cosh(3**0.5)) - EVEN_EDGE)
    torch.testing.assert_close(edges_of([0.0] * 8), nothing - EVEN_EDGE)


def random_marginals():
    """Of two heads and three clusters on two levels, rows and columns of equal mass, and what they are summed to."""
    torch.manual_seed(0)
    masses = [torch.rand(1, 2, height, width, 3).double().square() for height, width in ((6, 9), (3, 5))]
    marginals = [torch.cat([mass.sum(dim=dim) for mass in masses], dim=2) for dim in (3, 2)]
    return marginals, pyramid((6, 9), (3, 5))


def moments_of(marginals, geometry):
    values = torch.zeros(1, marginals[0].shape[1], marginals[0].shape[3], 1).double()
    return maximization(values, marginals, geometry)[1:]


def test_edges_of_every_head_cluster_and_axis():
    marginals, geometry = random_marginals()
    mean, variance = moments_of(marginals, geometry)
    found = edges(marginals, geometry, mean, variance)
    for head, cluster, axis in itertools.product(range(2), range(3), range(2)):
        mass = marginals[axis][0, head, :, cluster]
        positions = torch.cat([level[axis][0] for level in geometry.positions])
        z = (positions - mean[0, head, cluster, axis]) / variance[0, head, cluster, axis].sqrt()
        expected = [((mass * (rate * z).exp()).sum() / mass.sum()).log() - EVEN_EDGE for rate in (2, -2)]
        torch.testing.assert_close(found[0, head, cluster, 2 * axis : 2 * axis + 2], torch.stack(expected))

    def of_marginals(*marginals):
        return edges(marginals, geometry, *moments_of(marginals, geometry))

    assert torch.autograd.gradcheck(of_marginals, [lines.requires_grad_() for lines in marginals])


def test_order_of_what_a_centre_is_told():
    marginals, geometry = random_marginals()
    moments, mass = moments_of(marginals, geometry), mass_of(marginals)[..., None]
    share = mass / mass.sum(dim=1, keepdim=True)
    whole = mixture_moments(share, *moments)
    before = torch.rand(1, 3, 2).double(), torch.full((1, 3, 2), 0.01).double()
    told = relative_features(share, moments, whole, before, marginals, geometry)
    assert told.shape == (1, 3, num_relative_features(ClusterFormerConfig(decoder_attention_heads=2)))
    expected = []
    for head in range(2):
        offset = (moments[0][:, head] - whole[0]) / whole[1].sqrt()
        expected += [offset, (moments[1][:, head] / whole[1]).log() / 2, share[:, head].log()]
    expected += [(before[0] - whole[0]) / whole[1].sqrt(), (before[1] / whole[1]).log() / 2]
    expected += edges(marginals, geometry, *moments).unbind(dim=1)
    both = [lines.sum(dim=1, keepdim=True) for lines in marginals]
    expected.append(edges(both, geometry, whole[0][:, None], whole[1][:, None])[:, 0])
    torch.testing.assert_close(told, torch.cat(expected, dim=-1))


def test_clusters_without_pixels_stay_finite():
    """Masses, places and edges of nothing, far from where the centre was."""
    share, nowhere = torch.full((1, 2, 3, 1), 0.5), [torch.zeros(1, 2, 3, 2), torch.full((1, 2, 3, 2), 0.02**2)]
    whole, before = [moment[:, 0] for moment in nowhere], [torch.full((1, 3, 2), 0.9), torch.full((1, 3, 2), 0.01)]
    geometry = PyramidGeometry([stage_geometry((4, 4), (2, 2), 1, None, torch.zeros(1))])
    told = relative_features(share, nowhere, whole, before, [torch.zeros(1, 2, 4, 3)] * 2, geometry)
    assert told.isfinite().all() and told.abs().max() <= MAX_OFFSET


def test_post_processing_by_the_library():
    model = nano_detector()
    picture = torch.randint(256, (3, 60, 90), dtype=torch.uint8)
    processor = DeformableDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    inputs = processor(picture, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    (result,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(60, 90)], top_k=9)
    best = outputs.logits[0].sigmoid().flatten().argmax()
    box = center_to_corners_format(outputs.pred_boxes[0, best // 5]) * torch.tensor([90, 60, 90, 60])
    torch.testing.assert_close(result["boxes"][0], box)
    assert result["labels"][0] == best % 5


# ---- padding and sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 70), (33, 128), (61, 45)])
def test_padding_changes_nothing(size):
    model = nano_detector()
    pixel_values, mask = images(2, 3, 96, 128), torch.zeros(2, 96, 128)
    mask[0], mask[1, : size[0], : size[1]] = 1, 1
    pixel_values[1, :, size[0] :], pixel_values[1, :, :, size[1] :] = float("nan"), float("nan")
    with torch.no_grad():
        alone = model(pixel_values[1:, :, : size[0], : size[1]])
        padded = model(pixel_values, mask)
    real = padded.logits[1].amax(dim=-1) > -18  # a small image has fewer centres than the batch
    assert real.sum() == alone.logits.shape[1]
    torch.testing.assert_close(padded.logits[1][real], alone.logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded.pred_boxes[1][real], alone.pred_boxes[0], rtol=0, atol=1e-5)


def test_the_order_of_a_batch_does_not_matter():
    model = nano_detector()
    pixel_values, labels = images(3, 3, 64, 64), targets(2, 0, 3)
    with torch.no_grad():
        outputs = model(pixel_values, labels=labels)
        turned = model(pixel_values.flip(0), labels=labels[::-1])
    torch.testing.assert_close(turned.pred_boxes, outputs.pred_boxes.flip(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(turned.loss, outputs.loss)


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_transformers():
    model = nano_detector(class_loss_coefficient=1)
    labels = targets(3, 1)
    outputs = model(images(2, 3, 64, 64), labels=labels)
    predictions = [*outputs.auxiliary_outputs, {"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}]
    model.config.decoder_layers = len(predictions)  # transformers counts predictions so
    expected, expected_dict, _ = DeformableDetrForObjectDetectionLoss(
        outputs.logits,
        labels,
        "cpu",
        outputs.pred_boxes,
        model.config,
        torch.stack([prediction["logits"] for prediction in predictions]),
        torch.stack([prediction["pred_boxes"] for prediction in predictions]),
    )
    torch.testing.assert_close(outputs.loss, expected)
    for name, value in outputs.loss_dict.items():
        torch.testing.assert_close(value, expected_dict[name])
    without = nano_detector(class_loss_coefficient=1, auxiliary_loss=False)(images(2, 3, 64, 64), labels=labels)
    assert without.auxiliary_outputs is None and set(without.loss_dict) == {"loss_ce", "loss_bbox", "loss_giou"}


def test_the_varifocal_loss_is_that_of_rt_detr():
    coefficients = {"class_loss_coefficient": 0.5, "bbox_loss_coefficient": 4, "giou_loss_coefficient": 3}
    model = nano_detector(use_varifocal_loss=True, auxiliary_loss=False, **coefficients)
    labels = targets(3, 1)
    outputs = model(images(2, 3, 64, 64), labels=labels)
    weights = {"weight_loss_vfl": 0.5, "weight_loss_bbox": 4.0, "weight_loss_giou": 3.0}
    expected, expected_dict, _ = RTDetrForObjectDetectionLoss(
        outputs.logits,
        labels,
        "cpu",
        outputs.pred_boxes,
        RTDetrConfig(num_labels=5, auxiliary_loss=False, **weights),
    )
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(outputs.loss_dict["loss_ce"] * 0.5, expected_dict["loss_vfl"])


@pytest.mark.parametrize("use_varifocal_loss", [False, True])
@pytest.mark.parametrize("counts", [(2, 0), (0, 0), (300, 1)])
def test_any_number_of_objects_trains_every_parameter(counts, use_varifocal_loss):
    model = nano_detector(use_varifocal_loss=use_varifocal_loss).train()
    loss = model(images(2, 3, 64, 64), labels=targets(*counts)).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_the_order_of_the_objects_does_not_matter():
    model, pixel_values, (label,) = nano_detector(), images(1, 3, 64, 64), targets(6)
    order = torch.randperm(6)
    turned = {name: tensor[order] for name, tensor in label.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values, labels=[label]).loss, model(pixel_values, labels=[turned]).loss)


def test_identical_boxes_and_boxes_at_the_border():
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0], [0.05, 0.95, 0.1, 0.1], [0.98, 0.02, 0.04, 0.04]])
    label = {"class_labels": torch.tensor([1, 1, 0, 4]), "boxes": boxes}
    assert torch.isfinite(nano_detector()(images(1, 3, 64, 64), labels=[label]).loss)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_classes_of_any_integer_type(dtype):
    model, pixel_values, (label,) = nano_detector(), images(1, 3, 64, 64), targets(3)
    expected = model(pixel_values, labels=[label]).loss
    assert torch.equal(
        model(pixel_values, labels=[label | {"class_labels": label["class_labels"].to(dtype)}]).loss, expected
    )


def test_predictions_that_are_not_finite_give_a_loss_that_is_none():
    """And no message about the format of boxes; Trainer's check names the step."""
    model = nano_detector().train()
    outputs = model(images(1, 3, 64, 64) * math.inf, labels=targets(2))
    outputs.loss.backward()
    assert outputs.loss.isnan() and outputs.loss_dict == {}


def test_every_process_takes_part_whatever_it_predicts(monkeypatch):
    """In the mean over processes, which would wait for one whose predictions are not finite."""
    counted, mean = [], loss_clusterformer.mean_over_processes
    monkeypatch.setattr(loss_clusterformer, "mean_over_processes", lambda *args: counted.append(args[0]) or mean(*args))
    for scale in (1, math.inf):
        nano_detector()(images(1, 3, 64, 64) * scale, labels=targets(2))
    assert counted == [2, 2]


def test_labels_of_an_image_processor_that_pads():
    """It rescales boxes to the padded batch; the loss is that of boxes in the images' own areas."""
    processor = DeformableDetrImageProcessor(do_resize=False)
    pictures = [np.full((height, 64, 3), 90, np.uint8) for height in (32, 64)]
    box = {"bbox": [8, 4, 20, 16], "category_id": 1, "area": 320, "iscrowd": 0}
    annotations = [{"image_id": i, "annotations": [box]} for i in range(2)]
    batch = processor(pictures, annotations, return_tensors="pt")
    own = [processor(*pair, do_pad=False, return_tensors="pt")["labels"][0] for pair in zip(pictures, annotations)]
    assert not torch.equal(batch["labels"][0]["boxes"], own[0]["boxes"])
    model = nano_detector()
    with torch.no_grad():
        padded = model(**batch)
        expected = model(batch["pixel_values"], batch["pixel_mask"], labels=own)
        bare = [{name: label[name] for name in ("class_labels", "boxes")} for label in own]
        assert torch.equal(model(batch["pixel_values"], batch["pixel_mask"], labels=bare).loss, expected.loss)
    torch.testing.assert_close(padded.loss, expected.loss)
    # What is no size, or another one, is the business of whoever wrote it; boxes in the padding are not.
    for other in (None, "64x64", {"height": 64}, torch.tensor(5), [32, 32], np.array([1.0])):
        labels = [label | {"size": other} for label in bare]
        assert torch.equal(model(batch["pixel_values"], batch["pixel_mask"], labels=labels).loss, expected.loss)
    batch["labels"][0]["boxes"] = torch.tensor([[0.5, 0.9, 0.1, 0.1]])
    with pytest.raises(ValueError, match=r"labels\[0\]\['boxes'\]` has \[0.5, 1.79"):
        model(**batch)


def test_the_box_loss_shapes_the_clusters():
    model = nano_detector().train()
    outputs = model(images(1, 3, 64, 64), labels=targets(3))
    (outputs.loss_dict["loss_bbox"] + outputs.loss_dict["loss_giou"]).backward()
    clustering, pixels = model.decoder.layers[-1].clustering, model.decoder.pixel_projections
    for parameter in (
        clustering.query.weight,
        pixels.key.weight,
        clustering.logit_scale,
        clustering.spatial_weight,
    ):
        assert parameter.grad.abs().max() > 0
    of_last_layer = pixels.pixel_weight.weight.grad[-model.config.decoder_attention_heads :]
    assert of_last_layer.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_finite_and_close(dtype):
    model, pixel_values, labels = nano_detector(), images(1, 3, 64, 64), targets(2)
    with torch.no_grad():
        expected = model(pixel_values)
    with torch.autocast("cpu", dtype):
        outputs = model(pixel_values, labels=labels)
    assert torch.isfinite(outputs.loss)
    assert outputs.pred_boxes.dtype == torch.float32  # 16 bits would round a box by pixels
    error = 0.01 if dtype == torch.float16 else 0.05
    torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, rtol=0, atol=error)


@pytest.mark.parametrize("weight", [-12, -18])
def test_gradients_of_light_pixels_are_finite_in_float16(weight):
    model = nano_detector().train()
    torch.nn.init.constant_(model.decoder.pixel_projections.pixel_weight.bias, weight)
    with torch.autocast("cpu", torch.float16):
        loss = model(images(1, 3, 64, 64), labels=targets(2)).loss
    (64 * loss).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_training_on_one_picture_finds_its_boxes():
    model = nano_detector(initializer_range=0.06).train()
    pixel_values, labels = torch.full((1, 3, 64, 64), -1.0), targets(0)
    pixel_values[:, 0, 8:32, 6:28] = 1.0
    pixel_values[:, 1, 36:58, 30:62] = 1.0
    corners = torch.tensor([[6, 8, 28, 32], [30, 36, 62, 58]]) / 64
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], dim=-1)
    labels = [{"class_labels": torch.tensor([0, 1]), "boxes": boxes}]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = model(pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    with torch.no_grad():
        outputs = model.eval()(pixel_values)
    for label, box in enumerate(boxes):
        best = outputs.logits[0, :, label].argmax()
        torch.testing.assert_close(outputs.pred_boxes[0, best], box, rtol=0, atol=0.06)


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label, message",
    [
        ({"class_labels": torch.tensor([5]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}, r"in \[0, 5\).*got \[5\]"),
        ({"class_labels": torch.tensor([-1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}, r"got \[-1\]"),
        ({"class_labels": torch.tensor([1]), "boxes": torch.tensor([[10.0, 20.0, 30.0, 40.0]])}, "no pixels"),
        ({"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.1, 0.2, 0.9, 0.8]])}, "looks like corners"),
        ({"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, math.nan, 0.2]])}, "0.5, nan, 0.2"),
        ({"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}, r"shape \(2, 4\)"),
        ({"class_labels": torch.tensor([1.0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}, "integers"),
        ({"class_labels": torch.tensor([True]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}, "integers.*bool"),
        ({"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}, r"labels\[0\]` lacks class_labels"),
        ({"class_labels": [1], "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}, "`class_labels` of image 0.*got list"),
        ({"class_labels": torch.tensor([1]), "boxes": [[0.5, 0.5, 0.2, 0.2]]}, "`boxes` of image 0.*got list"),
    ],
)
def test_wrong_labels_are_named(label, message):
    with pytest.raises(ValueError, match=message):
        nano_detector()(images(1, 3, 64, 64), labels=[label])


@pytest.mark.parametrize("labels, message", [(torch.zeros(1), "got Tensor"), ([], "each of the 1 images, got 0")])
def test_labels_are_a_list_of_dicts(labels, message):
    with pytest.raises(ValueError, match=message):
        nano_detector()(images(1, 3, 64, 64), labels=labels)


# ---- saving, checkpointing, compiling --------------------------------------------------------------------------------


def test_the_backbone_of_a_classifier_is_taken_over(tmp_path):
    classifier = ClusterFormerForImageClassification(ClusterFormerConfig(**NANO))
    classifier.save_pretrained(tmp_path)
    model, report = ClusterFormerForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    for name, tensor in model.clusterformer.state_dict().items():
        assert torch.equal(tensor, classifier.clusterformer.state_dict()[name]), name
    assert all(not key.startswith("clusterformer.") for key in report["missing_keys"])


def test_save_and_load_is_bit_exact(tmp_path):
    model, pixel_values = nano_detector(), images(1, 3, 64, 64)
    model.save_pretrained(tmp_path)
    reloaded = ClusterFormerForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        outputs, again = model(pixel_values), reloaded(pixel_values)
    assert torch.equal(outputs.logits, again.logits) and torch.equal(outputs.pred_boxes, again.pred_boxes)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = nano_detector().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(images(2, 3, 64, 64), labels=targets(2, 1)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-3, atol=1e-5 + 1e-4 * gradient.abs().max().item()
        )


@pytest.mark.slow
def test_compiled_without_a_break():
    model, pixel_values = nano_detector(decoder_layers=1, decoder_num_iterations=1), images(1, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(pixel_values)
        outputs = model(pixel_values)  # after it: a first call must not be needed
    torch.testing.assert_close(compiled.logits, outputs.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(compiled.pred_boxes, outputs.pred_boxes, rtol=0, atol=1e-4)


def test_exported():
    model, pixel_values = nano_detector(decoder_layers=1), images(1, 3, 64, 64)
    with torch.no_grad():
        exported = torch.export.export(model, (), {"pixel_values": pixel_values}, strict=False).module()
        outputs, again = model(pixel_values), exported(pixel_values=pixel_values)
    torch.testing.assert_close(again.logits, outputs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.pred_boxes, outputs.pred_boxes, rtol=0, atol=1e-5)
