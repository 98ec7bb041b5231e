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
"""Top-1 and top-5 accuracy."""

import torch
from transformers import EvalPrediction


class ClassificationAccuracy:
    """
    Top-1 and top-5 accuracy for [`Trainer`] with `batch_eval_metrics=True`. With five classes or fewer top-5 is 1.

    Called once a batch with logits of shape `(batch_size, num_labels)` and labels of shape `(batch_size,)`. Returns
    `{"accuracy", "top5_accuracy"}` in [0, 1] and starts anew when `compute_result` is true, else an empty dict.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self.top1 = self.top5 = self.total = 0

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        hits = best == labels[:, None]
        self.top1 += hits[:, 0].sum().item()
        self.top5 += hits.sum().item()
        self.total += len(labels)
        if not compute_result:
            return {}
        result = {"accuracy": self.top1 / self.total, "top5_accuracy": self.top5 / self.total}
        self.reset()
        return result
