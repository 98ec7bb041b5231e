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
Are the clusters meaningful? Compares a model's clusters with the true segments of pictures, beside baselines.

    python scripts/evaluate_clusters.py --model outputs/demo_detection/model \
        --dataset_name outputs/demo_detection/scenes_3000_300 [--released_model DIR] [--output_file clusters.json]

The folder is in COCO's format with masks, such as digit scenes; its validation or test split is used. Each pixel of a
picture takes its strongest cluster, and the partition is compared with the true segments (see `cluster_quality`), for
each stage, for the decoder's last layer, where there is one, on the finest map that it clusters, and for the masks of a
universal segmentation model: they are its assignments in high resolution, and a pixel takes the centre whose mask and
class together are the most probable, as in panoptic segmentation. Of a detector also `boxes`, what the boxes that were
found were read from: Otsu's threshold of how much the pixels inside a box count for it tells those that are its own,
and a pixel takes the box that it counts for most, as a share of what the box's strongest pixel counts:

- `ours`: the model's clusters, mean of the heads' scores; every head clusters for itself.
- `ours, best head`: for each measure the head that is best on one half of the pictures, scored on the other half.
- `k-means`: of the same features, those that the stage's last block clusters or that the masks are read from, all
  channels, into as many clusters.
- `SLIC`: superpixels of the picture (scikit-image), as many as the stage has clusters.
- `released`, and its best head: the authors' released algorithm, from --released_model, which holds any model with a
  released ClusterFormer in it, or else with random weights in the sizes of --model.

`used` is the mean number of clusters that have pixels.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from skimage.filters import threshold_otsu
from skimage.segmentation import slic
from sklearn.cluster import KMeans
from torchvision.ops import box_convert
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, HfArgumentParser

import clusterformer_hf
from clusterformer_hf import (
    ClusterFormerBackbone,
    ClusterFormerConfig,
    ClusterFormerForObjectDetection,
    ClusterFormerForUniversalSegmentation,
    ClusterFormerModel,
    ClusterFormerPreTrainedModel,
)
from clusterformer_hf.data.coco import find_coco_splits
from clusterformer_hf.data.coco_masks import InstanceData, read_coco_masks
from clusterformer_hf.decoder_clusterformer import SURPLUS_LOGIT
from clusterformer_hf.metrics.cluster_quality import MEASURES, cluster_quality
from clusterformer_hf.modeling_clusterformer import (
    ClusterFormerEncoder,
    ClusterFormerObjectDetectionOutput,
    ClusterFormerUniversalSegmentationOutput,
)
from clusterformer_hf.visualization import box_assignment, stretch


# Of `boxes`: the score from which one is found, and by how much maps are enlarged, to about the picture's size.
FOUND, ENLARGEMENT = 0.3, 4
TINY = np.finfo(np.float64).tiny


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder of a ClusterFormer of any task, saved with its image processor."})
    dataset_name: Path = field(metadata={"help": "Folder in COCO's format, with masks."})
    released_model: str | None = field(
        default=None, metadata={"help": "Folder of a model with a released ClusterFormer; random weights without it."}
    )
    max_samples: int = field(default=100, metadata={"help": "So many pictures, from the first on, at least two."})
    seed: int = field(default=0, metadata={"help": "Of k-means and of random weights."})
    output_file: Path | None = field(default=None, metadata={"help": "JSON file to write the numbers to."})

    def __post_init__(self):
        if self.max_samples < 2:
            raise ValueError(f"--max_samples must be at least 2, to choose heads and to score, got {self.max_samples}.")


