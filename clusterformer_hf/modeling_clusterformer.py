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
"""PyTorch ClusterFormer model: "Clustering As A Universal Visual Learner" (arXiv 2309.13196)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs, maybe_install_capturing_hooks

from .clustering_clusterformer import (
    MIN_MASS,
    ClusterFormerRecurrentClustering,
    ClusterFormerReleasedClustering,
    StageGeometry,
    keeps_released_order,
    pixel_mask_from_sizes,
    runs_eagerly_on_cpu,
    split_heads,
    stage_geometry,
)
from .configuration_clusterformer import ClusterFormerConfig, as_pair
from .decoder_clusterformer import (
    SURPLUS_LOGIT,
    ClusterFormerBoxDelta,
    ClusterFormerClassHead,
    ClusterFormerDecoder,
    ClusterFormerMaskHead,
    ClusterFormerPartOffset,
    ClusterFormerPyramidClustering,
    DecoderOutput,
)
from .loss_clusterformer import (
    boxes_of_real_areas,
    check_detection_labels,
    check_mask_labels,
    check_segment_labels,
    detection_loss,
    masks_of_label_maps,
    segmentation_loss,
)


logger = logging.get_logger(__name__)

# Pixels that the feed-forward network takes at a time in inference on the CPU: their hidden features stay in the cache.
FEED_FORWARD_CHUNK = 1024
# Elements from which a weight no longer fits the cache beside a small map.
LARGE_WEIGHT = 2**20


@dataclass
class ClusterFormerEncoderOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, channels, height, width)`): Last stage's map.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): The stem's map, then each stage's.
        cluster_centers (`tuple[torch.FloatTensor]`, *optional*): See [`ClusterFormerModelOutput`].
        cluster_assignments (`tuple[torch.FloatTensor]`, *optional*): See [`ClusterFormerModelOutput`].
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cluster_centers: tuple[torch.FloatTensor, ...] | None = None
    cluster_assignments: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ClusterFormerModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, channels, height / 32, width / 32)`):
            The last stage's feature map.
        pooler_output (`torch.FloatTensor` of shape `(batch_size, channels)`):
            The centres of the last stage's normed map, averaged with their masses as weights, which is the mean of its
            pixels.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned when `output_hidden_states=True`):
            Five maps of shape `(batch_size, channels, height, width)`: the stem's, then each stage's.
        cluster_centers (`tuple[torch.FloatTensor]`):
            For each stage the centres, `(batch_size, K, channels)`: the stage's output averaged under the final
            assignments, each head its own channels. Centre number k covers a cell of the centre grid at first, row by
            row. Zero where a centre has no pixels. An attribute only, and no entry of the output as a dict or tuple,
            unless `output_cluster_assignments=True`: batched pipelines index every entry by image. What copies outputs
            entry by entry, as accelerate does in mixed precision, leaves an attribute out.
        cluster_assignments (`tuple[torch.FloatTensor]`, *optional*, returned when `output_cluster_assignments=True`):
            For each stage `(batch_size, heads, K, height, width)`: the share of every pixel in every cluster. Sums to
            1 over K at real pixels and is 0 at padded ones.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cluster_centers: tuple[torch.FloatTensor, ...] | None = None
    cluster_assignments: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ClusterFormerObjectDetectionOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given): Weighted set loss.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*, returned when `labels` is given):
            The parts of the loss before weighting, see [`detection_loss`].
        logits (`torch.FloatTensor` of shape `(batch_size, K, num_labels)`):
            Scores of each centre before a sigmoid; there is no class for "no object".
        pred_boxes (`torch.FloatTensor` of shape `(batch_size, K, 4)`):
            Box of each centre as (center_x, center_y, width, height) in [0, 1] of the image's real area. In float32 or
            better whatever the model's dtype: bfloat16 would round a corner by pixels.
        auxiliary_outputs (`list[dict[str, torch.FloatTensor]]`, *optional*, returned when `labels` is given and
            `config.auxiliary_loss` is set):
            `logits` and `pred_boxes` of the encoder's centres and of every decoder layer but the last.
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, K, decoder_hidden_size)`): The final centres.
        hidden_states, cluster_centers, cluster_assignments (*optional*): See [`ClusterFormerModelOutput`]; the latter
            two are returned when `output_cluster_assignments=True`.
        decoder_cluster_assignments (`tuple[tuple[torch.FloatTensor]]`, *optional*, returned when
            `output_cluster_assignments=True`):
            For each decoder layer and in it for each pyramid level, finest first, `(batch_size, heads, K, height,
            width)`: the share of every pixel in every centre, times how much the pixel counts. Its sum over K is in (0,
            1) at real pixels, small where the decoder sees background, and 0 at padded ones. The boxes are read from
            it.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.FloatTensor] | None = None
    logits: torch.FloatTensor | None = None
    pred_boxes: torch.FloatTensor | None = None
    auxiliary_outputs: list[dict[str, torch.FloatTensor]] | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cluster_centers: tuple[torch.FloatTensor, ...] | None = None
    cluster_assignments: tuple[torch.FloatTensor, ...] | None = None
    decoder_cluster_assignments: tuple[tuple[torch.FloatTensor, ...], ...] | None = None


@dataclass
class ClusterFormerUniversalSegmentationOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when labels are given): Weighted set loss.
        class_queries_logits (`torch.FloatTensor` of shape `(batch_size, K, num_labels + 1)`):
            Scores of each centre before a softmax; the last is "no object".
        masks_queries_logits (`torch.FloatTensor` of shape `(batch_size, K, height / 4, width / 4)`):
            Mask of each centre before a sigmoid; -19 at padded pixels, a score of 6e-9.
        auxiliary_logits (`list[dict[str, torch.FloatTensor]]`, *optional*, returned when labels are given and
            `config.auxiliary_loss` is set):
            The two above of the encoder's centres and of every decoder layer but the last.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*, returned when labels are given):
            The parts of the loss before weighting, see [`segmentation_loss`].
        hidden_states, cluster_centers, cluster_assignments, decoder_cluster_assignments (*optional*):
            See [`ClusterFormerObjectDetectionOutput`].
    """

    loss: torch.FloatTensor | None = None
    class_queries_logits: torch.FloatTensor | None = None
    masks_queries_logits: torch.FloatTensor | None = None
    auxiliary_logits: list[dict[str, torch.FloatTensor]] | None = None
    loss_dict: dict[str, torch.FloatTensor] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cluster_centers: tuple[torch.FloatTensor, ...] | None = None
    cluster_assignments: tuple[torch.FloatTensor, ...] | None = None
    decoder_cluster_assignments: tuple[tuple[torch.FloatTensor, ...], ...] | None = None


