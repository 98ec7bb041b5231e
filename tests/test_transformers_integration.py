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
"""The classes behind transformers' own doors: Auto classes, other models' backbones, pipelines, remote code."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    DeformableDetrImageProcessor,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    SegformerImageProcessor,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTImageProcessor,
    pipeline,
)

import clusterformer_hf
from clusterformer_hf import ClusterFormerConfig, ClusterFormerForImageClassification


NANO = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
    "center_grid": [2, 2, 2, 2],
    "num_labels": 3,
}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
DECODER = {"decoder_hidden_size": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
SIZE = {"height": 64, "width": 64}
DENSE = {
    clusterformer_hf.ClusterFormerForObjectDetection: DeformableDetrImageProcessor,
    clusterformer_hf.ClusterFormerForSemanticSegmentation: SegformerImageProcessor,
    clusterformer_hf.ClusterFormerForUniversalSegmentation: Mask2FormerImageProcessor,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    ClusterFormerForImageClassification(ClusterFormerConfig(**NANO)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=DENSE, ids=lambda model_class: model_class.__name__)
def saved_dense(request, tmp_path_factory):
    """The class of a detection or segmentation model and the folder of one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    request.param(ClusterFormerConfig(**NANO, **DECODER, initializer_range=0.2)).save_pretrained(folder)
    DENSE[request.param](size=SIZE).save_pretrained(folder)
    return request.param, folder


def random_images(count):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)) for i in range(count)]


def test_auto_classes(saved):
    assert type(AutoConfig.from_pretrained(saved)) is ClusterFormerConfig
    assert type(AutoModelForImageClassification.from_pretrained(saved)) is ClusterFormerForImageClassification
    assert type(AutoModel.from_pretrained(saved)) is clusterformer_hf.ClusterFormerModel
    backbone = AutoBackbone.from_config(ClusterFormerConfig(**NANO, out_features=STAGES))
    assert type(backbone) is clusterformer_hf.ClusterFormerBackbone
    assert type(clusterformer_hf.ClusterFormerBackbone.from_pretrained(saved)) is type(backbone)


def upernet(backbone_config):
    config = UperNetConfig(backbone_config=backbone_config, hidden_size=16, auxiliary_in_channels=24, num_labels=3)
    return UperNetForSemanticSegmentation(config), {"labels": torch.ones(2, 64, 96, dtype=torch.long)}


def maskformer(backbone_config):
    config = MaskFormerConfig(backbone_config=backbone_config, fpn_feature_size=32, mask_feature_size=32, num_labels=3)
    masks = [torch.ones(1, 64, 96)] * 2
    labels = {"mask_labels": masks, "class_labels": [torch.tensor([1])] * 2}
    return MaskFormerForInstanceSegmentation(config), labels


def rt_detr(backbone_config):
    config = RTDetrConfig(
        backbone_config=backbone_config, encoder_in_channels=[16, 24, 32], encoder_hidden_dim=32, d_model=32,
        decoder_in_channels=[32, 32, 32], encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=5, decoder_layers=1, num_denoising=0, num_labels=3,
    )  # fmt: skip
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    return RTDetrForObjectDetection(config), {"labels": [label] * 2}


@pytest.mark.parametrize(
    "build, out_features",
    [(upernet, STAGES), (maskformer, STAGES), (rt_detr, STAGES[1:])],
    ids=["upernet", "maskformer", "rt_detr"],
)
def test_backbone_in_other_models(build, out_features):
    """Forward and backward of a library model on our backbone; gradients reach the stem."""
    torch.manual_seed(0)
    backbone_config = ClusterFormerConfig(**NANO, out_features=out_features)
    model, labels = build(backbone_config)
    loss = model(pixel_values=torch.randn(2, 3, 64, 96), **labels).loss
    loss.backward()
    assert loss.isfinite()
    stems = [parameter for name, parameter in model.named_parameters() if name.endswith("embeddings.projection.weight")]
    assert len(stems) == 1 and stems[0].grad.abs().sum() > 0


@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_classification_pipeline(saved, batch_size):
    classify = pipeline("image-classification", model=str(saved))
    pictures = random_images(7)
    expected = [classify(picture) for picture in pictures]
    batched = classify(pictures, batch_size=batch_size)
    for one, other in zip(expected, batched, strict=True):
        assert [row["label"] for row in one] == [row["label"] for row in other]
        assert [row["score"] for row in one] == pytest.approx([row["score"] for row in other], abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 6])  # more than there are stages: outputs are indexed by image
def test_feature_extraction_pipeline(saved, batch_size):
    extract = pipeline("image-feature-extraction", model=str(saved))
    features = extract(random_images(7), batch_size=batch_size, return_tensors=True)
    assert [tuple(feature.shape) for feature in features] == [(1, 32, 2, 2)] * 7


def test_auto_classes_of_dense_models(saved_dense):
    model_class, folder = saved_dense
    auto_classes = {
        "ClusterFormerForObjectDetection": [AutoModelForObjectDetection],
        "ClusterFormerForSemanticSegmentation": [AutoModelForSemanticSegmentation, AutoModelForImageSegmentation],
        "ClusterFormerForUniversalSegmentation": [
            AutoModelForUniversalSegmentation,
            AutoModelForInstanceSegmentation,
            AutoModelForImageSegmentation,
        ],
    }
    for auto_class in auto_classes[model_class.__name__]:
        assert type(auto_class.from_pretrained(folder)) is model_class