class StageReader:
    """
    Runs a model and returns for each stage its clusters and the features that they were made of.

    Args:
        model: Any ClusterFormer whose outputs have cluster assignments.
        image_processor: The one it was trained with.
    """

    def __init__(self, model: ClusterFormerPreTrainedModel, image_processor: BaseImageProcessor):
        self.model, self.image_processor, self.features = model.eval(), image_processor, {}
        encoder = next(module for module in model.modules() if isinstance(module, ClusterFormerEncoder))
        self.stages = list(map(str, range(1, len(encoder.stages) + 1)))
        for name, stage in zip(self.stages, encoder.stages):
            stage.layers[-1].norm1.register_forward_hook(partial(self._keep_output, name))
        if hasattr(model, "decoder"):
            self.stages.append("decoder")
            model.decoder.pixel_projections.register_forward_pre_hook(self._keep_pixels)
        if isinstance(model, ClusterFormerForObjectDetection):
            self.stages.append("boxes")
        if isinstance(model, ClusterFormerForUniversalSegmentation):
            self.stages.append("masks")
            model.decoder.pixel_embeddings.register_forward_hook(self._keep_embeddings)

    def _keep_output(self, name: str, module, args, output: torch.Tensor):
        """The map (height, width, channels) that a block clusters; the released forms have their channels first."""
        is_channels_last = self.model.config.clustering == "recurrent"
        self.features[name] = output[0] if is_channels_last else output[0].permute(1, 2, 0)

    def _keep_pixels(self, module, args):
        """The pixels of all levels (1, N, channels), of which the finest level's come first."""
        features, _, geometry = args
        (height, width), *_ = geometry.map_sizes
        self.features["decoder"] = features[0, : height * width].unflatten(0, (height, width))

    def _keep_embeddings(self, module, args, output: torch.Tensor):
        """The map (height, width, channels) that masks are read from."""
        self.features["masks"] = output[0].permute(1, 2, 0)

    @torch.no_grad()
    def __call__(self, picture) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
        """
        Returns for each stage the labels of its map (heads, height, width), int64; what its last block or the
        decoder clusters, or masks are read from (height, width, channels), of `boxes` those of the decoder; and its
        number of clusters, K.
        """
        inputs = self.image_processor(images=picture, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs}
        outputs = self.model(**inputs, output_cluster_assignments=True)
        maps = [*outputs.cluster_assignments]
        if "decoder" in self.stages:
            maps.append(outputs.decoder_cluster_assignments[-1][0])  # the finest level
        if "masks" in self.stages:
            maps.append(mask_probabilities(outputs)[:, None])  # as of one head
        found = {}
        names = [name for name in self.stages if name != "boxes"]
        for name, assignments in zip(names, maps, strict=True):
            real = assignments[0, 0].sum(dim=0) > 0
            height, width = int(real.any(dim=1).sum()), int(real.any(dim=0).sum())
            labels = assignments[0, :, :, :height, :width].argmax(dim=1)
            features = self.features[name][:height, :width]
            found[name] = labels.numpy(), features.numpy(), assignments.shape[2]
        if "boxes" in self.stages:
            found["boxes"] = box_labels(outputs), *found["decoder"][1:]
        return found


def box_labels(outputs: ClusterFormerObjectDetectionOutput) -> np.ndarray:
    """The box that each pixel is of, (1, height, width), in [0, K), and K for pixels of none."""
    scores = outputs.logits[0].sigmoid().amax(dim=-1).numpy()
    found = np.flatnonzero(scores > FOUND)
    shares = [own_pixels(box_assignment(outputs, 0, query), outputs.pred_boxes[0, query]) for query in found]
    nothing = np.full(np.multiply(box_assignment(outputs, 0, 0).shape, ENLARGEMENT), TINY)
    return np.append(found, len(scores))[np.stack([*shares, nothing]).argmax(axis=0)][None]


