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
"""scripts/run_image_classification.py with a pause behind each step, so that small runs outlast what befalls them."""

import os
import time

from transformers import TrainerCallback

from clusterformer_hf import training
from clusterformer_hf.training import run_script
from scripts import run_image_classification


class Pause(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(float(os.environ["STEP_SECONDS"]))


class SlowTrainer(training.ClusterFormerTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Pause())


run_image_classification.ClusterFormerTrainer = SlowTrainer
run_script(run_image_classification.main)
