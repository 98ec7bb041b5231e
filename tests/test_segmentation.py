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
"""Behaviour of the segmentation models: masks, losses, padding, labels, one model's three readings."""

import pytest
import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerImageProcessor,
    SegformerImageProcessor,
    Trainer,
    TrainingArguments,
)
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from clusterformer_hf import (
    ClusterFormerConfig,
    ClusterFormerForObjectDetection,
    ClusterFormerForSemanticSegmentation,
    ClusterFormerForUniversalSegmentation,
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
    "train_num_points": 256,
    "num_labels": 5,
}
MODELS = [ClusterFormerForSemanticSegmentation, ClusterFormerForUniversalSegmentation]


def nano_model(model_class=ClusterFormerForUniversalSegmentation, **kwargs):
    torch.manual_seed(0)
    return model_class(ClusterFormerConfig(**{**NANO, "initializer_range": 0.2, **kwargs})).eval()


def images(*size, seed=0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def segments(*counts, size=(64, 64)) -> dict[str, list[torch.Tensor]]:
    """Rectangles as masks, so many for each image."""
    masks, classes = [], []
    for count in counts:
        image_masks = torch.zeros(count, *size)
        for i in range(count):
            image_masks[i, 7 * i : 7 * i + 20, 5 * i : 5 * i + 30] = 1
        masks.append(image_masks)
        classes.append(torch.arange(count) % NANO["num_labels"])
    return {"mask_labels": masks, "class_labels": classes}


def label_maps(batch_size=2, size=(64, 64)) -> torch.Tensor:
    labels = torch.zeros(batch_size, *size, dtype=torch.int64)
    labels[:, :20, :30] = 3
    labels[:, 40:, 10:] = 1
    labels[:, -4:] = 255
    return labels


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_documented_shapes_and_switches():
    model, pixel_values = nano_model(), images(2, 3, 64, 96)
    with torch.no_grad():
        plain = model(pixel_values)
        asked = model(pixel_values, output_cluster_assignments=True)
        trained = model(pixel_values, **segments(2, 1, size=(64, 96)))
    assert set(plain) == {"class_queries_logits", "masks_queries_logits"}
    assert plain.class_queries_logits.shape == (2, 6, 6)
    assert plain.masks_queries_logits.shape == (2, 6, 16, 24)
    assert [tuple(level.shape) for level in asked.decoder_cluster_assignments[0]] == [
        (2, 4, 6, 8, 12),
        (2, 4, 6, 4, 6),
        (2, 4, 6, 2, 3),
    ]
    assert [set(auxiliary) for auxiliary in trained.auxiliary_logits] == [set(plain)] * 2
    semantic = nano_model(ClusterFormerForSemanticSegmentation)
    with torch.no_grad():
        outputs = semantic(pixel_values)
    assert set(outputs) == {"logits"} and outputs.logits.shape == (2, 5, 16, 24)


def test_semantic_logits_are_the_log_of_the_weighted_masks():
    universal, semantic = nano_model(), nano_model(ClusterFormerForSemanticSegmentation)
    semantic.load_state_dict(universal.state_dict())
    with torch.no_grad():
        outputs, logits = universal(images(2, 3, 64, 64)), semantic(images(2, 3, 64, 64)).logits
    classes = outputs.class_queries_logits.softmax(-1)[..., :-1]
    expected = torch.einsum("bkc,bkhw->bchw", classes, outputs.masks_queries_logits.sigmoid()).log()
    torch.testing.assert_close(logits, expected)


def test_one_model_reads_semantic_and_panoptic_alike():
    model = nano_model(initializer_range=0.5)
    processor = Mask2FormerImageProcessor()
    with torch.no_grad():
        outputs = model(images(1, 3, 64, 64))
    # A class of its own for each mask, all but certain: then the segment that wins a pixel has the class that wins it.
    num_masks = outputs.class_queries_logits.shape[1]
    classes = torch.full_like(outputs.class_queries_logits, -20.0)
    classes[:, range(num_masks), range(num_masks)] = 20.0
    outputs.class_queries_logits = classes
    sizes = [(64, 64)]
    semantic = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0]
    panoptic = processor.post_process_panoptic_segmentation(
        outputs, threshold=0.0, mask_threshold=0.0, overlap_mask_area_threshold=0.0, target_sizes=sizes
    )[0]
    classes_of_segments = {segment["id"]: segment["label_id"] for segment in panoptic["segments_info"]}
    assert len(classes_of_segments) > 0
    agree = torch.tensor(
        [
            classes_of_segments[int(segment)] == int(label)
            for segment, label in zip(panoptic["segmentation"].flatten(), semantic.flatten())
            if int(segment) in classes_of_segments
        ]
    )
    assert agree.float().mean() > 0.99


