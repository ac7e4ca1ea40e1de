"""ViT-PE: DeiT-S with tied matrices in attention and feed-forward network (Koyun and Töreyin 2024, Eq. 1, 2 and 4).

The paper gives 11.1 M parameters. With the whole-matrix transpose, all biases and the head there are 11,433,832, and
11,048,832 without the head. Readings that fit the printed digit and have no support in the text (LayerScale, or the
patch embedding left out of the count) are not built, nor is sharing W_q alone or a single matrix for all four.
"""

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from tokenfusion.layers import TiedAttention, TiedFFN
from tokenfusion.models.checkpoints import CheckedModel
from tokenfusion.models.common import imagenet_cfg
from tokenfusion.models.factory import build

default_cfgs = generate_default_cfgs(
    {
        "vit_pe_small_patch16_224": imagenet_cfg(
            fixed_input_size=True,
            crop_pct=0.9,
            interpolation="bicubic",
            first_conv="patch_embed.proj",
            classifier="head",
        )
    }
)


class ViTPE(CheckedModel, VisionTransformer):
    """timm's VisionTransformer, whose checkpoints load completely or not at all."""

    def checkpoint_filter(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """As timm's: positions of another resolution are resized."""
        return checkpoint_filter_fn(super().checkpoint_filter(state_dict), self)


@register_model
def vit_pe_small_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-PE of the paper: timm's VisionTransformer of 12 layers, width 384 and 6 heads; its arguments in kwargs."""
    settings = {
        "patch_size": 16,
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "attn_layer": TiedAttention,
        "mlp_layer": TiedFFN,
    }
    return build(
        ViTPE,
        "vit_pe_small_patch16_224",
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **(settings | kwargs),
    )
