"""A small model of each of timm's families in which fuse knows a module."""

import dataclasses

import timm
import torch
from timm.models import byobnet, volo
from torch import nn

from tests.crossvit import randomize

_TRANSFORMER = dict(embed_dim=32, depth=1, num_heads=4, num_classes=10)
_FAMILIES = {
    "cait": (lambda **o: timm.create_model("cait_xxs24_224", img_size=64, **_TRANSFORMER, init_values=0.1, **o), 64),
    "xcit": (lambda **o: timm.create_model("xcit_nano_12_p16_224", img_size=64, **_TRANSFORMER, **o), 64),
    "volo": (lambda **o: _volo(**o), 64),
    "siglip": (lambda **o: timm.create_model("vit_base_patch16_siglip_224", img_size=64, **_TRANSFORMER, **o), 64),
    "pe": (lambda **o: timm.create_model("vit_pe_core_base_patch16_224", img_size=64, **_TRANSFORMER, **o), 64),
    "naflex": (lambda **o: timm.create_model("naflexvit_base_patch16_siglip", **_TRANSFORMER, **o), 64),
    "clip resnet": (lambda **o: _clip_resnet("attn_abs", **o), 96),
    "rotary resnet": (lambda **o: _clip_resnet("attn_rot", **o), 96),
}
FAMILIES = tuple(family for family in _FAMILIES if family != "rotary resnet")


def small_model(family: str, **options) -> nn.Module:
    torch.manual_seed(0)
    make, _ = _FAMILIES[family]
    return randomize(make(**options))


def images(family: str, batch: int = 2) -> torch.Tensor:
    _, size = _FAMILIES[family]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def _volo(**options) -> nn.Module:
    sizes = dict(layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), num_heads=(2, 4, 4, 4), stem_hidden_dim=8)
    return volo.VOLO(img_size=64, num_classes=10, **sizes, **options)


def _clip_resnet(head_type: str, **options) -> nn.Module:
    blocks = tuple(byobnet.ByoBlockCfg(type="bottle", d=1, c=c, s=2, br=0.25) for c in (16, 32, 32, 128))
    config = dataclasses.replace(byobnet.model_cfgs["resnet50_clip"], blocks=blocks, stem_chs=8, head_type=head_type)
    return byobnet.ByobNet(config, img_size=96, num_classes=10, **options)
