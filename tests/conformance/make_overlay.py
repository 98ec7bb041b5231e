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
"""Build an importable `tests` package around the common test mixins of a transformers sdist.

The sdist ships tests/test_*_common.py but not the helper modules they import
(tests/exporters, tests/generation, tests/utils, tests/pipelines, utils/fetch_hub_objects_for_ci.py) nor fixtures.
We symlink the sdist's files (unchanged) next to our own small replacements for what is missing.
The sdist itself is never written to.
"""

import argparse
import json
import pathlib
import shutil
import sys


HERE = pathlib.Path(__file__).resolve().parent


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument(
        "--sdist", required=True, help="the unpacked transformers source distribution of the installed version"
    )
    ap.add_argument("--out", default=str(HERE / "overlay"))
    a = ap.parse_args()
    sdist, out = pathlib.Path(a.sdist).resolve(), pathlib.Path(a.out)
    if out.exists():
        shutil.rmtree(out)
    (out / "tests").mkdir(parents=True)
    for f in sorted((sdist / "tests").glob("*.py")):
        (out / "tests" / f.name).symlink_to(f)
    (out / "tests" / "__init__.py").write_text("")
    # our stand-ins for the missing helper packages
    for src in (HERE / "stubs").rglob("*.py"):
        dst = out / src.relative_to(HERE / "stubs")
        dst.parent.mkdir(parents=True, exist_ok=True)
        dst.symlink_to(src)
        if dst.parent.name not in ("utils",) or dst.parent.parent.name == "tests":
            init = dst.parent / "__init__.py"
            if not init.exists() and dst.parent != out / "utils":
                init.write_text("")
    # older mixins (5.17) import every tests/pipelines/* module eagerly: empty classes for the tasks we do not drive
    import re

    for mod, names in re.findall(
        r"^from \.pipelines\.(\w+) import (\w+)", (sdist / "tests" / "test_pipeline_mixin.py").read_text(), re.M
    ):
        f = out / "tests" / "pipelines" / f"{mod}.py"
        if not f.exists():
            f.write_text(
                f"import unittest\n\n\nclass {names}(unittest.TestCase):\n    def runTest(self):\n        pass\n"
            )
    # PipelineTesterMixin reads a tiny-model summary: start from an empty one (conftest writes the real one)
    (out / "tests" / "utils").mkdir(exist_ok=True)
    (out / "tests" / "utils" / "tiny_model_summary.json").write_text(json.dumps({}))
    # direct_transformers_import(<overlay>/src/transformers): point at the INSTALLED transformers
    import importlib.util

    spec = importlib.util.find_spec("transformers")
    (out / "src").mkdir(exist_ok=True)
    (out / "src" / "transformers").symlink_to(pathlib.Path(spec.origin).parent)
    # synthetic COCO fixtures
    sys.path.insert(0, str(HERE))
    import fixtures_gen

    fixtures_gen.write(out / "tests" / "fixtures" / "tests_samples" / "COCO")
    print("overlay at", out)


if __name__ == "__main__":
    main()
