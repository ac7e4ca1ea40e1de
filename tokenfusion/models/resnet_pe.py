"""ResNet50-PE: ResNet-50 whose stages have one matrix for all their 1x1 convolutions.

Koyun and Töreyin 2024, Eq. 6 to 9.

The paper gives 12.8 M parameters with all stages tied (PE1) and 13.4 M with the last two (PE2). One family of
structures fits both: in a tied stage W is all the 1x1 weight there is, first block and its shortcut included, 3x3
convolutions and norms are each block's own, and the classifier is not counted. That makes 12,764,736 and 13,409,344
parameters, with the classifier 14,813,736 and 15,458,344. How a first block gets by without a convolution on its
shortcut is not said; here its input's channels are repeated (`TiedBottleneck`). Not built: channels padded with zeros,
a shortcut of tiled W^T, a norm on the shortcut (12,772,416 and 13,415,488), and the readings that do not fit, with the
first block's convolutions of their own (16.2 M and 16.7 M) or a shared 3x3 convolution (10.1 M and 11.1 M).
"""

from collections.abc import Collection
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from tokenfusion.layers import TiedStage
from tokenfusion.models.checkpoints import CheckedModel
from tokenfusion.models.common import imagenet_cfg
from tokenfusion.models.factory import build

_CFG = imagenet_cfg(pool_size=(7, 7), crop_pct=0.875, interpolation="bilinear", first_conv="conv1", classifier="fc")
default_cfgs = generate_default_cfgs({"resnet50_pe1": _CFG, "resnet50_pe2": _CFG})


class ResNetPE(CheckedModel, ResNet):
    """timm's ResNet of Bottleneck blocks, with some of its stages replaced by a TiedStage.

    Args:
        tied_stages: numbers from 1 to 4, of layer1 to layer4.
        kwargs: of timm's ResNet.
    """

    def __init__(
        self, layers: tuple[int, ...] = (3, 4, 6, 3), tied_stages: Collection[int] = (1, 2, 3, 4), **kwargs: Any
    ):
        if not set(tied_stages) <= {1, 2, 3, 4}:
            raise ValueError(f"tied_stages: got {tied_stages!r}, expected numbers from 1 to 4")
        super().__init__(Bottleneck, layers, **kwargs)
        for stage in tied_stages:
            setattr(self, f"layer{stage}", TiedStage.of(getattr(self, f"layer{stage}")))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns of parameter names, with the matrix of a tied stage in the group of its first block."""
        tied = [(r"^layer(\d+)\.blocks\.(\d+)", None), (r"^layer(\d+)\.weight", (0,))]
        blocks = r"^layer(\d+)" if coarse else [*tied, (r"^layer(\d+)\.(\d+)", None)]
        return super().group_matcher(coarse) | {"blocks": blocks}


@register_model
def resnet50_pe1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet50-PE1: all four stages tied."""
    return build(ResNetPE, "resnet50_pe1", pretrained, **kwargs)


@register_model
def resnet50_pe2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet50-PE2: the last two stages tied, those of 14 x 14 and 7 x 7 pixels."""
    return build(ResNetPE, "resnet50_pe2", pretrained, **({"tied_stages": (3, 4)} | kwargs))