@dataclass
class ClusterFormerSemanticSegmenterOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given): Weighted set loss.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels, height / 4, width / 4)`):
            Log of the sum of all masks, weighted by the probability of the class.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*, returned when `labels` is given):
            The parts of the loss before weighting, see [`segmentation_loss`].
        hidden_states, cluster_centers, cluster_assignments, decoder_cluster_assignments (*optional*):
            See [`ClusterFormerObjectDetectionOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.FloatTensor] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cluster_centers: tuple[torch.FloatTensor, ...] | None = None
    cluster_assignments: tuple[torch.FloatTensor, ...] | None = None
    decoder_cluster_assignments: tuple[tuple[torch.FloatTensor, ...], ...] | None = None


@dataclass
class ClusterFormerImageClassifierOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given): Classification loss.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): Scores before softmax.
        hidden_states, cluster_centers, cluster_assignments (*optional*): See [`ClusterFormerModelOutput`]; the latter
            two are returned when `output_cluster_assignments=True`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    cluster_centers: tuple[torch.FloatTensor, ...] | None = None
    cluster_assignments: tuple[torch.FloatTensor, ...] | None = None


class ClusterFormerDropPath(nn.Module):
    """Stochastic depth per sample (https://arxiv.org/abs/1603.09382); identity outside training."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        keep = torch.rand(shape, dtype=torch.float32, device=hidden_states.device) < keep_prob
        return hidden_states * keep.to(hidden_states.dtype) / keep_prob

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


class ClusterFormerLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of (batch, channels, height, width) maps, each pixel for itself."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ClusterFormerGroupNorm(nn.GroupNorm):
    """The released code's norm: one group, so over all channels and pixels of an image."""

    def __init__(self, num_channels: int, eps: float):
        super().__init__(1, num_channels, eps=eps)


def stage_norm(config: ClusterFormerConfig, num_channels: int) -> nn.Module:
    norm = ClusterFormerLayerNorm if config.clustering == "recurrent" else ClusterFormerGroupNorm
    return norm(num_channels, eps=config.layer_norm_eps)


class ClusterFormerEmbeddings(nn.Module):
    """Stem: a convolution with stride `patch_size` over the image and two coordinate channels."""

    def __init__(self, config: ClusterFormerConfig):
        super().__init__()
        self.num_channels, self.patch_size = config.num_channels, config.patch_size
        self.pad = config.clustering == "recurrent"
        self.projection = nn.Conv2d(
            config.num_channels + 2, config.hidden_sizes[0], kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, height, width)`).
            sizes (`torch.Tensor` of shape `(batch, 2)`, *optional*): Real height and width of padded images.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_sizes[0], ceil(height / patch_size), ceil(width / patch_size))`;
            rounded down in released forms, as in the authors' code.
        """
        self.check(pixel_values)
        pixels = self.add_coordinates(pixel_values, sizes)
        if sizes is not None:
            mask = pixel_mask_from_sizes(sizes, pixels.shape[-2:])[..., 0]
            # `where` and not a product: padding may hold anything, NaN too.
            pixels = torch.where(mask[:, None], pixels, pixels.new_zeros(()))
        if self.pad:
            pixels = F.pad(pixels, (0, self.patch_size - 1, 0, self.patch_size - 1))
        return self.projection(pixels.to(self.projection.weight.dtype))

    def check(self, pixel_values: torch.Tensor):
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` must have the shape (batch_size, num_channels, height, width) with num_channels="
                f"{self.num_channels} as in the config, got {tuple(pixel_values.shape)}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must be normalised floating point numbers, got {pixel_values.dtype}: the image "
                "processor makes them."
            )
        if min(pixel_values.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"`pixel_values` of height and width {tuple(pixel_values.shape[-2:])} are smaller than one patch of "
                f"{self.patch_size} x {self.patch_size} pixels."
            )

    @staticmethod
    def add_coordinates(pixel_values: torch.Tensor, sizes: torch.Tensor | None) -> torch.Tensor:
        """Appends the row and the column of each pixel, from -0.5 to 0.5 over the image's real area."""
        batch_size, _, height, width = pixel_values.shape
        coordinates = []
        for axis, side in enumerate((height, width)):
            position = torch.arange(side, dtype=torch.float32, device=pixel_values.device)[None]
            last = side - 1 if sizes is None else sizes[:, axis, None] - 1
            last = max(last, 1) if sizes is None else last.clamp_min(1)
            coordinates.append(position / last - 0.5)
        rows = coordinates[0][:, None, :, None].expand(batch_size, 1, height, width)
        columns = coordinates[1][:, None, None].expand(batch_size, 1, height, width)
        return torch.cat([pixel_values, rows.to(pixel_values.dtype), columns.to(pixel_values.dtype)], dim=1)


