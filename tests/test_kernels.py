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
"""
The kernels of the clustering against the plain path: on a GPU where there is one, else in Triton's interpreter, which
runs the same program on the CPU.
"""

import pytest
import torch

from clusterformer_hf import (
    ClusterFormerConfig,
    ClusterFormerForImageClassification,
    ClusterFormerForObjectDetection,
    clustering_clusterformer,
    decoder_clusterformer,
    kernels_clusterformer,
)
from clusterformer_hf.cluster_iterations import trace_clusters
from clusterformer_hf.clustering_clusterformer import ClusterFormerRecurrentClustering, stage_geometry
from clusterformer_hf.kernels_clusterformer import Launch, can_cluster, cluster
from tests.nano import BACKBONE, CLASSIFIER, DECODER


pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["one program a head", "split pixels"])
def use_kernels(request, monkeypatch):
    """A function that has kernels at every clustering from then on, in one of two ways; it returns a list of calls."""

    def use() -> list:
        calls = []

        def counted(*args):
            calls.append(args)
            return cluster(*args)

        monkeypatch.setattr(clustering_clusterformer, "can_cluster", lambda keys, num_centers: True)
        for module in (clustering_clusterformer, decoder_clusterformer):
            monkeypatch.setattr(module, "cluster", counted)
        if request.param == "split pixels":
            monkeypatch.setattr(kernels_clusterformer, "MAX_TILES", 1)
            monkeypatch.setattr(kernels_clusterformer, "num_processors", lambda device: 3)
        return calls

    return use


def gradients_of(output, weights, tensors):
    return torch.autograd.grad(sum((out * weight).sum() for out, weight in zip(output, weights)), tensors)


def clustering_inputs(spatial: bool, padded: bool):
    sizes = {"hidden_sizes": [32] * 4, "num_attention_heads": [2] * 4}
    config = ClusterFormerConfig(**CLASSIFIER | sizes, spatial_clustering=spatial)
    clustering = ClusterFormerRecurrentClustering(config, 0).to(DEVICE)
    for parameter in clustering.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    features = torch.randn(2, 9, 10, 32, device=DEVICE, requires_grad=True)
    sizes = torch.tensor([[9, 10], [5, 7]], device=DEVICE) if padded else None
    return clustering, features, stage_geometry((9, 10), (3, 4), 1, sizes, features.detach())


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("spatial", [True, False], ids=["spatial", "features only"])
def test_kernels_of_the_encoder_are_the_plain_path(spatial, padded, use_kernels):
    clustering, features, geometry = clustering_inputs(spatial, padded)
    expected = clustering.cluster(features, geometry)
    weights = [torch.randn_like(output) for output in expected]
    if padded:  # surplus centres are left out by all who read centres
        weights = [weight * (geometry.center_mask.view(2, 1, 12, 1) == 0) for weight in weights[:1]]
        expected = (expected[0] * (geometry.center_mask.view(2, 1, 12, 1) == 0),)
    used = {name for name, _ in clustering.named_parameters()} - {"projection.weight"}
    used -= set() if spatial else {"spatial_weight"}
    tensors = [features, *(parameter for name, parameter in clustering.named_parameters() if name in used)]
    expected_gradients = gradients_of(expected, weights, tensors)

    calls = use_kernels()
    outputs = clustering.cluster(features, geometry)
    assert len(calls) == 1
    if padded:
        outputs = (outputs[0] * (geometry.center_mask.view(2, 1, 12, 1) == 0),)
    torch.testing.assert_close(tuple(outputs), tuple(expected), rtol=1e-4, atol=1e-5)
    for gradient, reference in zip(gradients_of(outputs, weights, tensors), expected_gradients):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())


