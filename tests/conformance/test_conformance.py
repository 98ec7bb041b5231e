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
"""Runs transformers' OWN common test mixins against out-of-tree classes. What to test is in specs.py."""

import copy
import inspect
import sys
import unittest

import specs
import tests.test_image_processing_common as _ipc
import torch
from tests.test_backbone_common import BackboneTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin
from transformers.testing_utils import torch_device


SPEC = specs.load()


def make_labels(kind, batch_size):
    s, n, L = kind.image_size, kind.n_targets, kind.num_labels
    if kind.labels == "classification":
        return {"labels": torch.zeros(batch_size, dtype=torch.long, device=torch_device)}
    if kind.labels == "semantic":
        return {"labels": torch.zeros(batch_size, s, s, dtype=torch.long, device=torch_device)}
    if kind.labels == "detection":
        return {
            "labels": [
                {
                    "class_labels": torch.ones(n, dtype=torch.long, device=torch_device),
                    "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.4, 0.2, 0.3]][:n], device=torch_device),
                }
                for _ in range(batch_size)
            ]
        }
    if kind.labels == "universal":
        g = torch.Generator().manual_seed(0)
        return {
            "mask_labels": [
                (torch.rand(n, s, s, generator=g) > 0.5).float().to(torch_device) for _ in range(batch_size)
            ],
            "class_labels": [torch.arange(n, device=torch_device) % L for _ in range(batch_size)],
        }
    return {}


class ModelTester:
    def __init__(self, parent, kind):
        self.parent, self.kind = parent, kind
        self.batch_size, self.image_size, self.num_channels = kind.batch_size, kind.image_size, 3
        self.num_labels, self.is_training = kind.num_labels, kind.labels is not None

    def get_config(self):
        return self.kind.config()

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(shape)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class _Common(ModelTesterMixin, PipelineTesterMixin):
    test_resize_embeddings = False
    kind = None

    def setUp(self):
        self.model_tester = ModelTester(self, self.kind)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs_dict = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels:
            inputs_dict.update(make_labels(self.kind, self.model_tester.batch_size))
        return inputs_dict

    # --- overridden by every in-tree vision model whose hidden states are not (batch, seq, hidden) -------------------
    def test_hidden_states_output(self):
        def check(config, inputs):
            model = self.kind.model_class(copy.deepcopy(config)).to(torch_device).eval()
            with torch.no_grad():
                out = model(**inputs)
            hs = getattr(out, self.kind.hidden_attr)
            self.assertIsInstance(hs, (tuple, list))
            if self.kind.hidden_len is not None:
                self.assertEqual(len(hs), self.kind.hidden_len)
            if self.kind.hidden1_shape is not None:
                self.assertEqual(tuple(hs[1].shape[1:]), tuple(self.kind.hidden1_shape))

        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        check(config, {**inputs, "output_hidden_states": True})
        config.output_hidden_states = True
        self._set_subconfig_attributes(config, "output_hidden_states", True)
        check(config, inputs)

    def test_attention_outputs(self):
        if not self.has_attentions:
            self.skipTest("Model does not output attentions")
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.kind.model_class._from_config(config, attn_implementation="eager").to(torch_device).eval()
        with torch.no_grad():
            out = model(**inputs, output_attentions=True)
        self.assertGreater(len(getattr(out, self.kind.attn_attr)), 0)
        config._attn_implementation = "eager"
        config.output_attentions = True
        model = self.kind.model_class(config).to(torch_device).eval()
        with torch.no_grad():
            out = model(**inputs)
        self.assertGreater(len(getattr(out, self.kind.attn_attr)), 0)

    def test_retain_grad_hidden_states_attentions(self):
        # hidden_states[0] of a conv-like model is pixel_values (no grad): in-tree models skip; we take a later one
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.output_hidden_states = True
        self._set_subconfig_attributes(config, "output_hidden_states", True)
        model = self.kind.model_class._from_config(config, attn_implementation="eager").to(torch_device)
        out = model(**self._prepare_for_class(inputs, self.kind.model_class, return_labels=True))
        h = getattr(out, self.kind.retain_attr)[self.kind.retain_index]
        h.retain_grad()
        first = out[0]
        first = first[0] if isinstance(first, (tuple, list)) else first
        (first if first.dim() == 0 else first.float().sum()).backward()
        self.assertIsNotNone(h.grad)

    def test_forward_signature(self):
        arg_names = [*inspect.signature(self.kind.model_class.forward).parameters]
        self.assertEqual(arg_names[1], "pixel_values")

    def test_init_does_not_depend_on_container_modules(self):
        """Not upstream. For classes outside `transformers.` (`is_custom_code()`), `_initialize_weights` never calls
        `_init_weights` on a module that has no parameter/buffer of its own (all() over nothing is True), so an init
        in an `isinstance(module, SomeContainer)` branch silently never runs. Compare with the in-tree behaviour."""
        from unittest.mock import patch

        from tests.test_modeling_common import seeded_weight_init
        from transformers import PreTrainedModel

        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        with seeded_weight_init():
            a = self.kind.model_class(copy.deepcopy(config)).state_dict()
            with patch.object(PreTrainedModel, "is_custom_code", classmethod(lambda cls: False)):
                b = self.kind.model_class(copy.deepcopy(config)).state_dict()
        bad = [k for k in a if not torch.equal(a[k], b[k])]
        self.assertEqual(bad, [], "these weights get another init out of tree (container branch in _init_weights)")

    def test_labels_give_finite_scalar_loss(self):  # not upstream: makes sure the label path is really exercised
        if self.kind.labels is None:
            self.skipTest("no head")
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.kind.model_class(config).to(torch_device).train()
        loss = model(**self._prepare_for_class(inputs, self.kind.model_class, return_labels=True)).loss
        self.assertEqual(loss.numel(), 1)
        self.assertTrue(torch.isfinite(loss).all())
        loss.backward()