def own_pixels(assignment: np.ndarray, box: torch.Tensor) -> np.ndarray:
    """
    How much the pixels (height, width), enlarged, count for a box (4,) of cx, cy, w, h in [0, 1], as shares of what the
    strongest counts: of those inside it that are beyond Otsu's threshold, and else 0.
    """
    enlarged = F.interpolate(torch.from_numpy(assignment)[None, None], scale_factor=ENLARGEMENT, mode="bilinear")
    enlarged = enlarged[0, 0].numpy()
    height, width = enlarged.shape
    corners = box_convert(box, "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
    left, top, right, bottom = corners.round().int().clamp_min(0).tolist()
    shares, inside = np.zeros_like(enlarged), enlarged[top:bottom, left:right]
    if inside.size > 0:
        shares[top:bottom, left:right] = inside * (inside > threshold_otsu(inside)) / max(enlarged.max(), TINY)
    return shares


def mask_probabilities(outputs: ClusterFormerUniversalSegmentationOutput) -> torch.Tensor:
    """(batch, K, height, width), of a centre's mask and its class together; 0 at padded pixels."""
    classes = outputs.class_queries_logits.softmax(dim=-1)[..., :-1].amax(dim=-1)
    is_real = (outputs.masks_queries_logits > SURPLUS_LOGIT).any(dim=1, keepdim=True)
    return classes[..., None, None] * outputs.masks_queries_logits.sigmoid() * is_real


def load_model(folder: str) -> ClusterFormerPreTrainedModel:
    """
    A saved ClusterFormer of any task, or the encoder of one that is the backbone of a model of transformers.

    Raises:
        `ValueError`: if there is no ClusterFormer in it, or if it lacks weights.
    """
    config = AutoConfig.from_pretrained(folder)
    names = config.architectures or ["no model"]
    model_class = getattr(clusterformer_hf, names[0], None) or getattr(transformers, names[0], None)
    loaded = None
    if model_class is not None:
        loaded, report = model_class.from_pretrained(folder, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"{folder} lacks weights of {names[0]}: {', '.join(sorted(report['missing_keys']))}.")
    if isinstance(loaded, ClusterFormerPreTrainedModel) and not isinstance(loaded, ClusterFormerBackbone):
        return loaded
    modules = [] if loaded is None else loaded.modules()
    backbone = next((module for module in modules if isinstance(module, ClusterFormerBackbone)), None)
    if backbone is None:
        raise ValueError(f"{folder} holds {', '.join(names)}, and no ClusterFormer is in it.")
    model = ClusterFormerModel(backbone.config, add_pooling_layer=False)
    model.embeddings, model.encoder = backbone.embeddings, backbone.encoder
    return model


def random_released(config: ClusterFormerConfig, seed: int) -> ClusterFormerModel:
    """A released ClusterFormer of these sizes with random weights."""
    names = ("num_channels", "patch_size", "depths", "hidden_sizes", "num_attention_heads", "center_grid")
    torch.manual_seed(seed)
    sizes = {name: getattr(config, name) for name in names}
    return ClusterFormerModel(ClusterFormerConfig(**sizes, clustering="release"), add_pooling_layer=False)


def true_segments(data: InstanceData, row: int) -> tuple:
    """A picture and its segments (height, width): 0 for background, 1 and up for objects, -1 for crowds."""
    picture, masks, _, crowds = data.open(row)
    segments = np.zeros((picture.height, picture.width), np.int64)
    # The smaller lies on top where masks overlap, or it might vanish.
    for number in np.argsort(-masks.sum(axis=(1, 2)), kind="stable").tolist():
        segments[masks[number]] = -1 if crowds[number] else number + 1
    return picture, segments


def kmeans_labels(features: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    pixels = features.reshape(-1, features.shape[-1])
    kmeans = KMeans(min(num_clusters, len(pixels)), n_init=1, random_state=seed).fit(pixels)
    return kmeans.labels_.reshape(features.shape[:2])


def score(labels: np.ndarray, segments: np.ndarray) -> list[float]:
    """The measures of a map of any size, stretched over the picture, and the number of clusters in it."""
    quality = cluster_quality(stretch(labels, segments.shape), segments)
    return [*(quality[measure] for measure in MEASURES), len(np.unique(labels))]


def score_pictures(data: InstanceData, ours: StageReader, released: StageReader, seed: int) -> dict[str, dict]:
    """For each stage the scores of each kind of partition, (pictures, heads, measures and clusters in use)."""
    scores = {name: defaultdict(list) for name in ours.stages}
    for row in range(len(data)):
        picture, segments = true_segments(data, row)
        for name, (labels, features, num_clusters) in ours(picture).items():
            superpixels = slic(np.asarray(picture), n_segments=num_clusters, start_label=0)
            scores[name]["ours"].append([score(head, segments) for head in labels])
            scores[name]["k-means"].append([score(kmeans_labels(features, num_clusters, seed), segments)])
            scores[name]["SLIC"].append([score(superpixels, segments)])
        for name, (labels, *_) in released(picture).items():
            scores[name]["released"].append([score(head, segments) for head in labels])
    return {name: {kind: np.array(values) for kind, values in kinds.items()} for name, kinds in scores.items()}


def summarise(scores: np.ndarray) -> tuple[dict, dict]:
    """
    Means over pictures of (pictures, heads, measures and clusters in use): the mean of the heads, and of each measure
    the best head, chosen on every other picture and scored on the rest, and the other way round.
    """
    mean = np.nanmean(scores, axis=(0, 1))
    best = []
    for measure in range(scores.shape[2]):
        halves = np.stack([np.nanmean(scores[start::2, :, measure], axis=0) for start in (0, 1)])
        best.append(np.mean([halves[1, halves[0].argmax()], halves[0, halves[1].argmax()]]))
    names = [*MEASURES, "used"]
    return dict(zip(names, mean.tolist())), dict(zip(names, map(float, best)))


def collect(scores: dict[str, dict]) -> list[dict]:
    """A row for each stage and kind of partition."""
    rows = []
    for name, kinds in scores.items():
        for kind, values in kinds.items():
            mean, best = summarise(values)
            rows.append({"stage": name, "clusters": kind, **mean})
            if kind in ("ours", "released"):
                rows.append({"stage": name, "clusters": f"{kind}, best head", **best, "used": mean["used"]})
    return rows


def print_table(rows: list[dict]):
    titles = ["ARI", "purity", "overlap", "used"]
    print(f"\n{'stage':7}  {'clusters':19}" + "".join(f"{title:>9}" for title in titles))
    for row in rows:
        numbers = "".join(f"{row[measure]:9.3f}" for measure in MEASURES)
        print(f"{row['stage']:7}  {row['clusters']:19}{numbers}{row['used']:9.1f}")


def print_best(rows: list[dict]):
    """Of each measure the best stage of each kind of partition, the best kind first."""
    print("\nIn the best stage:")
    for measure in MEASURES:
        best = {}
        for row in rows:
            if row[measure] > best.get(row["clusters"], (-1,))[0]:
                best[row["clusters"]] = row[measure], row["stage"]
        ranked = sorted(best.items(), key=lambda item: -item[1][0])
        print(f"  {measure}: " + "; ".join(f"{kind} {value:.3f} (stage {n})" for kind, (value, n) in ranked))


def main(args: list[str] | None = None):
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(args)
    splits = find_coco_splits(args.dataset_name)
    images_dir, annotations = splits.get("validation") or splits["train"]
    data, _ = read_coco_masks(images_dir, annotations)
    if len(data) < 2:
        raise ValueError(f"{annotations} names {len(data)} pictures; at least 2 are needed.")
    data = data.select(range(min(args.max_samples, len(data))))
    image_processor = AutoImageProcessor.from_pretrained(args.model)
    ours = StageReader(load_model(args.model), image_processor)
    if args.released_model is None:
        released = StageReader(random_released(ours.model.config, args.seed), image_processor)
        origin = "with random weights"
    else:
        released_processor = AutoImageProcessor.from_pretrained(args.released_model)
        released = StageReader(load_model(args.released_model), released_processor)
        origin = f"from {args.released_model}"
    print(f"{len(data)} pictures of {annotations}\nours: {args.model}\nreleased: {origin}")

    rows = collect(score_pictures(data, ours, released, args.seed))
    print_table(rows)
    print_best(rows)
    if args.output_file is not None:
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        setting = {"model": args.model, "released": origin, "annotations": str(annotations), "pictures": len(data)}
        args.output_file.write_text(json.dumps({**setting, "rows": rows}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
