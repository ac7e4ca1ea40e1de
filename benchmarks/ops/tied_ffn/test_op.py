"""tied_ffn beside the same formula in plain PyTorch, which does and holds what two linear layers do and hold."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import problem
from benchmarks.measure.problem import Problem, Variant
from benchmarks.ops.tied_ffn import cases
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
    formula, op = (partial(f, activation=case.activation) for f in (reference.tied_ffn, tied_ffn))
    variants = [Variant(problem.EAGER, call(formula))]
    if with_compile:
        variants.append(Variant(problem.COMPILED, call(problem.compiled(formula))))
    if case.backward:
        checkpointed = partial(checkpoint, formula, use_reentrant=False)
        variants.append(Variant(problem.CHECKPOINTED, call(checkpointed)))
    elif case.activation == "gelu_tanh" and problem.device() == "cuda":
        variants.append(Variant(problem.EPILOGUE, call(_with_epilogue)))
    for backend in kernels:
        variants.append(Variant(problem.package(backend), call(op), backend))
        if case.backward:
            holding = call(partial(op, recompute=False))
            variants.append(Variant(f"{problem.package(backend)}, holding", holding, backend))
    return Problem(
        "tied_ffn, the op",
        case.sizes(),
        variants,
        inputs,
        call(formula),
        moved=case.moved(),
        written=True,
        flops=case.flops(),
    )


def _with_epilogue(x, weight, bias_in, bias_out):
    """Bias and tanh GELU in cuBLASLt's first product, which PyTorch has for inference."""
    activated = torch._addmm_activation(bias_in, x, weight.mT, use_gelu=True)
    return torch.addmm(bias_out, activated, weight)
