"""CrossViT's CrossAttentionBlock as timm has it, and fused: LayerNorm, attention of the first token, projection."""

import copy
from functools import partial

import torch
from timm.models import crossvit
from torch import nn

import tokenfusion
from benchmarks import problem
from benchmarks.problem import Problem, Variant
from benchmarks.single_query_attention import cases
from benchmarks.single_query_attention.projected import ProjectedBlock

CASES = cases.CASES


def test_layer(case: cases.Case, run, request):
    run(_problem(case, with_compile=request.config.option.profile != "smoke"))


def _problem(case: cases.Case, with_compile: bool) -> Problem:
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=1e-6)
    block = crossvit.CrossAttentionBlock(case.C, case.heads, qkv_bias=True, norm_layer=norm).train(case.backward)
    exact = copy.deepcopy(block.to(case.torch_dtype)).double().to(problem.device())
    block = block.to(problem.device())
    projected, fused = copy.deepcopy(block), copy.deepcopy(block)
    projected.__class__ = ProjectedBlock
    tokenfusion.fuse(fused, strict=True)

    def call(function, module):
        if case.backward:
            return problem.forward_backward(function, module.parameters())
        return problem.forward(function)

    def inputs():
        x = torch.randn(case.B, case.N, case.C, device=problem.device(), dtype=case.torch_dtype)
        return (x.requires_grad_(), torch.randn_like(x[:, :1])) if case.backward else (x,)

    tokens = inputs()[0]
    kernels = problem.kernels_for("single_query_attention", tokens[:, : case.heads], tokens, None)
    variants = [Variant(problem.EAGER, call(block, block))]
    if with_compile:
        variants.append(Variant(problem.COMPILED, call(problem.compiled(block), block)))
    variants.append(Variant(problem.PROJECTIONS, call(projected, projected)))
    for backend in kernels:
        variants.append(Variant(problem.package(backend), call(fused, fused), backend))
        if with_compile:
            function = call(problem.compiled(fused), fused)
            variants.append(Variant(f"{problem.package(backend)} + compile", function, backend))
    products = 14 if case.backward else 4  # the op's
    return Problem(
        "CrossAttentionBlock, eager is timm's",
        case.sizes(),
        variants,
        inputs,
        call(exact, exact),
        moved=case.moved(shared=sum(p.numel() for p in block.parameters()), per_image=case.C),
        written=case.backward,
        flops=products * case.B * case.heads * case.N * case.C
        + (24 if case.backward else 8) * case.B * case.C**2,  # query, absorbed query, values, projection
    )
