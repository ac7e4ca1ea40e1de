"""Small CrossViTs of timm for the tests."""

import copy

import torch
from timm.models import crossvit
from torch import nn

import tokenfusion

SIZES = {"240": 120, "408": 204}  # half the images of timm's models, by the end of their names


def small_crossvit(depth=((1, 2, 0), (1, 1, 2)), **options) -> crossvit.CrossVit:
    """Two encoders, with one and with two cross-attention blocks a branch, in 16 and 24 channels on 48 x 48 images."""
    torch.manual_seed(0)
    return crossvit.CrossVit(
        img_size=48,
        img_scale=(1.0, 1.0),
        patch_size=(12, 16),
        embed_dim=(16, 24),
        depth=depth,
        num_heads=(2, 3),
        mlp_ratio=(2.0, 2.0, 1.0),
        num_classes=10,
        **options,
    )


def fused_copy(model: nn.Module) -> nn.Module:
    fused = copy.deepcopy(model)
    tokenfusion.fuse(fused, strict=True)
    return fused


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its special initial value (zero biases, unit norms)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model