@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_dense_pipelines(saved_dense, batch_size):
    model_class, folder = saved_dense
    task = "object-detection" if "Detection" in model_class.__name__ else "image-segmentation"
    run = pipeline(task, model=str(folder))
    assert type(run.model) is model_class  # and not the semantic model, whose weights are the universal model's
    settings = {"threshold": 0.0}
    if model_class.__name__ == "ClusterFormerForUniversalSegmentation":
        settings |= {"mask_threshold": 0.0, "overlap_mask_area_threshold": 0.0}
    pictures = random_images(7)
    batched = run(pictures, batch_size=batch_size, **settings)
    assert len(batched) == 7
    for picture, results in zip(pictures, batched):
        alone = run(picture, **settings)
        assert [row["label"] for row in alone] == [row["label"] for row in results]
        for row in results:
            if task == "object-detection":
                assert set(row["box"]) == {"xmin", "ymin", "xmax", "ymax"}
            else:
                assert row["mask"].size == picture.size


@pytest.mark.parametrize("subtask", ["semantic", "instance", "panoptic"])
def test_segmentation_pipeline_reads_one_model_three_ways(tmp_path, subtask):
    torch.manual_seed(2)  # masks that do not hide each other
    config = ClusterFormerConfig(**NANO, **DECODER, initializer_range=0.3)
    model = clusterformer_hf.ClusterFormerForUniversalSegmentation(config)
    segment = pipeline("image-segmentation", model=model, image_processor=Mask2FormerImageProcessor(size=SIZE))
    (picture,) = random_images(1)
    rows = segment(picture, subtask=subtask, threshold=0.0, mask_threshold=0.0, overlap_mask_area_threshold=0.0)
    assert len(rows) > 0
    assert all(row["mask"].size == picture.size and row["label"] in model.config.label2id for row in rows)


def test_pipelines_know_the_models(saved, saved_dense):
    """transformers logs an error for a model whose name its tables lack."""
    model_class, folder = saved_dense
    code = (
        "import sys, clusterformer_hf; from transformers import pipeline; "
        "[pipeline(task, model=folder) for task, folder in zip(sys.argv[1::2], sys.argv[2::2])]"
    )
    task = "object-detection" if "Detection" in model_class.__name__ else "image-segmentation"
    command = [sys.executable, "-c", code, "image-classification", str(saved), task, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "not supported" not in result.stderr


REMOTE = """
import sys
sys.modules["clusterformer_hf"] = None  # cannot be imported
import json, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline
folder, out = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
pixel_values = torch.load(out + "/pixel_values.pt")
with torch.no_grad():
    logits = model(pixel_values).logits
classify = pipeline("image-classification", model=folder, trust_remote_code=True)
assert type(classify.model).__module__.startswith("transformers_modules")
data = [{"pixel_values": pixels, "labels": torch.tensor(0)} for pixels in pixel_values]
args = TrainingArguments(out + "/trainer", max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True)
Trainer(model, args, train_dataset=data).train()
model.save_pretrained(out + "/again")
again = AutoModelForImageClassification.from_pretrained(out + "/again", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(again(pixel_values).logits, model.eval()(pixel_values).logits)
torch.save(logits, out + "/logits.pt")
"""


REMOTE_DENSE = """
import sys
sys.modules["clusterformer_hf"] = None  # cannot be imported
import torch, transformers
auto_class, folder, out = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    outputs = model(torch.load(out + "/pixel_values.pt"))
torch.save(dict(outputs), out + "/outputs.pt")
model.save_pretrained(out + "/again")
"""


def test_saved_dense_models_load_without_the_package(saved_dense, tmp_path):
    model_class, folder = saved_dense
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.save(pixel_values, tmp_path / "pixel_values.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    auto_class = model_class.__name__.replace("ClusterFormer", "AutoModel")
    result = subprocess.run(
        [sys.executable, "-c", REMOTE_DENSE, auto_class, str(folder), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = model_class.from_pretrained(folder).eval()(pixel_values)
    outputs = torch.load(tmp_path / "outputs.pt")
    assert set(outputs) == set(expected)
    assert all(torch.equal(outputs[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "again" / "decoder_clusterformer.py").exists()


def test_saved_folder_loads_without_the_package(saved, tmp_path):
    """In a fresh process with an empty module cache: the same logits bit by bit, the pipeline, training, saving."""
    files = {path.name for path in saved.iterdir()}
    assert files >= {"configuration_clusterformer.py", "clustering_clusterformer.py", "modeling_clusterformer.py"}
    assert "AutoModelForImageClassification" in json.loads((saved / "config.json").read_text())["auto_map"]
    pixel_values = torch.randn(2, 3, 64, 64)
    torch.save(pixel_values, tmp_path / "pixel_values.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, str(saved), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    model = ClusterFormerForImageClassification.from_pretrained(saved).eval()
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, torch.load(tmp_path / "logits.pt"))
