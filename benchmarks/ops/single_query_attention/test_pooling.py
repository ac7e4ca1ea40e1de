"""Class attention and attention pooling as timm has them, and fused.

CaiT's class attention by itself and in its block with LayerScale and feed-forward network, VOLO's block, SigLIP's
pooling by a learned query with its feed-forward network, and the pooling of CLIP's ResNets, of NCHW feature maps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from timm.layers import AttentionPool2d, AttentionPoolLatent
from timm.models import cait, volo
from torch import nn

from benchmarks.ops.single_query_attention.cases import TRAINING, Case
from benchmarks.ops.single_query_attention.layer import layer_problem

_NORM = partial(nn.LayerNorm, eps=1e-6)


def _tokens(case: Case) -> tuple[torch.Tensor, ...]:
    return (torch.randn(case.B, case.N, case.C),)


def _tokens_and_class_token(case: Case) -> tuple[torch.Tensor, ...]:
    return torch.randn(case.B, case.N, case.C), torch.randn(case.B, 1, case.C)


def _feature_map(case: Case) -> tuple[torch.Tensor, ...]:
    side = round(case.N**0.5)
    return (torch.randn(case.B, case.C, side, side),)


@dataclass(frozen=True)
class Layer:
    """How to make a layer for a case, and its inputs; dense products of an image in units of C x C."""

    make: Callable[[Case], nn.Module]
    inputs: Callable[[Case], tuple[torch.Tensor, ...]]
    dense: int
    C: int
    heads: int

    def case(self, batch: int, length: int, *kind: str) -> Case:
        return Case(batch, length, self.C, self.heads, *kind)


LAYERS = {
    "ClassAttn": Layer(lambda c: cait.ClassAttn(c.C, c.heads, qkv_bias=True), _tokens, 8, 384, 8),
    "LayerScaleBlockClassAttn": Layer(
        lambda c: cait.LayerScaleBlockClassAttn(c.C, c.heads, qkv_bias=True, init_values=0.1, norm_layer=_NORM),
        _tokens_and_class_token,
        24,
        384,
        8,
    ),
    "ClassBlock": Layer(lambda c: volo.ClassBlock(c.C, c.heads), _tokens, 24, 384, 12),
    "AttentionPoolLatent": Layer(
        lambda c: AttentionPoolLatent(c.C, num_heads=c.heads, norm_layer=_NORM), _tokens, 20, 768, 12
    ),
    "AttentionPool2d": Layer(
        lambda c: AttentionPool2d(c.C, round(c.N**0.5), 1024, num_heads=c.heads, qkv_separate=True),
        _feature_map,
        7,
        2048,
        32,
    ),
}


class Named(NamedTuple):
    layer: str
    case: Case

    def __str__(self) -> str:
        return f"{self.layer}-{self.case}"


def _quick(layer: Layer) -> list[Case]:
    return [layer.case(1 if layer.C > 1024 else 8, 576)]


def _full(layer: Layer) -> list[Case]:
    batches = (1, 8) if layer.C > 1024 else (1, 8, 64)  # eager keeps queries, keys, values and outputs of all positions
    passes = [(dtype, direction) for dtype in ("float32", "bfloat16") for direction in ("forward", TRAINING)]
    lengths = [layer.case(8, n, *kind) for kind in passes for n in (196, 576, 1024, 4096)]
    sizes = [layer.case(b, n, *kind) for kind in passes for b in batches for n in (576, 1024)]
    return list(dict.fromkeys((*lengths, *sizes)))


def _gpu_full(layer: Layer) -> list[Case]:
    return [layer.case(64, 576, "bfloat16", direction) for direction in ("forward", TRAINING)]


def _smoke(layer: Layer) -> list[Case]:
    small = Case(2, 64, 64, 2)
    return [small, replace(small, direction=TRAINING)]


CASES = {
    profile: [Named(name, case) for name, layer in LAYERS.items() for case in cases_of(layer)]
    for profile, cases_of in (("smoke", _smoke), ("quick", _quick), ("full", _full), ("gpu-full", _gpu_full))
}
CASES["gpu"] = [case for case in CASES["gpu-full"] if case.layer == "AttentionPoolLatent" and not case.case.backward]


def test_pooling(case: Named, run, compiles):
    torch.manual_seed(0)
    layer, sizes = LAYERS[case.layer], case.case
    measured = layer_problem(
        layer.make(sizes),
        sizes,
        lambda: layer.inputs(sizes),
        compiles=compiles,
        dense=layer.dense * sizes.B * sizes.C**2,
    )
    run(measured)