class ClusterFormerMLP(nn.Module):
    """Two-layer feed-forward network on (batch, height, width, channels)."""

    def __init__(self, config: ClusterFormerConfig, stage_idx: int):
        super().__init__()
        dim = config.hidden_sizes[stage_idx]
        hidden_dim = int(dim * config.mlp_ratios[stage_idx])
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.activation(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


class ClusterFormerPositionEncoding(nn.Conv2d):
    """
    Conditional positional encoding (https://arxiv.org/abs/2102.10882): a depthwise 3x3 convolution beside the identity.

    Clustering and dispatching do not see which pixels are neighbours; a block learns that here.
    """

    def __init__(self, num_channels: int):
        super().__init__(num_channels, num_channels, kernel_size=3, padding=1, groups=num_channels)

    def forward(self, hidden_states: torch.Tensor, geometry: StageGeometry) -> torch.Tensor:
        """(batch, channels, height, width), in the same shape; padded pixels count as zeros."""
        if geometry.mask is not None:
            hidden_states = hidden_states * geometry.mask.permute(0, 3, 1, 2).to(hidden_states.dtype)
        return hidden_states + super().forward(hidden_states)


class ClusterFormerLayer(GradientCheckpointingLayer):
    """
    A block: a positional encoding, recurrent clustering with feature dispatching, and a feed-forward network; the
    latter two are pre-normed residual branches with a scale.
    """

    def __init__(self, config: ClusterFormerConfig, stage_idx: int, drop_path: float = 0.0):
        super().__init__()
        dim = config.hidden_sizes[stage_idx]
        self.position_encoding = ClusterFormerPositionEncoding(dim)
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.clustering = ClusterFormerRecurrentClustering(config, stage_idx)
        self.layer_scale1 = nn.Parameter(torch.empty(dim))
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = ClusterFormerMLP(config, stage_idx)
        self.layer_scale2 = nn.Parameter(torch.empty(dim))
        self.drop_path = ClusterFormerDropPath(drop_path)

    def forward(
        self,
        hidden_states: torch.Tensor,
        geometry: StageGeometry,
        output_assignments: bool = False,
        output_sample_assignments: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Maps (batch, channels, height, width), channels last in memory; returns the map and what else
        [`ClusterFormerRecurrentClustering.forward`] returns.
        """
        hidden_states = self.position_encoding(hidden_states, geometry).permute(0, 2, 3, 1)
        update, assignments, sample_assignments = self.clustering(
            self.norm1(hidden_states),
            geometry,
            output_assignments=output_assignments,
            output_sample_assignments=output_sample_assignments,
        )
        hidden_states = torch.addcmul(hidden_states, self.drop_path(update), self.layer_scale1)
        if runs_eagerly_on_cpu(hidden_states) and not torch.is_grad_enabled() and not self.training:
            for pixels in hidden_states.view(-1, hidden_states.shape[-1]).split(FEED_FORWARD_CHUNK):
                pixels.addcmul_(self.mlp(self.norm2(pixels)), self.layer_scale2)
        else:
            update = self.mlp(self.norm2(hidden_states))
            hidden_states = torch.addcmul(hidden_states, self.drop_path(update), self.layer_scale2)
        # No tuple in the tuple: reentrant checkpointing gives no gradient to what is inside.
        return hidden_states.permute(0, 3, 1, 2), assignments, sample_assignments


class ClusterFormerReleasedMLP(nn.Module):
    """Two-layer feed-forward network of 1x1 convolutions on (batch, channels, height, width)."""

    def __init__(self, config: ClusterFormerConfig, stage_idx: int):
        super().__init__()
        dim = config.hidden_sizes[stage_idx]
        hidden_dim = int(dim * config.mlp_ratios[stage_idx])
        self.fc1 = nn.Conv2d(dim, hidden_dim, kernel_size=1)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Conv2d(hidden_dim, dim, kernel_size=1)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        in_parts = runs_eagerly_on_cpu(hidden_states) and not keeps_released_order(hidden_states)
        if in_parts and not torch.is_grad_enabled() and not self.training:
            rows = max(FEED_FORWARD_CHUNK // (hidden_states.shape[0] * hidden_states.shape[3]), 1)
            return torch.cat([self.project(part) for part in hidden_states.split(rows, dim=2)], dim=2)
        return self.project(hidden_states)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.activation(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


class ClusterFormerReleasedLayer(GradientCheckpointingLayer):
    """A block of the released code; channels first in memory, which its regrouping depends on."""

    def __init__(self, config: ClusterFormerConfig, stage_idx: int, drop_path: float = 0.0):
        super().__init__()
        dim = config.hidden_sizes[stage_idx]
        self.norm1 = ClusterFormerGroupNorm(dim, eps=config.layer_norm_eps)
        self.clustering = ClusterFormerReleasedClustering(config, stage_idx)
        self.layer_scale1 = nn.Parameter(torch.empty(dim))
        self.norm2 = ClusterFormerGroupNorm(dim, eps=config.layer_norm_eps)
        self.mlp = ClusterFormerReleasedMLP(config, stage_idx)
        self.layer_scale2 = nn.Parameter(torch.empty(dim))
        self.drop_path = ClusterFormerDropPath(drop_path)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps (batch, channels, height, width); returns the map and the index of each pixel's centre."""
        update, nearest = self.clustering(self.norm1(hidden_states))
        hidden_states = hidden_states + self.drop_path(self.layer_scale1[:, None, None] * update)
        update = self.mlp(self.norm2(hidden_states))
        hidden_states = hidden_states + self.drop_path(self.layer_scale2[:, None, None] * update)
        return hidden_states, nearest


class ClusterFormerDownsample(nn.Conv2d):
    """Convolution between two stages."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, out channels, ceil(height / 2), ceil(width / 2))."""
        batch_size, height, width = hidden_states.shape[0], *((side + 1) // 2 for side in hidden_states.shape[-2:])
        is_small = batch_size * height * width <= self.out_channels and self.weight.numel() >= LARGE_WEIGHT
        if not (runs_eagerly_on_cpu(hidden_states) and is_small):
            return super().forward(hidden_states)
        # The convolution would reorder its weights at every call, which takes several times as long as the product.
        patches = F.unfold(hidden_states, self.kernel_size, padding=self.padding, stride=self.stride)
        hidden_states = F.linear(patches.mT, self.weight.flatten(1), self.bias)
        return hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class ClusterFormerStage(nn.Module):
    """Downsampling (from the second stage on) and the blocks of one resolution."""

    layer_class = ClusterFormerLayer

    def __init__(self, config: ClusterFormerConfig, stage_idx: int):
        super().__init__()
        sizes = config.hidden_sizes
        self.downsample = (
            ClusterFormerDownsample(sizes[stage_idx - 1], sizes[stage_idx], kernel_size=3, stride=2, padding=1)
            if stage_idx > 0
            else nn.Identity()
        )
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
        start = sum(config.depths[:stage_idx])
        self.layers = nn.ModuleList(
            self.layer_class(config, stage_idx, drop_path=rates[start + i]) for i in range(config.depths[stage_idx])
        )
        self.num_heads = config.num_attention_heads[stage_idx]
        self.center_grid = as_pair(config.center_grid[stage_idx])
        self.sr_ratio = config.sr_ratios[stage_idx]

    def forward(
        self,
        hidden_states: torch.Tensor,
        sizes: torch.Tensor | None = None,
        output_cluster_centers: bool = False,
        output_cluster_assignments: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, height, width)`): The previous stage's map.
            sizes (`torch.Tensor` of shape `(batch, 2)`, *optional*): Real height and width on this stage's map.

        Returns:
            The stage's map, its centres (batch, K, channels) and its assignments (batch, heads, K, height, width).
        """
        hidden_states = self.downsample(hidden_states).contiguous(memory_format=torch.channels_last)
        geometry = stage_geometry(hidden_states.shape[-2:], self.center_grid, self.sr_ratio, sizes, hidden_states)
        for layer in self.layers[:-1]:
            hidden_states, *_ = layer(hidden_states, geometry)
        hidden_states, assignments, sample_assignments = self.layers[-1](
            hidden_states, geometry, output_cluster_assignments, output_cluster_centers
        )
        if geometry.mask is not None:
            hidden_states = hidden_states * geometry.mask.permute(0, 3, 1, 2).to(hidden_states.dtype)

        centers = None
        if output_cluster_centers:
            sample = geometry.sample(hidden_states.permute(0, 2, 3, 1)).flatten(1, 2)
            centers = mean_under_assignments(sample, sample_assignments)
        if output_cluster_assignments:
            assignments = assignments.mT.unflatten(-1, hidden_states.shape[-2:])
        return hidden_states, centers, assignments


class ClusterFormerReleasedStage(ClusterFormerStage):
    """A stage of the released code, which cuts the map into windows of equal size and knows no padding."""

    layer_class = ClusterFormerReleasedLayer

    def forward(
        self,
        hidden_states: torch.Tensor,
        sizes: torch.Tensor | None = None,
        output_cluster_centers: bool = False,
        output_cluster_assignments: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        hidden_states = self.downsample(hidden_states).contiguous()
        for layer in self.layers:
            hidden_states, nearest = layer(hidden_states)

        centers, assignments = None, None
        if output_cluster_centers or output_cluster_assignments:
            num_centers = self.center_grid[0] * self.center_grid[1]
            one_hot = F.one_hot(nearest.flatten(2), num_centers).to(hidden_states.dtype)
        if output_cluster_centers:
            centers = mean_under_assignments(hidden_states.flatten(2).mT, one_hot)
        if output_cluster_assignments:
            assignments = one_hot.mT.unflatten(-1, hidden_states.shape[-2:])
        return hidden_states, centers, assignments


def mean_under_assignments(features: torch.Tensor, assignments: torch.Tensor) -> torch.Tensor:
    """
    Means of (batch, N, channels) under (batch, heads, N, K), each head its own channels: (batch, K, channels). Where
    heads do not divide the channels, as in released forms with a `head_dim`, of all heads together.
    """
    if features.shape[-1] % assignments.shape[1] != 0:
        assignments = assignments.mean(dim=1, keepdim=True)
    pixels = split_heads(features, assignments.shape[1]).to(assignments.dtype)
    # Divided before they are summed: in float16 the sum over many pixels overflows.
    shares = assignments / assignments.sum(dim=2, keepdim=True).clamp_min(MIN_MASS)
    centers = shares.mT @ pixels
    return centers.transpose(1, 2).flatten(2).to(features.dtype)


class ClusterFormerPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving for all ClusterFormer models."""

    config: ClusterFormerConfig
    config_class = ClusterFormerConfig
    base_model_prefix = "clusterformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    # The blocks of a stage, and the layers of the decoder, share where their pixels lie.
    _no_split_modules = [
        "ClusterFormerEmbeddings",
        "ClusterFormerStage",
        "ClusterFormerReleasedStage",
        "ClusterFormerDecoder",
    ]
    _can_record_outputs = {"hidden_states": ClusterFormerStage}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ClusterFormerBoxDelta):
            init.zeros_(module.weight)
        elif isinstance(module, ClusterFormerPartOffset):
            init.zeros_(module.weight)
            init.copy_(module.bias, module.even_offsets())
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, ClusterFormerClassHead):
                init.constant_(module.bias, -math.log(99))
        elif isinstance(module, nn.Conv2d):
            # torch's default. The stem's few inputs need more than `initializer_range` (measured on the quickstart).
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (ClusterFormerLayer, ClusterFormerReleasedLayer)):
            init.constant_(module.layer_scale1, self.config.layer_scale_init_value)
            init.constant_(module.layer_scale2, self.config.layer_scale_init_value)
        elif isinstance(module, (ClusterFormerRecurrentClustering, ClusterFormerPyramidClustering)):
            init.constant_(module.logit_scale, math.log(10.0))
            if module.spatial_weight is not None:
                init.constant_(module.spatial_weight, math.log(math.e - 1))  # softplus gives 1
            if isinstance(module, ClusterFormerPyramidClustering):
                init.constant_(module.part_scale, math.log(0.5))
        elif isinstance(module, ClusterFormerReleasedClustering):
            init.ones_(module.sim_alpha)
            init.zeros_(module.sim_beta)


class ClusterFormerEncoder(ClusterFormerPreTrainedModel):
    """The stages. `_can_record_outputs` of the class above collects their maps."""

    def __init__(self, config: ClusterFormerConfig):
        super().__init__(config)
        stage_class = ClusterFormerStage if config.clustering == "recurrent" else ClusterFormerReleasedStage
        self.stages = nn.ModuleList(stage_class(config, stage_idx) for stage_idx in range(config.num_stages))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        hidden_states: torch.Tensor,
        sizes: torch.Tensor | None = None,
        num_center_stages: int = 0,
        output_cluster_assignments: bool = False,
        **kwargs,
    ) -> ClusterFormerEncoderOutput:
        """The last `num_center_stages` stages give their centres, which takes an E-step each."""
        cluster_centers, cluster_assignments = (), ()
        for stage_idx, stage in enumerate(self.stages):
            if stage_idx > 0 and sizes is not None:
                sizes = (sizes + 1) // 2
            gives_centers = len(self.stages) - stage_idx <= num_center_stages
            hidden_states, centers, assignments = stage(hidden_states, sizes, gives_centers, output_cluster_assignments)
            cluster_centers += (centers,)
            cluster_assignments += (assignments,)
        return ClusterFormerEncoderOutput(
            last_hidden_state=hidden_states,
            cluster_centers=cluster_centers if num_center_stages > 0 else None,
            cluster_assignments=cluster_assignments if output_cluster_assignments else None,
        )


def real_sizes(pixel_mask: torch.Tensor | None, pixel_values: torch.Tensor) -> torch.Tensor | None:
    """Real height and width of each image, (batch, 2), from `pixel_mask`; raises `ValueError` if it is no such mask."""
    if pixel_mask is None:
        return None
    expected = (pixel_values.shape[0], *pixel_values.shape[-2:])
    if tuple(pixel_mask.shape) != expected:
        raise ValueError(f"`pixel_mask` must have the shape {expected}, got {tuple(pixel_mask.shape)}.")
    pixel_mask = pixel_mask.bool()
    sizes = torch.stack([pixel_mask.any(dim=2).sum(dim=1), pixel_mask.any(dim=1).sum(dim=1)], dim=-1)
    if not is_tracing(pixel_mask):
        expected = pixel_mask_from_sizes(sizes, pixel_mask.shape[1:])[..., 0]
        wrong = (sizes.amin(dim=1) < 1) | (expected != pixel_mask).flatten(1).any(dim=1)
        if wrong.any():
            raise ValueError(
                "`pixel_mask` must mark a rectangle in the top left corner of every image, at least one pixel large; "
                f"it does not for the images {wrong.nonzero().flatten().tolist()} of the batch."
            )
    return sizes


def map_sizes(sizes: torch.Tensor | None, stride: int) -> torch.Tensor | None:
    """Real sizes on a map of the given stride."""
    return None if sizes is None else -(-sizes // stride)


def mean_over_pixels(hidden_states: torch.Tensor, sizes: torch.Tensor | None) -> torch.Tensor:
    """Mean of (batch, channels, height, width) over the real pixels of each image: (batch, channels)."""
    if sizes is None:
        return hidden_states.mean(dim=(-2, -1))
    sizes = sizes.to(hidden_states.device)  # the input's, where layers are spread over devices
    mask = pixel_mask_from_sizes(sizes, hidden_states.shape[-2:]).permute(0, 3, 1, 2)
    # In float16 neither the sum nor the number of many pixels can be represented.
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    total = (hidden_states * mask.to(hidden_states.dtype)).sum(dim=(-2, -1), dtype=dtype)
    return (total / sizes.prod(dim=-1, keepdim=True).to(dtype)).to(hidden_states.dtype)


def check_released_input(config: ClusterFormerConfig, pixel_values: torch.Tensor, sizes: torch.Tensor | None):
    """The released forms take sizes that their windows divide and no padding; raises `ValueError` otherwise."""
    sides = tuple(pixel_values.shape[-2:])
    multiples = []
    for axis in range(2):
        windows = [as_pair(entry) for entry in config.window_grid]
        strides = [
            config.patch_size * 2**stage_idx * window[axis]
            for stage_idx, window in enumerate(windows)
            if min(window) > 1
        ]
        multiples.append(math.lcm(*strides))
    if any(side % multiple for side, multiple in zip(sides, multiples)):
        raise ValueError(
            f"clustering={config.clustering!r} with window_grid={config.window_grid} takes images whose height is a "
            f"multiple of {multiples[0]} and whose width is a multiple of {multiples[1]}, got {sides[0]} x {sides[1]}."
        )
    if sizes is not None and not is_tracing(sizes) and (sizes != sizes.new_tensor(sides)).any():
        raise ValueError(
            f"clustering={config.clustering!r} cannot leave out padded pixels: resize a batch to one size."
        )


class ClusterFormerModel(ClusterFormerPreTrainedModel):
    """
    The ClusterFormer encoder without a head on top.

    `pooler_output` reads the centres of the last stage's normed map, each weighted by its mass. Since the assignments
    of a pixel sum to one, this sum over the centres equals the mean over the pixels whatever the assignments, and is so
    computed: the read-out loses nothing, and a linear head's output splits into one share for each cluster.
    """

    def __init__(self, config: ClusterFormerConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = ClusterFormerEmbeddings(config)
        self.encoder = ClusterFormerEncoder(config)
        self.hidden_states_norms = None
        if add_pooling_layer:
            stages = list(zip(config.stage_names[1:], config.hidden_sizes))
            stages = stages[-1:] if config.classifier_pooling == "centers" else stages
            self.hidden_states_norms = nn.ModuleDict({stage: stage_norm(config, size) for stage, size in stages})
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_cluster_assignments: bool | None = None,
        **kwargs,
    ) -> ClusterFormerModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`):
                Normalised images. Any height and width from `patch_size` up with the recurrent clustering; the released
                forms take multiples of their window grid.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
                1 at real pixels, 0 at padding, which fills the right and the bottom. Padding changes no result.
            output_cluster_assignments (`bool`, *optional*):
                Whether to return `cluster_assignments`, and `cluster_centers` as an entry.

        Raises:
            `ValueError`: if the shapes, the mask or the size do not fit the config.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        if output_cluster_assignments is None:
            output_cluster_assignments = getattr(self.config, "output_cluster_assignments", False)
        num_center_stages = kwargs.pop("num_center_stages", self.config.num_stages)
        sizes = real_sizes(pixel_mask, pixel_values)
        if self.config.clustering != "recurrent":
            check_released_input(self.config, pixel_values, sizes)
            sizes = None

        hidden_states = self.embeddings(pixel_values, sizes)
        encoder_outputs = self.encoder(
            hidden_states,
            map_sizes(sizes, self.config.patch_size),
            num_center_stages=num_center_stages,
            output_cluster_assignments=output_cluster_assignments,
            **kwargs,
        )
        last_hidden_state = encoder_outputs.last_hidden_state
        pooler_output = None
        if self.hidden_states_norms is not None:
            pooler_output = self.pool_stage(self.config.num_stages, last_hidden_state, sizes)

        outputs = ClusterFormerModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooler_output,
            hidden_states=encoder_outputs.hidden_states,
            cluster_centers=encoder_outputs.cluster_centers if output_cluster_assignments else None,
            cluster_assignments=encoder_outputs.cluster_assignments,
        )
        # An attribute and no entry, since batched pipelines index every entry by image.
        object.__setattr__(outputs, "cluster_centers", encoder_outputs.cluster_centers)
        return outputs

    def pool_stage(self, stage: int, hidden_states: torch.Tensor, sizes: torch.Tensor | None) -> torch.Tensor:
        """Mean of the normed map of a stage (counted from 1) over the real pixels: (batch, channels)."""
        normed = self.hidden_states_norms[f"stage{stage}"](hidden_states)
        return mean_over_pixels(normed, map_sizes(sizes, self.config.patch_size * 2 ** (stage - 1)))


class ClusterFormerForImageClassification(ClusterFormerPreTrainedModel):
    """ClusterFormer with a linear classifier on the pooled centres (`classifier_pooling`), e.g. for ImageNet."""

    def __init__(self, config: ClusterFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.clusterformer = ClusterFormerModel(config)
        channels = config.hidden_sizes[-1] if config.classifier_pooling == "centers" else sum(config.hidden_sizes)
        self.classifier = nn.Linear(channels, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()
        # In all models that always read the maps: else the first call does it, which torch.compile cannot trace.
        if config.classifier_pooling == "stages":
            maybe_install_capturing_hooks(self.clusterformer.encoder)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_cluster_assignments: bool | None = None,
        **kwargs,
    ) -> ClusterFormerImageClassifierOutput:
        r"""
        Args:
            pixel_values, pixel_mask, output_cluster_assignments: See [`ClusterFormerModel.forward`].
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Classes in `[0, num_labels)`, or -100 for a picture that the loss, cross-entropy, leaves out (NaN where
                it leaves out all); or values for the `problem_type` of the config.

        Raises:
            `ValueError`: if a label is none of these.
        """
        if output_cluster_assignments is None:
            output_cluster_assignments = getattr(self.config, "output_cluster_assignments", False)
        read_stages = self.config.classifier_pooling == "stages"
        output_hidden_states = kwargs.pop("output_hidden_states", None)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.clusterformer(
            pixel_values,
            pixel_mask,
            output_cluster_assignments,
            num_center_stages=self.config.num_stages if output_cluster_assignments else 0,
            output_hidden_states=read_stages or output_hidden_states,
            **kwargs,
        )
        pooled = outputs.pooler_output
        if read_stages:
            sizes = real_sizes(pixel_mask, pixel_values) if self.config.clustering == "recurrent" else None
            maps = list(enumerate(outputs.hidden_states))[1:-1]
            means = [self.clusterformer.pool_stage(stage, hidden_state, sizes) for stage, hidden_state in maps]
            pooled = torch.cat([*means, pooled], dim=-1)
        logits = self.classifier(pooled)

        loss = None
        if labels is not None:
            self.check_labels(labels)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)

        return ClusterFormerImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            cluster_centers=outputs.cluster_centers if output_cluster_assignments else None,
            cluster_assignments=outputs.cluster_assignments,
        )

    def check_labels(self, labels: torch.Tensor):
        # On an accelerator this would wait for the device at every step; the training script checks the data set there.
        if labels.device.type != "cpu" or labels.is_floating_point() or self.num_labels < 2 or is_tracing(labels):
            return
        if labels.ndim == 1 and (((labels < 0) & (labels != -100)) | (labels >= self.num_labels)).any():
            raise ValueError(
                f"`labels` must be in [0, {self.num_labels}) for num_labels={self.num_labels}, got {labels.tolist()}."
            )


