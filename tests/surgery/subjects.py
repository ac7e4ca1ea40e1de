"""A tiny model around each kind of module that fuse knows, for tests that change it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import AttentionPool2d, AttentionPoolLatent
from timm.models import cait, crossvit, volo, xcit
from torch import nn

from tests.crossvit import randomize
from tests.surgery import poolings
from tokenfusion.models.dynamixer_reference import PlainBlock, PlainOp


class Model(nn.Module):
    """A module called in its own way with one tensor."""

    def __init__(self, module: nn.Module, call: Callable):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.module, x)


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 3, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.up(x), F.interpolate(x, scale_factor=2.0)), dim=1)


@dataclass(frozen=True)
class Subject:
    """Names are those of parts of the module: the one that holds the heads, and parts that are read past.

    others are called, and checked, too. read are linear layers that the plain module does not call either: it reads
    their weights.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    linears: tuple[str, ...]
    attn: str | None = None
    norm: str | None = None
    dropout: str | None = None
    others: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    fused: str = ""
    call: Callable = nn.Module.__call__

    def model(self) -> Model:
        torch.manual_seed(0)
        return randomize(Model(self.make(), self.call))

    def inputs(self) -> torch.Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1))

    @property
    def weighted(self) -> tuple[str, ...]:
        """The linear layers that are not called, in the fused form or in either."""
        return self.linears + self.read

    @property
    def parts(self) -> tuple[str, ...]:
        """All of them by their names in the model, the fused module among them."""
        found = (self.fused, self.attn, *self.weighted, self.norm, self.dropout, *self.others)
        names = dict.fromkeys(name for name in found if name is not None)
        return tuple(f"module.{name}".rstrip(".") for name in names)


def _two_branches(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cat(module([x[..., :16], x[..., 16:]]), dim=-1)


def _patches_and_class(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x[:, 1:], x[:, :1])


def _class_and_patches(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    patches = x[:, 1:]
    return module(x[:, :1], patches, patches, need_weights=False)[0]


def _with_weights(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    patches = x[:, 1:]
    return torch.cat([result.flatten(1) for result in module(x[:, :1], patches, patches)], dim=1)


def _first_over_others(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x[:, :1], x[:, 1:])


def _first_over_all(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x[:, :1], x[:, 1:], kv_include_self=True)


_CLASS_ATTENTION = dict(attn="attn", norm="norm1", dropout="attn.attn_drop")
_HEADS = dict(num_heads=4, qkv_bias=True)
SUBJECTS = {
    "CrossViT block": Subject(
        lambda: crossvit.CrossAttentionBlock(16, **_HEADS),
        (3, 6, 16),
        ("attn.wk", "attn.wv"),
        others=("attn.wq", "attn.proj", "drop_path"),
        **_CLASS_ATTENTION,
    ),
    "CrossViT stage": Subject(
        lambda: crossvit.MultiScaleBlock((16, 24), (5, 5), (1, 1, 1), (4, 4), (1.0, 1.0, 1.0), True, drop_path=[0.0]),
        (3, 6, 40),
        ("fusion.1.0.attn.wk", "fusion.1.0.attn.wv"),
        attn="fusion.1.0.attn",
        norm="fusion.1.0.norm1",
        dropout="fusion.1.0.attn.attn_drop",
        others=("blocks", "blocks.0", "blocks.0.0", "blocks.0.0.norm1", "projs.0", "fusion", "fusion.1", "fusion.1.0"),
        call=_two_branches,
    ),
    "CaiT block": Subject(
        lambda: cait.LayerScaleBlockClassAttn(16, **_HEADS, mlp_ratio=1.0, init_values=0.5),
        (3, 6, 16),
        ("attn.k", "attn.v"),
        others=("attn.q", "attn.proj", "mlp", "norm2", "drop_path"),
        call=_patches_and_class,
        **_CLASS_ATTENTION,
    ),
    "CaiT attention": Subject(
        lambda: cait.ClassAttn(16, **_HEADS), (3, 6, 16), ("k", "v"), attn="", dropout="attn_drop", others=("q", "proj")
    ),
    "XCiT": Subject(
        lambda: xcit.ClassAttentionBlock(16, **_HEADS, mlp_ratio=1.0),
        (3, 6, 16),
        ("attn.k", "attn.v"),
        attn="attn",
        dropout="attn.attn_drop",
        fused="attn",
    ),
    "VOLO block": Subject(
        lambda: volo.ClassBlock(16, **_HEADS, mlp_ratio=1.0),
        (3, 6, 16),
        ("attn.kv",),
        others=("attn.q", "attn.proj", "mlp", "norm2", "drop_path1"),
        **_CLASS_ATTENTION,
    ),
    "VOLO attention": Subject(
        lambda: volo.ClassAttention(16, **_HEADS),
        (3, 6, 16),
        ("kv",),
        attn="",
        dropout="attn_drop",
        others=("q", "proj"),
    ),
    "latent pooling": Subject(
        lambda: AttentionPoolLatent(16, **_HEADS, feat_size=6, pos_embed="abs", norm_layer=nn.LayerNorm, mlp_ratio=1.0),
        (3, 6, 16),
        ("kv",),
        attn="",
        others=("q", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp"),
    ),
    "map pooling": Subject(
        lambda: AttentionPool2d(16, feat_size=2, **_HEADS), (3, 16, 2, 2), ("qkv",), attn="", others=("drop", "proj")
    ),
    "map pooling, separate": Subject(
        lambda: AttentionPool2d(16, feat_size=2, **_HEADS, qkv_separate=True, class_token=True),
        (3, 16, 3, 2),
        ("q", "k", "v"),
        attn="",
        others=("drop", "proj"),
    ),
    "torch's attention": Subject(
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        (3, 6, 16),
        (),
        attn="",
        read=("out_proj",),
        call=_class_and_patches,
    ),
    "torch's attention with its weights": Subject(
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        (3, 6, 16),
        (),
        attn="",
        read=("out_proj",),
        call=_with_weights,
    ),
    "DynaMixer block": Subject(
        lambda: PlainBlock(16, (3, 2), 4, 2),
        (2, 3, 2, 16),
        ("mix_h.compress", "mix_w.generate", "mix_h.out", "mlp_c", "proj"),
        attn="mix_h",
        others=("reweight", "reweight.fc1"),
    ),
    "DynaMixer operation": Subject(
        lambda: PlainOp(16, 5, 4, 2), (3, 5, 16), ("compress", "generate"), attn="", others=("out",)
    ),
    "attention found, two tensors": Subject(
        lambda: poolings.Cross(16, 4),
        (3, 6, 16),
        ("kv",),
        attn="",
        others=("q", "proj"),
        call=_first_over_others,
    ),
    "attention found, a context": Subject(
        lambda: poolings.Context(16, 4, 4, dropout=0.0, bias=True),
        (3, 6, 16),
        ("to_kv",),
        attn="",
        dropout="dropout",
        others=("norm", "attend", "to_q", "to_out", "to_out.0"),
        call=_first_over_all,
    ),
    "pooling found, a BatchNorm": Subject(
        lambda: poolings.Pool(16, 4, bias=True), (3, 6, 16), ("k", "v"), attn="", others=("bn", "linear")
    ),
    "pooling found, no keys": Subject(lambda: poolings.Vectors(16), (3, 6, 16), (), norm="ln", others=("fc",)),
    "up-convolution": Subject(Up, (2, 4, 3, 3), ("up",), fused="up"),
}