def test_post_processing_by_the_library():
    semantic, universal = nano_model(ClusterFormerForSemanticSegmentation), nano_model()
    picture = torch.randint(256, (3, 50, 80), dtype=torch.uint8)
    processor = SegformerImageProcessor(size={"height": 64, "width": 64})
    with torch.no_grad():
        outputs = semantic(**processor(picture, return_tensors="pt"))
    (label_map,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(50, 80)])
    assert label_map.shape == (50, 80) and ((label_map >= 0) & (label_map < 5)).all()
    processor = Mask2FormerImageProcessor(size={"height": 64, "width": 96})
    with torch.no_grad():
        outputs = universal(**processor(picture, return_tensors="pt"))
    (result,) = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=[(50, 80)])
    assert result["segmentation"].shape == (50, 80)


# ---- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 70), (33, 128), (61, 45)])
def test_padding_changes_nothing(size):
    model = nano_model(initializer_range=0.1)
    semantic = nano_model(ClusterFormerForSemanticSegmentation, initializer_range=0.1)
    pixel_values, mask = images(2, 3, 96, 128), torch.zeros(2, 96, 128)
    mask[0], mask[1, : size[0], : size[1]] = 1, 1
    pixel_values[1, :, size[0] :], pixel_values[1, :, :, size[1] :] = float("nan"), float("nan")
    own = pixel_values[1:, :, : size[0], : size[1]]
    height, width = -(-size[0] // 4), -(-size[1] // 4)
    with torch.no_grad():
        alone, padded = model(own), model(pixel_values, mask)
        logits, padded_logits = semantic(own).logits[0], semantic(pixel_values, mask).logits[1]
    real = padded.class_queries_logits[1, :, -1] < 18  # a small image has fewer centres than the batch
    assert real.sum() == alone.class_queries_logits.shape[1]
    torch.testing.assert_close(
        padded.class_queries_logits[1][real], alone.class_queries_logits[0], rtol=1e-5, atol=1e-5
    )
    masks = padded.masks_queries_logits[1]
    torch.testing.assert_close(masks[real, :height, :width], alone.masks_queries_logits[0], rtol=1e-5, atol=1e-5)
    assert (masks[:, height:] < -18).all() and (masks[..., width:] < -18).all()
    torch.testing.assert_close(padded_logits[:, :height, :width], logits, rtol=1e-5, atol=1e-5)


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_mask2former():
    model, labels = nano_model().train(), segments(3, 1)
    settings = {name: getattr(model.config, name) for name in ("num_labels", "train_num_points", "no_object_weight")}
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    theirs = Mask2FormerLoss(Mask2FormerConfig(**settings), weights)
    torch.manual_seed(1)
    outputs = model(images(2, 3, 64, 64), **labels)
    torch.manual_seed(1)
    expected = theirs(
        outputs.masks_queries_logits,
        outputs.class_queries_logits,
        **labels,
        auxiliary_predictions=outputs.auxiliary_logits,
    )
    assert set(outputs.loss_dict) == set(expected)
    for name, value in outputs.loss_dict.items():
        torch.testing.assert_close(value, expected[name])
    total = sum(weight * value for key, value in expected.items() for name, weight in weights.items() if name in key)
    torch.testing.assert_close(outputs.loss, total)


def test_labels_in_one_argument_are_the_same():
    model, labels = nano_model(), segments(2, 0)
    as_list = [{"masks": masks, "class_labels": classes} for masks, classes in zip(*labels.values())]
    with torch.no_grad():
        torch.testing.assert_close(
            model(images(2, 3, 64, 64), labels=as_list).loss, model(images(2, 3, 64, 64), **labels).loss
        )


def test_smaller_masks_are_padded_like_their_images():
    model, labels = nano_model(), segments(2, size=(64, 64))
    own = {**labels, "mask_labels": [labels["mask_labels"][0][:, :50, :40]]}
    labels["mask_labels"][0][:, 50:], labels["mask_labels"][0][:, :, 40:] = 0, 0
    with torch.no_grad():
        torch.testing.assert_close(model(images(1, 3, 64, 64), **own).loss, model(images(1, 3, 64, 64), **labels).loss)


@pytest.mark.parametrize("counts", [(2, 0), (0, 0), (30, 1)])
def test_any_number_of_segments_trains_every_parameter(counts):
    model = nano_model().train()
    loss = model(images(2, 3, 64, 64), **segments(*counts)).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_label_maps_without_any_class_train():
    model = nano_model(ClusterFormerForSemanticSegmentation).train()
    labels = label_maps()
    labels[1] = 255
    outputs = model(images(2, 3, 64, 64), labels=labels)
    nothing = model(images(2, 3, 64, 64), labels=torch.full_like(labels, 255))
    (outputs.loss + nothing.loss).backward()
    assert torch.isfinite(outputs.loss) and nothing.loss_dict["loss_mask"] == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_evaluation_losses_repeat_and_leave_the_random_numbers_alone():
    model = nano_model(ClusterFormerForSemanticSegmentation)
    before = torch.random.get_rng_state()
    losses = [model(images(2, 3, 64, 64), labels=label_maps()).loss for _ in range(2)]
    assert torch.equal(*losses)
    assert torch.equal(before, torch.random.get_rng_state())
    model.train()
    assert not torch.equal(*[model(images(2, 3, 64, 64), labels=label_maps()).loss for _ in range(2)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_class", MODELS)
def test_autocast_is_finite(model_class, dtype):
    labels = {"labels": label_maps()} if model_class is MODELS[0] else segments(2, 0)
    with torch.autocast("cpu", dtype):
        outputs = nano_model(model_class)(images(2, 3, 64, 64), **labels)
    assert torch.isfinite(outputs.loss)


def test_training_on_one_picture_finds_its_segments():
    model = nano_model(ClusterFormerForSemanticSegmentation, initializer_range=0.06).train()
    pixel_values, labels = torch.full((1, 3, 64, 64), -1.0), torch.zeros(1, 64, 64, dtype=torch.int64)
    pixel_values[:, 0, 8:32, 8:28], labels[:, 8:32, 8:28] = 1.0, 2
    pixel_values[:, 1, 36:56, 32:60], labels[:, 36:56, 32:60] = 1.0, 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = model(pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    with torch.no_grad():
        predicted = model.eval()(pixel_values).logits.argmax(dim=1)
    assert (predicted == labels[:, 2::4, 2::4]).float().mean() > 0.95


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.full((2, 64, 64), 5), r"labels\[0\]` has the classes \[5\]"),
        (torch.full((2, 64, 64), -1), r"classes \[-1\]"),
        (torch.zeros(2, 64, 64), "must be integers"),
        (torch.zeros(2, 1, 64, 64, dtype=torch.int64), r"got torch.int64 of shape \(2, 1, 64, 64\)"),
        (torch.zeros(1, 64, 64, dtype=torch.int64), "each of the 2 images"),
        (list(torch.zeros(2, 64, 64, dtype=torch.int64)), "must be a tensor, got list"),
    ],
)
def test_wrong_label_maps_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        nano_model(ClusterFormerForSemanticSegmentation)(images(2, 3, 64, 64), labels=labels)


def test_masks_of_layers_are_read_only_for_their_losses():
    model, calls = nano_model(auxiliary_loss=False), []
    model.mask_head.register_forward_hook(lambda *args: calls.append(1))
    outputs = model(images(1, 3, 64, 64), **segments(2))
    assert calls == [1] and outputs.auxiliary_logits is None
    assert set(outputs.loss_dict) == {"loss_cross_entropy", "loss_mask", "loss_dice"}


def test_trainer_evaluates_the_loss(tmp_path):
    """Trainer's own, of labels in one argument and, if told so, of Mask2Former's two."""
    model, names = nano_model(), ["mask_labels", "class_labels"]
    given = segments(2, 1)
    labels = [dict(zip(("masks", "class_labels"), pair)) for pair in zip(*given.values())]
    losses = []
    for batch, label_names in ({"labels": labels}, None), (given, names):
        args = TrainingArguments(
            tmp_path, use_cpu=True, report_to="none", label_names=label_names, prediction_loss_only=True
        )
        trainer = Trainer(model, args, data_collator=lambda rows: {"pixel_values": images(2, 3, 64, 64)} | rows[0])
        losses.append(trainer.evaluate([batch])["eval_loss"])
    assert losses[0] > 0 and losses[1] > 0


def test_wrong_segments_are_named():
    model, pixel_values = nano_model(), images(1, 3, 64, 64)
    with pytest.raises(ValueError, match="given together"):
        model(pixel_values, mask_labels=[torch.zeros(0, 64, 64)])
    with pytest.raises(ValueError, match="larger than its pixels"):
        model(pixel_values, **segments(1, size=(80, 64)))
    with pytest.raises(ValueError, match=r"in \[0, 5\)"):
        model(pixel_values, mask_labels=[torch.zeros(1, 64, 64)], class_labels=[torch.tensor([5])])
    with pytest.raises(ValueError, match=r"shape \(2, height, width\)"):
        model(pixel_values, mask_labels=[torch.zeros(1, 64, 64)], class_labels=[torch.tensor([1, 2])])
    with pytest.raises(ValueError, match="masks of image 0 must be 1 inside.*hold 0 to 255"):
        masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
        masks[:, :9] = 255
        model(pixel_values, mask_labels=[masks], class_labels=[torch.tensor([1])])
    with pytest.raises(ValueError, match="`masks` of image 0 must be a tensor, got ndarray"):
        model(pixel_values, mask_labels=[torch.zeros(1, 64, 64).numpy()], class_labels=[torch.tensor([1])])
    with pytest.raises(ValueError, match=r"labels\[0\]` lacks masks"):
        model(pixel_values, labels=[{"class_labels": torch.tensor([1])}])
    with pytest.raises(ValueError, match="list with one dict"):
        model(pixel_values, labels=torch.zeros(1, 64, 64))


# ---- saving, checkpointing, compiling --------------------------------------------------------------------------------


def test_a_detector_gives_backbone_pyramid_and_decoder(tmp_path):
    torch.manual_seed(1)
    detector = ClusterFormerForObjectDetection(ClusterFormerConfig(**NANO))
    detector.save_pretrained(tmp_path)
    model, report = ClusterFormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    theirs = detector.state_dict()
    shared = [name for name in model.state_dict() if name in theirs]
    assert all(torch.equal(model.state_dict()[name], theirs[name]) for name in shared)
    new = set(report["missing_keys"])
    assert all(name.startswith(("decoder.pixel_embeddings.", "class_head.", "mask_head.")) for name in new)


@pytest.mark.parametrize("model_class", MODELS)
def test_save_and_load_is_bit_exact(model_class, tmp_path):
    model = nano_model(model_class)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        outputs = model(images(1, 3, 64, 64))
        again = model_class.from_pretrained(tmp_path).eval()(images(1, 3, 64, 64))
    for name, tensor in outputs.items():
        assert torch.equal(tensor, again[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = nano_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(2)
        model(images(2, 3, 64, 64), **segments(2, 1)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-3, atol=1e-5 + 1e-4 * gradient.abs().max().item()
        )


def test_compiled_without_a_break_and_exported():
    model, pixel_values = nano_model(decoder_layers=1, decoder_num_iterations=1), images(1, 3, 64, 64)
    with torch.no_grad():
        # Without code generation, which takes a minute and which the detector's test does for the same decoder.
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(pixel_values)
        outputs = model(pixel_values)  # after it: a first call must not be needed
        exported = torch.export.export(model, (), {"pixel_values": pixel_values}, strict=False).module()
        again = exported(pixel_values=pixel_values)
    for name, tensor in outputs.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=0, atol=1e-4)
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-5)
