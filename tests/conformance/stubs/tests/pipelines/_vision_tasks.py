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
"""Own offline replacements for tests/pipelines/test_pipelines_*.py (not in the sdist): same two-method protocol that
PipelineTesterMixin drives (get_test_pipeline / run_pipeline_test), local synthetic images instead of Hub ones."""

import unittest

import fixtures_gen
from transformers import pipeline


class _Base(unittest.TestCase):
    task = None

    def runTest(self):  # lets PipelineTesterMixin instantiate us
        pass

    def get_test_pipeline(
        self, model, tokenizer=None, image_processor=None, feature_extractor=None, processor=None, dtype="float32"
    ):
        pipe = pipeline(
            self.task,
            model=model,
            tokenizer=tokenizer,
            image_processor=image_processor,
            feature_extractor=feature_extractor,
            processor=processor,
            dtype=dtype,
        )
        return pipe, [fixtures_gen.cats_image(), fixtures_gen.cats_image((320, 240))]


class ImageClassificationPipelineTests(_Base):
    task = "image-classification"

    def run_pipeline_test(self, pipe, examples):
        for out in pipe(examples, top_k=2):
            self.assertEqual(len(out), 2)
            for r in out:
                self.assertIsInstance(r["label"], str)
                self.assertIsInstance(r["score"], float)


class ImageFeatureExtractionPipelineTests(_Base):
    task = "image-feature-extraction"

    def run_pipeline_test(self, pipe, examples):
        out = pipe(examples)
        self.assertEqual(len(out), len(examples))
        self.assertIsInstance(out[0], list)
        if getattr(pipe.model.config, "pooler_output", True):
            t = pipe(examples[0], return_tensors=True)
            self.assertEqual(t.shape[0], 1)


class ObjectDetectionPipelineTests(_Base):
    task = "object-detection"

    def run_pipeline_test(self, pipe, examples):
        outs = pipe(examples, threshold=0.0)
        self.assertEqual(len(outs), len(examples))
        for out in outs:
            self.assertGreater(len(out), 0)
            for r in out:
                self.assertIsInstance(r["label"], str)
                self.assertIsInstance(r["score"], float)
                self.assertEqual(set(r["box"]), {"xmin", "ymin", "xmax", "ymax"})
                self.assertTrue(all(isinstance(v, int) for v in r["box"].values()))


class ImageSegmentationPipelineTests(_Base):
    task = "image-segmentation"

    def run_pipeline_test(self, pipe, examples):
        outs = pipe(examples, threshold=0.0, mask_threshold=0, overlap_mask_area_threshold=0)
        self.assertEqual(len(outs), len(examples))
        for im, out in zip(examples, outs):
            self.assertIsInstance(out, list)
            for r in out:
                self.assertIsInstance(r["label"], str)
                self.assertEqual(r["mask"].size, im.size)
        sem = pipe(examples[0], subtask="semantic")
        self.assertGreater(len(sem), 0)
