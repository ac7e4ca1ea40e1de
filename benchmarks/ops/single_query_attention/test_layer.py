"""CrossViT's CrossAttentionBlock as timm has it, and fused: LayerNorm, attention of the first token, projection."""

from functools import partial

import torch
from timm.models import crossvit
from torch import nn

from benchmarks.measure import problem
from benchmarks.ops.single_query_attention import cases
from benchmarks.ops.single_query_attention.layer import layer_problem
from benchmarks.ops.single_query_attention.projected import ProjectedBlock

CASES = cases.CASES


def test_layer(case: cases.Case, run, compiles):
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-6)
    measured = layer_problem(
        crossvit.CrossAttentionBlock(case.C, case.heads, qkv_bias=True, norm_layer=norm),
        case,
        lambda: (torch.randn(case.B, case.N, case.C),),
        compiles=compiles,
        dense=8 * case.B * case.C**2,  # query, absorbed query, values, projection
        others=[(problem.PROJECTIONS, ProjectedBlock)],
    )
    run(measured)
