"""What it costs that a fused module asks at every call whether it may run fused, where a call is short.

Batch 1 of CrossViT's CrossAttentionBlock: beside the fused block stands the same one without the question.
"""

import copy
from dataclasses import replace

import torch

from benchmarks.measure import problem
from benchmarks.measure.problem import TRAINING, Variant
from benchmarks.ops.single_query_attention.cases import Case
from benchmarks.ops.single_query_attention.layer import cross_attention_block, layer_problem
from tokenfusion import layers

_SIZES = ((1, 65, 96, 3), (1, 401, 384, 6))
CASES = {
    "smoke": [Case(*_SIZES[0])],
    "quick": [],
    "full": [Case(*sizes, direction=direction) for sizes in _SIZES for direction in ("forward", TRAINING)],
}


class Unguarded(layers.CrossAttentionBlock):
    def fuses(self, *tensors: torch.Tensor | None, kept: bool = False) -> bool:
        return True


def test_guard(case: Case, run, compiles):
    torch.manual_seed(0)
    layer = cross_attention_block(case)
    measured = layer_problem(
        layer,
        case,
        lambda: (torch.randn(case.B, case.N, case.C),),
        compiles=compiles,
        dense=8 * case.B * case.C**2,
    )
    unguarded = copy.deepcopy(layer)
    unguarded.__class__ = Unguarded
    call = problem.passes(unguarded, case.backward)
    guarded = [v for v in measured.variants if v.name == problem.package(v.backend)]
    without = [Variant(f"{v.name}, no guard", call, v.backend) for v in guarded]
    run(replace(measured, group="Drop-in guard, of one image", variants=[*measured.variants, *without]))
