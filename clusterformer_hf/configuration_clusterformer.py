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
"""ClusterFormer model configuration."""

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig


CLUSTERINGS = ("recurrent", "release", "release_flash")
CLASSIFIER_POOLINGS = ("centers", "stages")


@strict
class ClusterFormerConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of all ClusterFormer models ([arXiv 2309.13196](https://arxiv.org/abs/2309.13196)): one flat config
    holds the backbone and the decoder. The defaults are ClusterFormer-Tiny. Lists have one entry for each stage.

    Args:
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the input image. Two coordinate channels are added inside.
        image_size (`int` or `list[int]`, *optional*, defaults to 224):
            Size that the checkpoint was trained at, in pixels. The model takes other sizes too.
        patch_size (`int`, *optional*, defaults to 4):
            Kernel and stride of the stem, in pixels.
        depths (`list[int]`, *optional*, defaults to `[2, 2, 6, 2]`):
            Blocks of each stage.
        hidden_sizes (`list[int]`, *optional*, defaults to `[96, 192, 384, 768]`):
            Channels of each stage.
        num_attention_heads (`list[int]`, *optional*, defaults to `[3, 6, 12, 24]`):
            Heads of each stage. Every head clusters for itself.
        head_dim (`int` or `list[int]`, *optional*):
            Channels of a head, one number or one for each stage. Only the released forms may differ from
            `hidden_sizes / num_attention_heads`, the default.
        mlp_ratios (`list[int | float]`, *optional*, defaults to `[4, 4, 4, 4]`):
            Hidden channels of each stage's feed-forward network over its channels.
        clustering (`str`, *optional*, defaults to `"recurrent"`):
            `"recurrent"` is the paper's Eq. 3-6, for new training. `"release"` and `"release_flash"` are the two forms
            of the authors' code (October and November 2023), for converted checkpoints. The query projections of
            `"release_flash"` have no gradient: DistributedDataParallel needs `find_unused_parameters=True`.
        center_grid (`list[int | list[int]]`, *optional*, defaults to `[10, 10, 10, 10]`):
            Grid that the first centres are pooled to, a number or `[rows, columns]` for each stage: K = rows * columns
            centres. With `"recurrent"` the grid never exceeds the map that is clustered (see `sr_ratios`).
        window_grid (`list[int | list[int]]`, *optional*, defaults to ones):
            Windows along height and width that the released forms cluster in separately, if there are several along
            both, as in the authors' code. All ones with `"recurrent"`.
        num_iterations (`int`, *optional*, defaults to 3):
            E- and M-steps of each clustering (T in the paper). Changes no parameter.
        spatial_clustering (`bool`, *optional*, defaults to `True`):
            Whether centres carry a place and an extent beside their feature, so that clusters are compact in the image.
            `False` is Eq. 3 to the letter. Read by `"recurrent"`.
        sr_ratios (`list[int]`, *optional*):
            The E- and M-steps of a stage run on the map averaged over cells of this many pixels a side; all pixels are
            dispatched to. Defaults to `[4, 2, 1, 1]` with `"recurrent"` and to ones with the released forms.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward networks of blocks and decoder layers. That of Eq. 5 is GELU.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the last block; grows linearly over the blocks.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the activation and the output of the feed-forward networks of the blocks.
        layer_scale_init_value (`float`, *optional*, defaults to 1.0):
            First value of the scales of both residual branches. The released code uses 1e-5.
        layer_norm_eps (`float`, *optional*, defaults to 1e-05):
            Epsilon of all norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal that linear layers start from.
        classifier_pooling (`str`, *optional*, defaults to `"centers"`):
            What the classifier reads: `"centers"`, the last stage's centres weighted by their mass (see
            [`ClusterFormerModel`]), or `"stages"`, the means of all four normed stage maps as in the released code.
        out_features (`list[str]`, *optional*):
            Stages that [`ClusterFormerBackbone`] returns, of `"stem", "stage1", "stage2", ...`. Defaults to the last.
        out_indices (`list[int]`, *optional*):
            The same as indices.
        decoder_hidden_size (`int`, *optional*, defaults to 256):
            Channels of the feature pyramid and of the cluster decoder of the detection and segmentation models.
        decoder_layers (`int`, *optional*, defaults to 6):
            Layers of the cluster decoder.
        decoder_attention_heads (`int`, *optional*, defaults to 8):
            Heads of the decoder's clustering and self-attention.
        decoder_ffn_dim (`int`, *optional*, defaults to 1024):
            Hidden channels of the decoder's feed-forward networks.
        decoder_num_iterations (`int`, *optional*, defaults to 3):
            E- and M-steps of each decoder layer.
        mask_feature_size (`int`, *optional*, defaults to 64):
            Channels of the pixels that masks are read from. Masks are also read from position, so few are enough.
        auxiliary_loss (`bool`, *optional*, defaults to `True`):
            Whether every decoder layer is trained, not the last alone. Without it the earlier layers' heads of the
            detector get no gradient (`find_unused_parameters` in distributed training).
        class_cost, bbox_cost, giou_cost (`float`, *optional*, defaults to 2, 5 and 2):
            Weights of the detection matcher.
        class_loss_coefficient, bbox_loss_coefficient, giou_loss_coefficient (`float`, defaults to 2, 5 and 2):
            Weights of the detection losses.
        focal_alpha (`float`, *optional*, defaults to 0.25):
            Alpha of the sigmoid focal loss of detection; 1 - alpha weighs the scores of what is not there, in the
            varifocal loss too.
        use_varifocal_loss (`bool`, *optional*, defaults to `False`):
            Whether the class loss of detection is RT-DETR's varifocal loss in place of Deformable DETR's focal loss:
            scores then follow the IoU of boxes.
        class_weight, mask_weight, dice_weight (`float`, *optional*, defaults to 2, 5 and 5):
            Weights of the segmentation matcher and losses.
        no_object_weight (`float`, *optional*, defaults to 0.1):
            Weight of the no-object class in the segmentation loss.
        train_num_points (`int`, *optional*, defaults to 12544):
            Points that the mask losses are computed at.
        oversample_ratio, importance_sample_ratio (`float`, *optional*, defaults to 3.0 and 0.75):
            Sampling of these points, as in Mask2Former.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            Label of pixels of no class. As in Mask2Former they are in no mask, so the mask of a class is to leave them
            out.

    Example:

    ```python
    >>> from clusterformer_hf import ClusterFormerConfig, ClusterFormerModel

    >>> configuration = ClusterFormerConfig()
    >>> model = ClusterFormerModel(configuration)
    ```"""

    model_type = "clusterformer"

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 4
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    hidden_sizes: list[int] | tuple[int, ...] = (96, 192, 384, 768)
    num_attention_heads: list[int] | tuple[int, ...] = (3, 6, 12, 24)
    head_dim: int | list[int] | tuple[int, ...] | None = None
    mlp_ratios: list[int | float] | tuple[int | float, ...] = (4, 4, 4, 4)
    clustering: str = "recurrent"
    center_grid: list[int | list[int]] | tuple[int | list[int], ...] = (10, 10, 10, 10)
    window_grid: list[int | list[int]] | tuple[int | list[int], ...] | None = None
    num_iterations: int = 3
    spatial_clustering: bool = True
    sr_ratios: list[int] | tuple[int, ...] | None = None
    hidden_act: str = "gelu"
    drop_path_rate: float | int = 0.0
    hidden_dropout_prob: float | int = 0.0
    layer_scale_init_value: float | int = 1.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    classifier_pooling: str = "centers"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    decoder_hidden_size: int = 256
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 1024
    decoder_num_iterations: int = 3
    mask_feature_size: int = 64
    auxiliary_loss: bool = True
    class_cost: float | int = 2
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    class_loss_coefficient: float | int = 2
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    focal_alpha: float = 0.25
    use_varifocal_loss: bool = False
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    no_object_weight: float | int = 0.1
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    semantic_loss_ignore_index: int = 255

    def __post_init__(self, **kwargs):
        for name in ("depths", "hidden_sizes", "num_attention_heads", "mlp_ratios", "center_grid"):
            setattr(self, name, list(getattr(self, name)))
        num_stages = len(self.depths)
        if self.window_grid is None:
            self.window_grid = [1] * num_stages
        if self.sr_ratios is None:
            defaults = [4, 2] if self.clustering == "recurrent" else []
            self.sr_ratios = (defaults + [1] * num_stages)[:num_stages]
        self.num_hidden_layers = num_stages
        self.stage_names = ["stem"] + [f"stage{idx}" for idx in range(1, num_stages + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        # What follows from the fields is not taken from a saved config, whose fields may have been changed.
        for name in ("num_hidden_layers", "stage_names"):
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Checks the fields against each other; raises `ValueError` naming the field and its value."""
        for name in ("hidden_sizes", "num_attention_heads", "mlp_ratios", "center_grid", "window_grid", "sr_ratios"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(
                    f"`{name}` must have one entry for each of the {len(self.depths)} stages of "
                    f"`depths={self.depths}`, got {name}={getattr(self, name)}."
                )
        for name in ("depths", "hidden_sizes", "num_attention_heads", "mlp_ratios", "sr_ratios"):
            if any(entry <= 0 for entry in getattr(self, name)):
                raise ValueError(f"`{name}` must hold positive numbers, got {name}={getattr(self, name)}.")
        for name in ("num_channels", "patch_size", "num_iterations", "decoder_layers", "decoder_num_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {name}={getattr(self, name)}.")
        for name in ("drop_path_rate", "hidden_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {name}={getattr(self, name)}.")
        if self.no_object_weight <= 0:
            raise ValueError(f"`no_object_weight` must be positive, got {self.no_object_weight}.")
        for name in ("center_grid", "window_grid"):
            for entry in getattr(self, name):
                if not isinstance(entry, int) and len(entry) != 2 or min(as_pair(entry)) < 1:
                    raise ValueError(
                        f"An entry of `{name}` is a positive number or a [rows, columns] pair, got {entry!r}."
                    )
        self._validate_clustering()

    def _validate_clustering(self):
        if self.clustering not in CLUSTERINGS:
            raise ValueError(f"`clustering` must be one of {CLUSTERINGS}, got {self.clustering!r}.")
        if self.classifier_pooling not in CLASSIFIER_POOLINGS:
            raise ValueError(
                f"`classifier_pooling` must be one of {CLASSIFIER_POOLINGS}, got {self.classifier_pooling!r}."
            )
        if self.clustering == "recurrent":
            if any(as_pair(entry) != (1, 1) for entry in self.window_grid):
                raise ValueError(
                    f"`window_grid={self.window_grid}` needs a released form; clustering='recurrent' has no windows."
                )
            if self.head_dim is not None:
                raise ValueError(f"`head_dim={self.head_dim}` needs a released form of `clustering`.")
        elif any(ratio != 1 for ratio in self.sr_ratios):
            raise ValueError(f"`sr_ratios={self.sr_ratios}` needs clustering='recurrent', got {self.clustering!r}.")
        if self.head_dim is not None and (len(self.head_dims) != len(self.depths) or min(self.head_dims) < 1):
            raise ValueError(
                f"`head_dim` must be a positive number, or one for each of the {len(self.depths)} stages of "
                f"`depths={self.depths}`, got head_dim={self.head_dim}."
            )

    @property
    def num_stages(self) -> int:
        return len(self.hidden_sizes)

    @property
    def head_dims(self) -> list[int]:
        """Channels of a head of each stage. Raises `ValueError` where heads do not divide the channels."""
        if self.head_dim is None:
            for size, heads in zip(self.hidden_sizes, self.num_attention_heads):
                if size % heads != 0:
                    raise ValueError(
                        f"Every entry of `hidden_sizes={self.hidden_sizes}` must be a multiple of its entry of "
                        f"`num_attention_heads={self.num_attention_heads}`: {size} is no multiple of {heads}."
                    )
            return [size // heads for size, heads in zip(self.hidden_sizes, self.num_attention_heads)]
        return [self.head_dim] * self.num_stages if isinstance(self.head_dim, int) else list(self.head_dim)

    @classmethod
    def tiny(cls, **kwargs) -> "ClusterFormerConfig":
        """ClusterFormer-Tiny at the paper's size."""
        return cls(**kwargs)

    @classmethod
    def small(cls, **kwargs) -> "ClusterFormerConfig":
        """ClusterFormer-Small at the paper's size."""
        return cls(**{"depths": [2, 2, 18, 2], **kwargs})

    @classmethod
    def released_tiny(cls, **kwargs) -> "ClusterFormerConfig":
        """The authors' released Tiny (30.2M parameters without the head). Heights and widths: multiples of 128."""
        released = {
            "clustering": "release",
            "mlp_ratios": [8, 8, 4, 4],
            "window_grid": [32, 16, 8, 4],
            "layer_scale_init_value": 1e-5,
            "classifier_pooling": "stages",
        }
        return cls(**{**released, **kwargs})

    @classmethod
    def released_small(cls, **kwargs) -> "ClusterFormerConfig":
        """The authors' released Small: released Tiny with 18 blocks in the third stage and one iteration."""
        return cls.released_tiny(**{"depths": [2, 2, 18, 2], "num_iterations": 1, **kwargs})


def as_pair(entry: int | list[int]) -> tuple[int, int]:
    """The (rows, columns) of a `center_grid` or `window_grid` entry."""
    return (entry, entry) if isinstance(entry, int) else (entry[0], entry[1])


__all__ = ["ClusterFormerConfig"]
