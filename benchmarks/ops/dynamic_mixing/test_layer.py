"""DynaMixer's block, without LayerNorm and channel MLP, as its authors run it and fused."""

import copy
from functools import partial

import torch

from benchmarks.measure import problem
from benchmarks.measure.problem import Problem
from benchmarks.ops.dynamic_mixing import cases
from tokenfusion import layers
from tokenfusion.models.dynamixer_reference import PlainBlock

CASES = cases.OF_BLOCK


def test_layer(case: cases.Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: cases.Case, compiles: tuple[str, ...]) -> Problem:
    torch.manual_seed(0)
    sizes = case.D, case.N, case.S, case.d
    fused, plain = (kind(*sizes).train(case.backward) for kind in (layers.DynaMixerBlock, PlainBlock))
    plain.load_state_dict(fused.state_dict())
    fused, plain = (module.to(problem.device(), case.torch_dtype) for module in (fused, plain))
    exact = copy.deepcopy(plain).double()

    def inputs():
        x = torch.randn(case.B, case.N, case.N, case.D, device=problem.device(), dtype=case.torch_dtype)
        return (x.requires_grad_(), torch.randn_like(x)) if case.backward else (x,)

    x, generate = inputs()[0], fused.mix_h.generate
    compressed = x[..., : case.S * case.d]
    kernels = problem.kernels_for("dynamic_mixing", x, compressed, generate.weight, generate.bias, case.S, 1)
    timed = partial(problem.passes, backward=case.backward)
    return Problem(
        "DynaMixerBlock, eager is the authors' form",
        case.sizes(),
        problem.variants(timed, plain, fused, kernels, compiles=compiles),
        inputs,
        timed(exact),
        moved=case.moved(shared=sum(p.numel() for p in fused.parameters()), outputs=1),
        written=True,
        flops=2 * case.mixing_flops() + case.linear_flops(2 * case.S * case.d) + 4 * case.linear_flops(case.D),
    )
