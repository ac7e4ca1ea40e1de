"""DynaMixer's block, without LayerNorm and channel MLP, as its authors run it and fused."""

import copy

import torch

from benchmarks.measure import problem
from benchmarks.measure.problem import Problem, Variant
from benchmarks.ops.dynamic_mixing import cases
from benchmarks.ops.dynamic_mixing.plain import PlainBlock
from tokenfusion import layers

CASES = cases.CASES


def test_layer(case: cases.Case, run, request):
    run(_problem(case, with_compile=request.config.option.profile != "smoke"))


def _problem(case: cases.Case, with_compile: bool) -> Problem:
    torch.manual_seed(0)
    fused = layers.DynaMixerBlock(case.D, case.N, case.S, case.d).train(case.backward).to(case.torch_dtype)
    fused = fused.to(problem.device())
    plain = copy.deepcopy(fused)
    plain.__class__ = PlainBlock
    exact = copy.deepcopy(plain).double()

    def call(function, module):
        if case.backward:
            return problem.forward_backward(function, module.parameters())
        return problem.forward(function)

    def inputs():
        x = torch.randn(case.B, case.N, case.N, case.D, device=problem.device(), dtype=case.torch_dtype)
        return (x.requires_grad_(), torch.randn_like(x)) if case.backward else (x,)

    x, generate = inputs()[0], fused.mix_h.generate
    compressed = x[..., : case.S * case.d]
    kernels = problem.kernels_for("dynamic_mixing", x, compressed, generate.weight, generate.bias, case.S, 1)
    variants = [Variant(problem.EAGER, call(plain, plain))]
    if with_compile:
        variants.append(Variant(problem.COMPILED, call(problem.compiled(plain), plain)))
    for backend in kernels:
        variants.append(Variant(problem.package(backend), call(fused, fused), backend))
        if with_compile:
            function = call(problem.compiled(fused), fused)
            variants.append(Variant(problem.package(backend) + problem.AND_COMPILE, function, backend))
    return Problem(
        "DynaMixerBlock, eager is the authors' form",
        case.sizes(),
        variants,
        inputs,
        call(exact, exact),
        moved=case.moved(shared=sum(p.numel() for p in fused.parameters()), outputs=1),
        written=True,
        flops=2 * case.mixing_flops() + case.linear_flops(2 * case.S * case.d) + 4 * case.linear_flops(case.D),
    )
