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
"""scripts/export_onnx.py: every kind of model, run with onnxruntime beside PyTorch."""

import re

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from skimage import data
from torch.utils import _pytree as pytree
from transformers import ConvNextImageProcessor, DeformableDetrImageProcessor, ViTConfig, ViTModel

from clusterformer_hf import (
    ClusterFormerBackbone,
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    ClusterFormerForSemanticSegmentation,
    ClusterFormerForUniversalSegmentation,
)
from clusterformer_hf.data.digit_scenes import write_digit_scenes
from scripts import export_onnx
from scripts.export_onnx import main


NANO = {
    "image_size": 64,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
    "center_grid": [2, 2, 2, 2],
    "num_iterations": 1,
    "decoder_num_iterations": 1,
    "decoder_hidden_size": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "num_labels": 10,
    "initializer_range": 0.3,
}


def save(model_class, folder, processor=None, **fields):
    torch.manual_seed(0)
    model = model_class(ClusterFormerConfig(**NANO | fields)).eval()
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return model


def outputs_of(path, pixel_values: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": pixel_values.numpy()})


@torch.no_grad()
def assert_same(model, path, pixel_values: torch.Tensor, atol: float = 1e-4):
    expected = pytree.tree_leaves(model(pixel_values=pixel_values))
    for one, other in zip(expected, map(torch.from_numpy, outputs_of(path, pixel_values)), strict=True):
        if isinstance(model, ClusterFormerForSemanticSegmentation):
            one, other = one.exp(), other.exp()  # onnxruntime's sigmoid ends at 1e-8
            assert one.max() > 0.1
        np.testing.assert_allclose(other, one, atol=atol, rtol=1e-3)


@pytest.mark.parametrize(
    "model_class, outputs",
    [
        (ClusterFormerBackbone, ["feature_maps.0", "feature_maps.1"]),
        pytest.param(ClusterFormerForSemanticSegmentation, ["logits"], marks=pytest.mark.slow),
        pytest.param(
            ClusterFormerForUniversalSegmentation,
            ["class_queries_logits", "masks_queries_logits"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_fixed_sizes(model_class, outputs, tmp_path, capsys):
    """The sides may differ; names are the model's, and the script's own check and times are printed."""
    model = save(model_class, tmp_path / "model", out_features=["stage2", "stage4"])
    main([f"--model={tmp_path / 'model'}", f"--output_dir={tmp_path / 'out'}", "--width=96", "--rounds=2"])
    printed, path = capsys.readouterr().out, tmp_path / "out" / "model.onnx"
    differences = re.findall(r"largest difference to PyTorch on ([a-z ]+): (\S+)", printed)
    assert [kind for kind, _ in differences] == ["random numbers", "photographs"]
    assert all(float(difference) < 1e-3 for _, difference in differences)
    assert re.search(r"speed at 1 x 3 x 64 x 96, \d+ threads: PyTorch \S+ ms \(1.00x\), ONNX \S+ ms", printed)
    assert_same(model, path, torch.randn(1, 3, 64, 96))
    names = [output.name for output in onnxruntime.InferenceSession(path).get_outputs()]
    assert [re.sub(r"[^a-z0-9]+", ".", name.replace("_", " ")) for name in names] == [
        re.sub(r"[^a-z0-9]+", ".", name.replace("_", " ")) for name in outputs
    ]
    assert (tmp_path / "out" / "config.json").exists()
    assert path.stat().st_size < 4.5 * model.num_parameters() + 600_000  # 0.4 MB are the nodes
    assert b"modeling_clusterformer" not in path.read_bytes()  # no paths of the machine


def test_classifier_of_any_batch_in_8_bit(tmp_path, capsys):
    """Batches of other sizes give PyTorch's numbers, 8 bit nearly; top-1 is counted on labelled pictures."""
    processor = ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=1.0)
    model = save(ClusterFormerForImageClassification, tmp_path / "model", processor, num_labels=2)
    pictures = {"cat": data.chelsea(), "coffee": data.coffee()}
    for name, pixels in pictures.items():
        (tmp_path / "pictures" / "val" / name).mkdir(parents=True)
        Image.fromarray(pixels).resize((80, 60)).save(tmp_path / "pictures" / "val" / name / "1.png")
    flags = [f"--model={tmp_path / 'model'}", f"--output_dir={tmp_path / 'out'}", "--dynamic", "batch"]
    main([*flags, "--int8", f"--dataset_name={tmp_path / 'pictures'}", "--rounds=2"])
    printed = capsys.readouterr().out
    for batch_size in (1, 5):
        assert_same(model, tmp_path / "out" / "model.onnx", torch.randn(batch_size, 3, 64, 64))
    pixel_values = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values).logits.numpy()
    (found,) = outputs_of(tmp_path / "out" / "model_int8.onnx", pixel_values)
    error = np.abs(found - expected).max() / np.ptp(expected)
    assert 1e-6 < error < 0.5

    classes = list(pictures)
    inputs = [processor(Image.fromarray(p).resize((80, 60)), return_tensors="pt") for p in pictures.values()]
    with torch.no_grad():
        chosen = [int(model(**values).logits.argmax()) for values in inputs]
    accuracy = np.mean([chosen[number] == number for number in range(len(classes))])
    assert f"PyTorch {accuracy:.4f}, ONNX {accuracy:.4f}, ONNX int8 " in printed
    assert re.search(r"same class as PyTorch on photographs: \S+%", printed)
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("batch_sizes, batch", [((1,), 1), pytest.param((1, 3), "'.*'", marks=pytest.mark.slow)])
def test_detector_and_its_average_precision(batch_sizes, batch, tmp_path, capsys, monkeypatch):
    processor = DeformableDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})
    model = save(ClusterFormerForObjectDetection, tmp_path / "model", processor)
    scenes = write_digit_scenes(tmp_path / "scenes", num_train=1, num_test=3, size=64)
    flags = [f"--model={tmp_path / 'model'}", f"--output_dir={tmp_path / 'out'}", "--rounds=1"]
    if len(batch_sizes) > 1:
        flags.append("--dynamic=batch")
    detections, average_precision = [], export_onnx.average_precision

    def keep(truth, results):
        detections.append(results)
        return average_precision(truth, results)

    monkeypatch.setattr(export_onnx, "average_precision", keep)
    main([*flags, f"--dataset_name={scenes}", "--images", str(scenes / "test" / "000001.png")])
    found = re.search(r"AP on .*: PyTorch (\S+), ONNX (\S+)", capsys.readouterr().out)
    assert 0 <= float(found[1]) <= 1 and float(found[2]) == pytest.approx(float(found[1]), abs=1e-3)
    # The model is not trained, so its AP alone says little.
    expected, found = ([[row["image_id"], row["score"], *row["bbox"]] for row in rows] for rows in detections)
    assert len(expected) > 10
    np.testing.assert_allclose(sorted(found), sorted(expected), atol=1e-2, rtol=1e-3)
    for batch_size in batch_sizes:
        assert_same(model, tmp_path / "out" / "model.onnx", torch.randn(batch_size, 3, 64, 64))
    graph = export_onnx.OnnxModel(tmp_path / "out" / "model.onnx", None)
    with pytest.raises(ValueError, match=rf"of the shape \[{batch}, 3, 64, 64\], got \[1, 3, 64, 96\]\. Export"):
        graph(torch.randn(1, 3, 64, 96))


def test_a_graph_that_differs_is_refused():
    def wrong(pixel_values):
        return 1.01 * pixel_values

    def right(pixel_values):
        return pixel_values

    assert export_onnx.check(right, right, {"ones": torch.ones(2)}, 1e-3) == 0
    with pytest.raises(
        ValueError, match="Output 0 of the graph differs from PyTorch by 0.01 of its largest .* on ones"
    ):
        export_onnx.check(right, wrong, {"ones": torch.ones(2)}, 1e-3)
    with pytest.raises(ValueError, match="differs from PyTorch by nan"):
        export_onnx.check(right, right, {"nan": torch.full((2,), torch.nan)}, 1e-3)


def test_bad_input(tmp_path):
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        tmp_path / "vit"
    )
    out = f"--output_dir={tmp_path / 'out'}"
    with pytest.raises(ValueError, match="holds ViTModel, and no ClusterFormer"):
        main([f"--model={tmp_path / 'vit'}", out])
    with pytest.raises(ValueError, match="--dynamic takes batch and size, got width"):
        main([f"--model={tmp_path / 'vit'}", out, "--dynamic", "width"])
    model = save(ClusterFormerForImageClassification, tmp_path / "model")
    save(ClusterFormerBackbone, tmp_path / "backbone")
    with pytest.raises(ValueError, match="is for classifiers and detectors, and .*backbone is ClusterFormerBackbone"):
        main([f"--model={tmp_path / 'backbone'}", out, "--dataset_name=pictures"])
    with pytest.raises(ValueError, match="takes picture by picture, and the graph would take 4"):
        main([f"--model={tmp_path / 'model'}", out, "--dataset_name=pictures", "--batch_size=4"])
    state = model.state_dict()
    del state["classifier.weight"]
    model.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(ValueError, match="lacks weights of ClusterFormerForImageClassification: classifier.weight"):
        main([f"--model={tmp_path / 'model'}", out])
    assert not (tmp_path / "out").exists()