class ClusterFormerForObjectDetection(ClusterFormerPreTrainedModel):
    """
    ClusterFormer with a cluster decoder whose boxes are read from the moments of each centre's pixels.

    The last stage's centres are the queries: `config.center_grid[-1]` sets their number K.
    """

    def __init__(self, config: ClusterFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.clusterformer = ClusterFormerModel(config, add_pooling_layer=False)
        self.decoder = ClusterFormerDecoder(config, predict_boxes=True)
        self.class_heads = nn.ModuleList(
            ClusterFormerClassHead(config.decoder_hidden_size, config.num_labels)
            for _ in range(config.decoder_layers + 1)
        )
        self.post_init()
        maybe_install_capturing_hooks(self.clusterformer.encoder)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        output_cluster_assignments: bool | None = None,
        **kwargs,
    ) -> ClusterFormerObjectDetectionOutput:
        r"""
        Args:
            pixel_values, pixel_mask, output_cluster_assignments: See [`ClusterFormerModel.forward`].
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                For each image `class_labels` (n,) int64 in `[0, num_labels)` and `boxes` (n, 4) as (center_x, center_y,
                width, height) in [0, 1] of the image's real area. If `size` (2,) is the padded size of the batch, they
                are in [0, 1] of the padded image instead, as image processors that pad write them. More keys are
                ignored.

        Raises:
            `ValueError`: if the labels are of another form, naming the image and the value.
        """
        decoded, extras = decode(self, pixel_values, pixel_mask, output_cluster_assignments, kwargs)
        predictions = []
        for head, centers, boxes in zip(self.class_heads, decoded.centers, decoded.boxes):
            logits = head(centers)
            if decoded.surplus is not None:
                logits = logits.masked_fill(decoded.surplus.to(logits.device), SURPLUS_LOGIT)
            predictions.append({"logits": logits, "pred_boxes": boxes})
        *auxiliary_outputs, final = predictions

        loss, loss_dict = None, None
        if labels is not None:
            check_detection_labels(labels, len(pixel_values), self.num_labels)
            if any("size" in label for label in labels):
                labels = boxes_of_real_areas(labels, real_sizes(pixel_mask, pixel_values), pixel_values.shape[-2:])
            trained = [final, *auxiliary_outputs] if self.config.auxiliary_loss else [final]
            loss, loss_dict = detection_loss(trained, labels, self.config)

        return ClusterFormerObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            **final,
            auxiliary_outputs=auxiliary_outputs if labels is not None and self.config.auxiliary_loss else None,
            last_hidden_state=decoded.centers[-1],
            **extras,
        )


