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
"""The model card of a training run: what was trained on what, and what was measured."""

import yaml
from transformers.modelcard import TrainingSummary, make_markdown_table


CARD = """---
{metadata}---

# {name}

{description}

## Results

On the evaluation set, at the end of this run:

{results}

## Use

```python
from transformers import pipeline

predictor = pipeline("{task}", model="{name}", trust_remote_code=True)
predictor("picture.jpg")
```

## Limits

{limits}

## Data

{data}

## Training

{hyperparameters}

{progress}
"""


def render_model_card(summary: TrainingSummary, description: str, limits: str, data: str) -> str:
    """
    Text of a model card with its metadata.

    Args:
        summary: What Trainer knows of the run: the last evaluation, the hyperparameters, the course of the training.
        description, limits, data: Paragraphs on the model, on what it must not be used for, and on its pictures.
    """
    metadata = summary.create_metadata() | {"pipeline_tag": summary.tasks}
    results = [{"Metric": name, "Value": value} for name, value in (summary.eval_results or {}).items()]
    return CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=summary.model_name,
        description=description,
        results=make_markdown_table(results) or "The run was not evaluated.",
        task=summary.tasks,
        limits=limits,
        data=data,
        hyperparameters="\n".join(f"- {name}: {value}" for name, value in summary.hyperparameters.items()),
        progress=make_markdown_table(summary.eval_lines),
    )