@pytest.mark.parametrize(
    ("iterations", "weight"), [(1, 0), (3, 0), (3, -18)], ids=["1", "3", "3, masses at their least"]
)
def test_kernels_of_a_detector_are_the_plain_path(iterations, weight, use_kernels):
    """
    Encoder and decoder of padded pictures, with weights of pixels and parts of clusters. The last iteration of a
    decoder layer is none of the kernels'.
    """
    changes = {"decoder_layers": 2, "decoder_num_iterations": iterations}
    config = ClusterFormerConfig(**BACKBONE | DECODER | changes, num_labels=3)
    model = ClusterFormerForObjectDetection(config).to(DEVICE).eval()
    torch.nn.init.constant_(model.decoder.pixel_projections.pixel_weight.bias, weight)
    pixel_values = torch.randn(2, 3, 40, 48, device=DEVICE)
    pixel_mask = torch.ones(2, 40, 48, dtype=torch.long, device=DEVICE)
    pixel_mask[1, 32:], pixel_mask[1, :, 40:] = 0, 0

    def run():
        model.zero_grad()
        outputs = model(pixel_values, pixel_mask=pixel_mask, output_cluster_assignments=True)
        (outputs.logits.sigmoid().sum() + (outputs.pred_boxes * boxes_weight).sum()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assignments = [level for layer in outputs.decoder_cluster_assignments for level in layer]
        return outputs.logits, outputs.pred_boxes, assignments, gradients

    boxes_weight = torch.rand(4, device=DEVICE)
    expected = run()
    calls = use_kernels()
    outputs = run()
    of_encoder, of_decoder = calls[: sum(config.depths)], calls[sum(config.depths) :]
    assert [arguments[-1] for arguments in of_encoder] == [config.num_iterations] * sum(config.depths)
    assert [arguments[-1] for arguments in of_decoder] == [iterations - 1] * (config.decoder_layers * (iterations > 1))
    torch.testing.assert_close(outputs[:3], expected[:3], rtol=1e-4, atol=1e-5)
    assert outputs[3].keys() == expected[3].keys()
    largest = max(reference.abs().max() for reference in expected[3].values()).item()
    for name, reference in expected[3].items():
        torch.testing.assert_close(outputs[3][name], reference, rtol=1e-3, atol=1e-5 * largest, msg=name)


def kernel_arguments(dtype, requires_grad=False):
    """Of 2 pictures, 2 heads, 70 pixels, 9 centres and 24 channels a head, which is no power of 2."""
    keys_values = torch.randn(2, 70, 2, 2, 24, device=DEVICE).to(dtype)
    place, pixels = torch.rand(2, 2, 4, 9, device=DEVICE) * 0.3 + 0.02, torch.rand(1, 4, 70, device=DEVICE) * 0.5
    tensors = [
        *keys_values.unbind(2),
        torch.randn(2, 2, 9, 24, device=DEVICE, dtype=dtype),
        place,
        torch.randn(24, 24, device=DEVICE, dtype=dtype) * 0.2,
        torch.randn(24, device=DEVICE, dtype=dtype),
        torch.randn(2, 1, 1, device=DEVICE, dtype=dtype),
        torch.randn(2, 1, 1, device=DEVICE, dtype=dtype),
    ]
    weights = torch.rand(2, 2, 70, device=DEVICE)
    if requires_grad:
        tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        weights.requires_grad_()
    return (*tensors, pixels, weights, None, 2)


def as_float32(arguments):
    tensors = (a.detach().float() if isinstance(a, torch.Tensor) else a for a in arguments)
    return tuple(t.requires_grad_() if isinstance(t, torch.Tensor) and i != 8 else t for i, t in enumerate(tensors))


# The interpreter multiplies the bits of bfloat16.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16])
def test_half_precision_is_close_and_keeps_its_dtypes(dtype):
    arguments = kernel_arguments(dtype, requires_grad=True)
    exact = as_float32(arguments)
    outputs, expected = cluster(*arguments)[:3], cluster(*exact)[:3]
    weights = [torch.randn_like(output) for output in expected]
    assert {output.dtype for output in outputs} == {torch.float32}
    # A few times what docs/performance.md has, which was measured.
    error, of_gradients = (2e-3, 1e-2) if dtype == torch.float16 else (2e-2, 5e-2)
    torch.testing.assert_close(outputs, expected, rtol=error, atol=error)
    inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    gradients = gradients_of(outputs, weights, inputs)
    references = gradients_of(expected, weights, [a for a in exact if isinstance(a, torch.Tensor) and a.requires_grad])
    for tensor, gradient, reference in zip(inputs, gradients, references):
        assert gradient.dtype == tensor.dtype
        # Of the query projection's bias it is a small sum of large numbers.
        tolerance = 0.1 if dtype == torch.bfloat16 and tensor is arguments[5] else of_gradients
        assert (gradient.float() - reference).norm() <= tolerance * reference.norm()


def test_large_scaled_gradients_stay_finite_in_float16():
    """As those of a loss that is scaled by 65536."""
    arguments = kernel_arguments(torch.float16, requires_grad=True)
    centers = cluster(*arguments)[0]
    gradients = torch.autograd.grad(centers.sum() * 100, arguments[2:8])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_operator_is_registered_as_pytorch_wants():
    """Schema, shapes without data, and gradients under compilation."""
    torch.library.opcheck(cluster, kernel_arguments(torch.float32, requires_grad=True))


def test_a_compiled_model_calls_the_kernels(use_kernels):
    calls = use_kernels()
    model = ClusterFormerForImageClassification(ClusterFormerConfig(**CLASSIFIER, num_labels=3)).to(DEVICE).eval()
    pixel_values = torch.randn(2, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        expected = model(pixel_values).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(pixel_values).logits
    assert calls
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "device", "num_centers", "channels"),
    [
        (torch.float32, "cpu", 9, 32),
        (torch.float64, DEVICE, 9, 32),
        (torch.float32, DEVICE, 129, 32),
        (torch.float32, DEVICE, 9, 65),
    ],
)
def test_the_plain_path_takes_what_the_kernels_do_not(dtype, device, num_centers, channels):
    assert not can_cluster(torch.empty(1, 4, 2, 1, channels, dtype=dtype, device=device), num_centers)