class ClusterFormerForUniversalSegmentation(ClusterFormerPreTrainedModel):
    """
    ClusterFormer with a cluster decoder for instance, panoptic and semantic segmentation: every centre has a class and
    a mask. The last stage's centres are the queries: `config.center_grid[-1]` sets their number K.
    """

    def __init__(self, config: ClusterFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.clusterformer = ClusterFormerModel(config, add_pooling_layer=False)
        self.decoder = ClusterFormerDecoder(config, predict_masks=True)
        self.class_head = nn.Linear(config.decoder_hidden_size, config.num_labels + 1)
        self.mask_head = ClusterFormerMaskHead(config)
        self.post_init()
        maybe_install_capturing_hooks(self.clusterformer.encoder)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        output_cluster_assignments: bool | None = None,
        **kwargs,
    ) -> ClusterFormerUniversalSegmentationOutput:
        r"""
        Args:
            pixel_values, pixel_mask, output_cluster_assignments: See [`ClusterFormerModel.forward`].
            labels (`list[dict[str, torch.Tensor]]`, *optional*):
                For each image `masks` (n, height, width) of instances or segments, 1 inside, and `class_labels` (n,)
                int64, their classes in `[0, num_labels)`. Masks are of the padded size, or smaller: then they are
                padded at the right and the bottom, as images are. More keys are ignored.
            mask_labels, class_labels (`list[torch.Tensor]`, *optional*):
                The same as two lists, as Mask2Former takes them. Only by name: Trainer, which looks for labels in the
                signature, would ask for all of them before it evaluates a loss. To train and to evaluate with these it
                needs `label_names=["mask_labels", "class_labels"]`.

        Raises:
            `ValueError`: if the labels are of another form, naming the image and the value.
        """
        mask_labels, class_labels = kwargs.pop("mask_labels", None), kwargs.pop("class_labels", None)
        if labels is not None:
            check_segment_labels(labels)
            mask_labels = [label["masks"] for label in labels]
            class_labels = [label["class_labels"] for label in labels]
        if (mask_labels is None) != (class_labels is None):
            raise ValueError("`mask_labels` and `class_labels` must be given together.")

        decoded, extras = decode(self, pixel_values, pixel_mask, output_cluster_assignments, kwargs)
        final = read_masks(self.class_head, self.mask_head, decoded, -1)
        loss, loss_dict, auxiliary_logits = None, None, None
        if mask_labels is not None:
            mask_labels = check_mask_labels(mask_labels, class_labels, pixel_values, self.num_labels)
            if self.config.auxiliary_loss:
                layers = range(len(decoded.centers) - 1)
                auxiliary_logits = [read_masks(self.class_head, self.mask_head, decoded, layer) for layer in layers]
            trained = [final, *(auxiliary_logits or [])]
            loss, loss_dict = segmentation_loss(trained, mask_labels, class_labels, self.config, self.training)

        return ClusterFormerUniversalSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            **final,
            auxiliary_logits=auxiliary_logits,
            **extras,
        )


