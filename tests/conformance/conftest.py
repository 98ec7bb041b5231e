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
"""Makes transformers' own common tests importable and lets them *see* out-of-tree classes.

Nothing here makes a test pass that would fail in-tree; the name-table entries below make MORE tests run
(without them several common tests silently `continue` over classes whose names transformers does not know)."""

import json
import os
import pathlib
import sys
import tempfile


HERE = pathlib.Path(__file__).resolve().parent
OVERLAY = pathlib.Path(os.environ.get("CONFORMANCE_OVERLAY", HERE / "overlay"))
for k, v in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_TEST_DEVICE": os.environ.get("TRANSFORMERS_TEST_DEVICE", "cpu"),
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
}.items():
    os.environ.setdefault(k, v)
for p in (str(OVERLAY / "utils"), str(OVERLAY), str(HERE)):
    if p not in sys.path:
        sys.path.insert(0, p)

import torch


torch.set_num_threads(int(os.environ.get("CONFORMANCE_THREADS", "1")))

import specs  # noqa: E402


SPEC = specs.load()


def _register_names():
    """Class-name tables that the common tests read (at run time only the checks of pipelines do)."""
    from transformers.models.auto import modeling_auto as ma

    for table, model_type, class_name in SPEC.name_tables():
        mapping = getattr(ma, table)
        old = mapping.get(model_type)
        if old is None:
            mapping[model_type] = class_name
        else:
            mapping[model_type] = tuple(dict.fromkeys((old if isinstance(old, tuple) else (old,)) + (class_name,)))


def _build_tiny_models():
    """Make what PipelineTesterMixin loads: `$TRANSFORMERS_TINY_MODEL_PATH/<model_type>/<ClassName>` and a summary."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="conformance_tiny_"))
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(root)
    (root / "reports").mkdir()
    summary = {}
    for kind in SPEC.kinds.values():
        if not kind.pipelines:
            continue
        cls, config = kind.model_class, kind.config()
        out = root / config.model_type / cls.__name__
        torch.manual_seed(0)
        cls(config).save_pretrained(out)
        proc = SPEC.pipeline_image_processor(kind)
        proc.save_pretrained(out)
        summary[cls.__name__] = {"tokenizer_classes": [], "processor_classes": [type(proc).__name__]}
    (root / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary))


if not os.environ.get("CONFORMANCE_NO_NAMES"):  # set it only to see what the tables change
    _register_names()
_build_tiny_models()

import tests.test_pipeline_mixin as tpm  # noqa: E402


for name, cls in SPEC.image_processor_names().items():
    setattr(tpm.transformers_module, name, cls)


def pytest_configure(config):
    for m in (
        "torch_export_test",
        "torch_compile_test",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "all_flash_attn_test",
        "generate",
        "is_pipeline_test",
        "is_training_test",
        "onnx_export_test",
        "executorch_export_test",
        "bitsandbytes",
    ):
        config.addinivalue_line("markers", f"{m}: transformers common-test marker")


# ---- per-class pass/fail/skip table -------------------------------------------------------------------------------
_COUNTS, _SKIP_REASONS = {}, {}


def pytest_runtest_logreport(report):
    if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
        return
    parts = report.nodeid.split("::")
    cls = parts[1] if len(parts) > 2 else parts[0]
    c = _COUNTS.setdefault(cls, {"passed": 0, "failed": 0, "skipped": 0})
    c[report.outcome] = c.get(report.outcome, 0) + 1
    if report.outcome == "skipped":
        r = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _SKIP_REASONS.setdefault(cls, {}).setdefault(r[:150], []).append(parts[-1])


def pytest_terminal_summary(terminalreporter):
    tr = terminalreporter
    tr.section("conformance counts per class")
    for cls, c in sorted(_COUNTS.items()):
        tr.write_line(f"{cls:45s} passed {c['passed']:4d}  failed {c['failed']:3d}  skipped {c['skipped']:4d}")
    out = os.environ.get("CONFORMANCE_SKIPS_JSON")
    if out:
        pathlib.Path(out).write_text(json.dumps(_SKIP_REASONS, indent=1))