def _skipped(reason):
    @unittest.skip(reason)
    def f(self):
        pass

    return f


def _make(kind):
    body = {
        "kind": kind,
        "has_attentions": kind.has_attentions,
        "all_model_classes": (kind.model_class,),
        "pipeline_model_mapping": dict.fromkeys(kind.pipelines, kind.model_class),
        **kind.flags,
    }
    names = [n for n in dir(_Common) if n.startswith("test_")]
    for pattern, reason in kind.skips.items():
        hits = [n for n in names if n == pattern or (pattern.endswith("*") and n.startswith(pattern[:-1]))]
        assert hits, f"skip list names an unknown test: {pattern}"
        body.update({n: _skipped(reason) for n in hits})
    name = "".join(p.capitalize() for p in kind.name.split("_")) + "Test"
    body["__module__"] = __name__
    return name, type(name, (_Common, unittest.TestCase), body)


for _kind in SPEC.kinds.values():
    _name, _cls = _make(_kind)
    globals()[_name] = _cls
del _cls


# ---- BackboneTesterMixin ---------------------------------------------------------------------------------------------
class BackboneMixinTest(BackboneTesterMixin, unittest.TestCase):
    kind = SPEC.kinds[SPEC.backbone_kind]
    all_model_classes = (kind.model_class,)
    has_attentions = kind.has_attentions
    config_class = type(kind.config())

    def setUp(self):
        self.model_tester = ModelTester(self, self.kind)


# ---- ConfigTester ----------------------------------------------------------------------------------------------------
class ConfigTest(unittest.TestCase):
    model_tester = None


for _n, (_cname, _kw, _props) in SPEC.config_tests.items():

    def _run(self, _cname=_cname, _kw=_kw, _props=_props):
        ConfigTester(
            self,
            config_class=getattr(SPEC.pkg, _cname),
            has_text_modality=False,
            common_properties=list(_props),
            **copy.deepcopy(_kw),
        ).run_common_tests()

    setattr(ConfigTest, f"test_config_{_n}", _run)


