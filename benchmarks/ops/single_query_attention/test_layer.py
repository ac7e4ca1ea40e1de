"""CrossViT's CrossAttentionBlock as timm has it, and fused: LayerNorm, attention of the first token, projection."""

import torch

from benchmarks.measure import problem
from benchmarks.ops.single_query_attention import cases
from benchmarks.ops.single_query_attention.layer import cross_attention_block, layer_problem
from benchmarks.ops.single_query_attention.projected import ProjectedBlock

CASES = cases.OF_BLOCK


def test_layer(case: cases.Case, run, compiles):
    torch.manual_seed(0)
    measured = layer_problem(
        cross_attention_block(case),
        case,
        lambda: (torch.randn(case.B, case.N, case.C),),
        compiles=compiles,
        dense=8 * case.B * case.C**2,  # query, absorbed query, values, projection
        others=[(problem.PROJECTIONS, ProjectedBlock)],
    )
    run(measured)