class ClusterFormerForSemanticSegmentation(ClusterFormerPreTrainedModel):
    """
    ClusterFormer with a cluster decoder for semantic segmentation, trained on the masks of the classes: the model and
    the parameters are those of [`ClusterFormerForUniversalSegmentation`].
    """

    def __init__(self, config: ClusterFormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.clusterformer = ClusterFormerModel(config, add_pooling_layer=False)
        self.decoder = ClusterFormerDecoder(config, predict_masks=True)
        self.class_head = nn.Linear(config.decoder_hidden_size, config.num_labels + 1)
        self.mask_head = ClusterFormerMaskHead(config)
        self.post_init()
        maybe_install_capturing_hooks(self.clusterformer.encoder)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_cluster_assignments: bool | None = None,
        **kwargs,
    ) -> ClusterFormerSemanticSegmenterOutput:
        r"""
        Args:
            pixel_values, pixel_mask, output_cluster_assignments: See [`ClusterFormerModel.forward`].
            labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
                The class of every pixel in `[0, num_labels)`, or `config.semantic_loss_ignore_index`, which is in the
                mask of no class. Of the padded size, or smaller: then padded at the right and the bottom with that.

        Raises:
            `ValueError`: if the labels are of another form, naming the image and the values.
        """
        mask_labels = None
        if labels is not None:
            mask_labels, class_labels = masks_of_label_maps(
                labels, self.config.semantic_loss_ignore_index, self.num_labels
            )
            mask_labels = check_mask_labels(mask_labels, class_labels, pixel_values, self.num_labels)

        decoded, extras = decode(self, pixel_values, pixel_mask, output_cluster_assignments, kwargs)
        final = read_masks(self.class_head, self.mask_head, decoded, -1)
        loss, loss_dict = None, None
        if mask_labels is not None:
            layers = range(len(decoded.centers) - 1) if self.config.auxiliary_loss else ()
            trained = [final] + [read_masks(self.class_head, self.mask_head, decoded, layer) for layer in layers]
            loss, loss_dict = segmentation_loss(trained, mask_labels, class_labels, self.config, self.training)
        return ClusterFormerSemanticSegmenterOutput(
            loss=loss, loss_dict=loss_dict, logits=semantic_logits(**final), **extras
        )