def test_movement_of_the_centres_is_the_same(use_kernels):
    model = ClusterFormerForImageClassification(ClusterFormerConfig(**CLASSIFIER, num_labels=3)).to(DEVICE).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32, device=DEVICE)}
    _, expected = trace_clusters(model, inputs)
    calls = use_kernels()
    _, stages = trace_clusters(model, inputs)
    assert calls
    for stage, reference in zip(stages, expected, strict=True):
        torch.testing.assert_close(stage.assignments, reference.assignments, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stage.places, reference.places, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_projections_that_are_not_plain_weights_are_called(use_kernels):
    """As with adapters, quantisation and offloading: the plain path calls the module."""

    class Adapter(torch.nn.Module):
        def __init__(self, query):
            super().__init__()
            self.query, self.weight, self.bias = query, query.weight, query.bias

        def forward(self, centers):
            return self.query(centers) * 2

    clustering, features, geometry = clustering_inputs(spatial=True, padded=False)
    clustering.query = Adapter(clustering.query)
    expected = clustering.cluster(features, geometry)
    calls = use_kernels()
    torch.testing.assert_close(clustering.cluster(features, geometry), expected, rtol=0, atol=0)
    assert not calls


def test_training_follows_inference_on_the_same_size():
    """What is kept of an unpadded map is no tensor of inference mode."""
    model = ClusterFormerForImageClassification(ClusterFormerConfig(**CLASSIFIER, num_labels=3)).to(DEVICE)
    pixel_values = torch.randn(2, 3, 36, 44, device=DEVICE)
    with torch.inference_mode():
        expected = model.eval()(pixel_values).logits.clone()
    logits = model(pixel_values).logits
    logits.sum().backward()
    assert torch.equal(logits, expected)


def test_weights_that_kernels_would_misread_are_refused():
    keys, values = torch.randn(2, 1, 6, 2, 16, device=DEVICE).unbind()
    centers, pixels = torch.randn(1, 2, 4, 16, device=DEVICE), torch.rand(1, 4, 6, device=DEVICE)
    weights = torch.rand(1, 2, 12, device=DEVICE)
    Launch(keys, values, centers, pixels, weights[..., :6])
    with pytest.raises(ValueError, match="`pixel_weights` of one head must be contiguous"):
        Launch(keys, values, centers, pixels, weights[..., ::2])