# ---- ImageProcessingTestMixin ----------------------------------------------------------------------------------------
if SPEC.image_processors and hasattr(
    _ipc, "ImageProcessingTester"
):  # the mixin's protocol of 5.23 (5.17's is different, not driven here)

    class ProcTester(_ipc.ImageProcessingTester):
        def __init__(self, parent, **kwargs):
            for k, v in SPEC.image_processor_kwargs.items():
                kwargs.setdefault(k, copy.deepcopy(v))
            if "__init__" in vars(_ipc.ImageProcessingTester):
                super().__init__(parent, **kwargs)
            else:  # 5.17: attributes and the helpers below were per-model code
                self.parent, self.batch_size, self.num_channels = parent, 7, 3
                self.min_resolution, self.max_resolution = 30, 400
                for k, v in kwargs.items():
                    setattr(self, k, v)
                self.image_processing_classes = self._get_image_processing_classes()

        def _get_image_processing_classes(self):  # upstream derives them from the test file's folder name
            return {b: getattr(SPEC.pkg, n) for b, n in SPEC.image_processors.items()}

        if "__init__" not in vars(_ipc.ImageProcessingTester):  # 5.17

            def prepare_image_processor_dict(self):
                keys = set().union(*(c.valid_kwargs.__annotations__ for c in self.image_processing_classes.values()))
                return {k: v for k, v in self.__dict__.items() if k in keys}

            def expected_output_image_shape(self, images):
                if "shortest_edge" not in self.size:
                    return self.num_channels, self.size["height"], self.size["width"]
                from PIL import Image
                from transformers.image_transforms import get_size_with_aspect_ratio

                hw = []
                for im in images:
                    w, h = (
                        im.size
                        if isinstance(im, Image.Image)
                        else (im.shape[1], im.shape[0])
                        if im.__class__.__module__ == "numpy"
                        else (im.shape[2], im.shape[1])
                    )
                    hw.append(
                        get_size_with_aspect_ratio((h, w), self.size["shortest_edge"], self.size.get("longest_edge"))
                    )
                return self.num_channels, max(x[0] for x in hw), max(x[1] for x in hw)

        def prepare_post_process_semantic_segmentation_inputs(self):
            b, L = self.batch_size, self.num_labels
            if SPEC.semantic_postprocess == "detr_panoptic":
                from transformers.models.detr.modeling_detr import DetrSegmentationOutput

                out = DetrSegmentationOutput(logits=torch.randn(b, 6, L + 1), pred_masks=torch.randn(b, 6, 12, 14))
                return {"outputs": out}, {"num_labels": L, "height": 12, "width": 14}
            if SPEC.semantic_postprocess == "universal":
                from transformers.models.mask2former.modeling_mask2former import (
                    Mask2FormerForUniversalSegmentationOutput,
                )

                out = Mask2FormerForUniversalSegmentationOutput(
                    class_queries_logits=torch.randn(b, 6, L + 1), masks_queries_logits=torch.randn(b, 6, 96, 96)
                )
                return {"outputs": out}, {"num_labels": L, "height": 384, "width": 384}
            from transformers.modeling_outputs import SemanticSegmenterOutput

            return (
                {"outputs": SemanticSegmenterOutput(logits=torch.randn(b, L, 12, 14))},
                {"num_labels": L, "height": 12, "width": 14},
            )

    class ImageProcessorTest(
        _ipc.AnnotationFormatTestMixin,
        _ipc.PostProcessSemanticSegmentationTestMixin,
        _ipc.ImageProcessingTestMixin,
        unittest.TestCase,
    ):
        image_processor_tester_class = ProcTester

        def test_pil_can_run_without_torchvision(self):
            """Upstream runs a bare subprocess; an out-of-tree processor must be registered there first."""
            import os
            import subprocess
            from unittest.mock import patch

            real = subprocess.run

            def run(cmd, **kw):
                script = cmd[2].replace(
                    "import AutoImageProcessor", f"import AutoImageProcessor\nimport {SPEC.package}", 1
                )
                env = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
                return real([*cmd[:2], script, *cmd[3:]], env=env, **kw)

            if not hasattr(_ipc, "subprocess"):
                self.skipTest("not in this version's mixin")
            with patch.object(_ipc.subprocess, "run", run):
                super().test_pil_can_run_without_torchvision()

        if not hasattr(_ipc.ImageProcessingTestMixin, "image_processor_tester_class"):  # transformers 5.17's mixin
            image_processing_classes = None

            def setUp(self):
                self.image_processor_tester = ProcTester(self)
                self.image_processing_classes = self.image_processor_tester._get_image_processing_classes()

            @property
            def image_processor_dict(self):
                return self.image_processor_tester.prepare_image_processor_dict()

    for _t, _r in SPEC.skips_image_processing.items():
        assert hasattr(ImageProcessorTest, _t), _t
        setattr(ImageProcessorTest, _t, _skipped(_r))
