"""Small settings of the package's models for the tests; a family that adds a name here joins the contract's tests."""

import torch
from torch import nn

import tokenfusion
from tests.crossvit import randomize

_CROSSVIT = {
    "img_size": 48,
    "img_scale": (1.0, 1.0),
    "embed_dim": (16, 24),
    "num_heads": (2, 3),
    "depth": ((1, 2, 0), (1, 1, 2)),
    "mlp_ratio": (2.0, 2.0),
    "num_classes": 10,
}
_NAME = "tokenfusion_crossvit_15_240"
_DYNAMIXER = {
    "img_size": 56,
    "layers": (1, 1, 1, 1),
    "embed_dims": (24, 48, 48, 48),
    "num_heads": (4, 8, 8, 8),
    "num_classes": 10,
}
TOKEN_FUSION = {
    "img_size": 64,
    "embed_dim": 24,
    "num_heads": 2,
    "depth": 6,
    "mlp_ratio": 2.0,
    "num_classes": 10,
    "cnn": "test_resnet",
    "pretrained_cnn": False,
}
_TRAINED = TOKEN_FUSION | {"train_cnn": True}

SMALL: dict[str, tuple[str, dict]] = {
    "crossvit": (_NAME, _CROSSVIT),
    "crossvit_dagger": ("tokenfusion_crossvit_15_dagger_240", _CROSSVIT),
    "crossvit_t2t": (_NAME, _CROSSVIT | {"tokenizer": "t2t"}),
    "crossvit_all_attention": (_NAME, _CROSSVIT | {"fusion": "all_attention"}),
    "crossvit_class_token": (_NAME, _CROSSVIT | {"fusion": "class_token"}),
    "crossvit_pairwise": (_NAME, _CROSSVIT | {"fusion": "pairwise"}),
    "crossvit_no_fusion": (_NAME, _CROSSVIT | {"fusion": "none"}),
    "crossvit_without_class_tokens": (_NAME, _CROSSVIT | {"class_token": False}),
    "crossvit_patches_8_16": (_NAME, _CROSSVIT | {"patch_size": (8, 16)}),
    "crossvit_equal_widths": (_NAME, _CROSSVIT | {"embed_dim": (24, 24), "num_heads": (3, 3)}),
    "crossvit_deep_small_branch": (_NAME, _CROSSVIT | {"depth": ((3, 1, 1), (0, 2, 0))}),
    "dynamixer": ("dynamixer_s", _DYNAMIXER),
    "dynamixer_random": ("dynamixer_s", _DYNAMIXER | {"generator": "random"}),
    "dynamixer_plain_sum": ("dynamixer_m", _DYNAMIXER | {"reweighting": False, "shared": True}),
    **{f"token_fusion_{name}": (f"token_fusion_{name}", _TRAINED) for name in ("late", "early", "layerwise")},
}
OTHER_POOL = {f"token_fusion_{name}": "mixing" for name in ("late", "early", "layerwise")}  # "avg" for the rest
FUSED_AFTER_BLOCKS = ("token_fusion_late",)

COMPILED = ("crossvit", "crossvit_pairwise")  # tracing takes some ten seconds a model


def small_model(key: str, **options) -> nn.Module:
    """The model in evaluation mode, its parameters random numbers of a fixed seed."""
    name, settings = SMALL[key]
    torch.manual_seed(0)
    return randomize(tokenfusion.create_model(name, **(settings | options))).eval()


def small_images(key: str, batch: int = 2, **options) -> torch.Tensor:
    size = (SMALL[key][1] | options)["img_size"]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
