"""The registered DynaMixers: Table 1 of arXiv:2201.12083, stage by stage as in the official code.

The paper counts the stages of one resolution as one. It trains with a drop_path_rate of 0.1, L with 0.3.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from tokenfusion.models.common import imagenet_cfg
from tokenfusion.models.dynamixer import DynaMixer
from tokenfusion.models.factory import build

_CFG = imagenet_cfg(
    fixed_input_size=True, crop_pct=0.9, interpolation="bicubic", first_conv="patch_embed.proj", classifier="head"
)
default_cfgs = generate_default_cfgs(
    {"dynamixer_s": _CFG, "dynamixer_m": _CFG, "dynamixer_l": _CFG | {"crop_pct": 0.875}}
)


def _dynamixer(name: str, pretrained: bool, config: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    config = config | kwargs
    out_indices = config.pop("out_indices", tuple(range(len(config["layers"]))))
    feature_cfg = {"out_indices": out_indices, "feature_cls": "getter"}
    return build(DynaMixer, name, pretrained, feature_cfg=feature_cfg, **config)


@register_model
def dynamixer_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DynaMixer-S."""
    config = dict(layers=(4, 3, 8, 3), embed_dims=(192, 384, 384, 384), num_heads=(8, 16, 16, 16))
    return _dynamixer("dynamixer_s", pretrained, config, kwargs)


@register_model
def dynamixer_m(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DynaMixer-M."""
    config = dict(layers=(4, 3, 14, 3), embed_dims=(256, 256, 512, 512), transitions=(False, True, False, False))
    config |= dict(num_heads=(8, 8, 16, 16))
    return _dynamixer("dynamixer_m", pretrained, config, kwargs)


@register_model
def dynamixer_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DynaMixer-L."""
    config = dict(layers=(8, 8, 16, 4), embed_dims=(256, 512, 512, 512), num_heads=(8, 16, 16, 16), reduced_dims=8)
    return _dynamixer("dynamixer_l", pretrained, config, kwargs)
