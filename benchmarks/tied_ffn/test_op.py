"""tied_ffn beside the same formula in plain PyTorch, which does and holds what two linear layers do and hold."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks import problem
from benchmarks.problem import Problem, Variant
from benchmarks.tied_ffn import cases
from tokenfusion.kernels import tied_ffn
from tokenfusion.kernels.tied_ffn import reference

CASES = cases.CASES


def test_op(case: cases.Case, run, request):
    run(_problem(case, with_compile=request.config.option.profile != "smoke"))


def _problem(case: cases.Case, with_compile: bool) -> Problem:
    call = problem.forward_backward if case.backward else problem.forward

    def inputs():
        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            tensor = (scale * torch.randn(shape, device=problem.device())).to(case.torch_dtype)
            return tensor.requires_grad_(case.backward)

        tensors = random(case.N, case.C), random(case.F, case.C, scale=case.C**-0.5), random(case.F), random(case.C)
        return (*tensors, random(case.N, case.C).detach()) if case.backward else tensors

    kernels = problem.kernels_for("tied_ffn", *inputs()[:4])
    variants = [Variant(problem.EAGER, call(reference.tied_ffn))]
    if with_compile:
        variants.append(Variant(problem.COMPILED, call(problem.compiled(reference.tied_ffn))))
    if case.backward:
        checkpointed = partial(checkpoint, reference.tied_ffn, use_reentrant=False)
        variants.append(Variant(problem.CHECKPOINTED, call(checkpointed)))
    for backend in kernels:
        variants.append(Variant(problem.package(backend), call(tied_ffn), backend))
        if case.backward:
            holding = call(partial(tied_ffn, recompute=False))
            variants.append(Variant(f"{problem.package(backend)}, holding", holding, backend))
    return Problem(
        "tied_ffn, the op",
        case.sizes(),
        variants,
        inputs,
        call(reference.tied_ffn),
        moved=case.moved(),
        written=True,
        flops=case.flops(),
    )
