"""The registered CrossViTs: Tables 1, 2 and 4 of arXiv:2103.14899.

timm groups models by the base name of the file that registers them: one named crossvit.py would join timm's own group.
Names give the pixels of the small branch, as timm's do, and the paper those of the large one: 240 is its 224, 408 its
384 and 504 its 480.
"""

import dataclasses
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from timm.models._pretrained import PretrainedCfg
from torch import nn

from tokenfusion.models.crossvit import CrossViT
from tokenfusion.models.factory import build

_SIZES = {  # Table 1: widths of the small and the large branch, heads, M, r
    "tiny": ((96, 192), 3, 4, 4),
    "small": ((192, 384), 6, 4, 4),
    "base": ((384, 768), 12, 4, 4),
    "9": ((128, 256), 4, 3, 3),
    "15": ((192, 384), 6, 5, 3),
    "18": ((224, 448), 7, 6, 3),
}
_LARGE_BRANCH = {240: 224, 408: 384, 504: 480}  # pixels of the large branch for those of the small one
_OF_TIMM = ("tiny_240", "small_240", "base_240", "9_240", "15_240", "18_240")
_OF_TIMM += ("9_dagger_240", "15_dagger_240", "18_dagger_240", "15_dagger_408", "18_dagger_408")


def _cfg(name: str, **changes: Any) -> PretrainedCfg:
    """timm's configuration of its crossvit_<name>: its hub repository, mean and deviation, crop, classifier."""
    return dataclasses.replace(timm.get_pretrained_cfg(f"crossvit_{name}.in1k"), **changes)


default_cfgs = generate_default_cfgs(
    {f"tokenfusion_crossvit_{name}.in1k": _cfg(name) for name in _OF_TIMM}
    | {"tokenfusion_crossvit_18_dagger_504": _cfg("18_dagger_408", hf_hub_id=None, input_size=(3, 504, 504))}
)


def _crossvit(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    size, *dagger, pixels = name.split("_")
    embed_dim, heads, blocks, ratio = _SIZES[size]
    config = {
        "img_scale": (1.0, _LARGE_BRANCH[int(pixels)] / int(pixels)),
        "embed_dim": embed_dim,
        "depth": ((1, blocks, 0),) * 3,
        "num_heads": (heads, heads),
        "mlp_ratio": (ratio, ratio),
        "tokenizer": "multi_conv" if dagger else "conv",
    } | kwargs
    encoders = len(config["depth"])
    out_indices = config.pop("out_indices", (encoders - 1, 2 * encoders - 1))  # the last of each branch
    feature_cfg = {"out_indices": out_indices, "feature_cls": "getter"}
    return build(CrossViT, f"tokenfusion_crossvit_{name}", pretrained, feature_cfg=feature_cfg, **config)


@register_model
def tokenfusion_crossvit_tiny_240(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-Ti."""
    return _crossvit("tiny_240", pretrained, kwargs)


@register_model
def tokenfusion_crossvit_small_240(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-S."""
    return _crossvit("small_240", pretrained, kwargs)


@register_model
def tokenfusion_crossvit_base_240(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-B."""
    return _crossvit("base_240", pretrained, kwargs)


@register_model
def tokenfusion_crossvit_9_240(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-9."""
    return _crossvit("9_240", pretrained, kwargs)


@register_model
def tokenfusion_crossvit_15_240(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-15."""
    return _crossvit("15_240", pretrained, kwargs)


@register_model
def tokenfusion_crossvit_18_240(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-18."""
    return _crossvit("18_240", pretrained, kwargs)


@register_model
def tokenfusion_crossvit_9_dagger_240(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-9†."""
    return _crossvit("9_dagger_240", pretrained, kwargs)


@register_model
def tokenfusion_crossvit_15_dagger_240(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-15†."""
    return _crossvit("15_dagger_240", pretrained, kwargs)


@register_model
def tokenfusion_crossvit_18_dagger_240(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-18†."""
    return _crossvit("18_dagger_240", pretrained, kwargs)


@register_model
def tokenfusion_crossvit_15_dagger_408(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-15† @384."""
    return _crossvit("15_dagger_408", pretrained, kwargs)


@register_model
def tokenfusion_crossvit_18_dagger_408(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-18† @384."""
    return _crossvit("18_dagger_408", pretrained, kwargs)


@register_model
def tokenfusion_crossvit_18_dagger_504(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossViT-18† @480."""
    return _crossvit("18_dagger_504", pretrained, kwargs)