def decode(model, pixel_values, pixel_mask, output_cluster_assignments, kwargs) -> tuple[DecoderOutput, dict]:
    """
    Runs encoder and decoder of a detection or segmentation model, whose `filter_output_hidden_states` asks for all
    maps and hides them again. Returns beside the decoder's output what else the model returns.
    """
    if output_cluster_assignments is None:
        output_cluster_assignments = getattr(model.config, "output_cluster_assignments", False)
    num_center_stages = model.config.num_stages if output_cluster_assignments else 1
    outputs = model.clusterformer(
        pixel_values, pixel_mask, output_cluster_assignments, num_center_stages=num_center_stages, **kwargs
    )
    sizes = real_sizes(pixel_mask, pixel_values)
    decoded = model.decoder(outputs.hidden_states[1:], outputs.cluster_centers[-1], sizes, output_cluster_assignments)
    return decoded, {
        "hidden_states": outputs.hidden_states,
        "cluster_centers": outputs.cluster_centers if output_cluster_assignments else None,
        "cluster_assignments": outputs.cluster_assignments,
        "decoder_cluster_assignments": decoded.assignments,
    }


def read_masks(class_head, mask_head, decoded: DecoderOutput, layer: int) -> dict[str, torch.Tensor]:
    """`class_queries_logits` and `masks_queries_logits` of the encoder's centres (layer 0) or of a decoder layer's."""
    centers = decoded.centers[layer]
    classes = class_head(centers)
    masks = mask_head(centers, decoded.boxes[layer], decoded.pixels, decoded.pixel_positions)
    if decoded.surplus is not None:
        no_object = torch.full_like(classes, SURPLUS_LOGIT)
        no_object[..., -1] = -SURPLUS_LOGIT
        classes = torch.where(decoded.surplus.to(classes.device), no_object, classes)
        hidden = ~decoded.pixel_mask | decoded.surplus[..., None]
        masks = masks.masked_fill(hidden.to(masks.device), SURPLUS_LOGIT)
    return {"class_queries_logits": classes, "masks_queries_logits": masks}


