"""The registered Token Fusion models: the three methods of the paper, as its Table 1 compares them."""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from tokenfusion.models.common import imagenet_cfg
from tokenfusion.models.factory import build
from tokenfusion.models.token_fusion import TokenFusion
from tokenfusion.models.token_fusion_methods import EarlyTokenFusion, LateTokenFusion, LayerwiseTokenFusion

_CFG = imagenet_cfg(
    crop_pct=224 / 256, interpolation="bilinear", first_conv=("patch_embed.proj", "cnn.conv1"), classifier="head"
)
default_cfgs = generate_default_cfgs({f"token_fusion_{name}": _CFG for name in ("late", "early", "layerwise")})


def _token_fusion(model_class: type[TokenFusion], name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    out_indices = kwargs.pop("out_indices", 3)
    feature_cfg = {"out_indices": out_indices, "feature_cls": "getter"}
    return build(model_class, f"token_fusion_{name}", pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def token_fusion_late(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Late token fusion with a parallel structure."""
    return _token_fusion(LateTokenFusion, "late", pretrained, kwargs)


@register_model
def token_fusion_early(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Early token fusion."""
    return _token_fusion(EarlyTokenFusion, "early", pretrained, kwargs)


@register_model
def token_fusion_layerwise(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Token fusion layer by layer."""
    return _token_fusion(LayerwiseTokenFusion, "layerwise", pretrained, kwargs)