def semantic_logits(class_queries_logits: torch.Tensor, masks_queries_logits: torch.Tensor) -> torch.Tensor:
    """Log of the sum of all masks weighted by class probability: (batch, num_labels, height, width)."""
    classes = class_queries_logits.float().softmax(dim=-1)[..., :-1]
    masks = masks_queries_logits.float().sigmoid().flatten(2)
    weights = (classes.mT @ masks).unflatten(2, masks_queries_logits.shape[-2:])
    return weights.clamp_min(torch.finfo(weights.dtype).tiny).log().to(masks_queries_logits.dtype)


class ClusterFormerBackbone(BackboneMixin, ClusterFormerPreTrainedModel):
    """ClusterFormer backbone, to be used with frameworks like DETR, MaskFormer and UperNet."""

    has_attentions = False

    def __init__(self, config: ClusterFormerConfig):
        super().__init__(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.embeddings = ClusterFormerEmbeddings(config)
        self.encoder = ClusterFormerEncoder(config)
        self.hidden_states_norms = nn.ModuleDict(
            {stage: stage_norm(config, channels) for stage, channels in zip(self.out_features, self.channels)}
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None, **kwargs) -> BackboneOutput:
        r"""
        Args:
            pixel_values, pixel_mask: See [`ClusterFormerModel.forward`].

        Returns:
            `BackboneOutput` whose `feature_maps` are the normed maps of `out_features`,
            `(batch_size, channels, ceil(height / stride), ceil(width / stride))` each; see
            [`ClusterFormerEmbeddings.forward`] for the released forms.
        """
        sizes = real_sizes(pixel_mask, pixel_values)
        if self.config.clustering != "recurrent":
            check_released_input(self.config, pixel_values, sizes)
            sizes = None
        hidden_states = self.embeddings(pixel_values, sizes)
        outputs = self.encoder(hidden_states, map_sizes(sizes, self.config.patch_size), **kwargs)

        feature_maps = ()
        for stage, hidden_state in zip(self.stage_names, outputs.hidden_states):
            if stage in self.out_features:
                feature_maps += (self.hidden_states_norms[stage](hidden_state),)
        return BackboneOutput(feature_maps=feature_maps, hidden_states=outputs.hidden_states)


__all__ = [
    "ClusterFormerBackbone",
    "ClusterFormerForImageClassification",
    "ClusterFormerForObjectDetection",
    "ClusterFormerForSemanticSegmentation",
    "ClusterFormerForUniversalSegmentation",
    "ClusterFormerModel",
    "ClusterFormerPreTrainedModel",
]
