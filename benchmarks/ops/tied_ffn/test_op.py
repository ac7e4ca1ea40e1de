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


def test_op(case: cases.Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: cases.Case, compiles: tuple[str, ...]) -> Problem:
    timed = partial(problem.passes, backward=case.backward)

    def inputs():
        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            tensor = (scale * torch.randn(shape, device=problem.device())).to(case.torch_dtype)
            return tensor.requires_grad_(case.backward)

        tensors = random(case.N, case.C), random(case.F, case.C, scale=case.C**-0.5), random(case.F), random(case.C)
        return (*tensors, random(case.N, case.C).detach()) if case.backward else tensors

    kernels = problem.kernels_for("tied_ffn", *inputs()[:4])
    formula, op = (partial(f, activation=case.activation) for f in (reference.tied_ffn, tied_ffn))
    others, holding = [], []
    if case.backward:
        others.append(Variant(problem.CHECKPOINTED, timed(partial(checkpoint, formula, use_reentrant=False))))
        held = timed(partial(op, recompute=False))
        holding = [Variant(f"{problem.package(backend)}, holding", held, backend) for backend in kernels]
    elif case.activation == "gelu_tanh" and problem.device() == "cuda":
        others.append(Variant(problem.EPILOGUE, timed(_with_epilogue)))
    return Problem(
        "tied_ffn, the op",
        case.sizes(),
        [*problem.variants(timed, formula, op, kernels, compiles=compiles, others=others), *holding],
        inputs,
        timed(formula),
        moved=case.moved(),
        written=True,
        flops=case.flops(),
    )


def _with_epilogue(x, weight, bias_in, bias_out):
    """Bias and tanh GELU in cuBLASLt's first product, which PyTorch has for inference."""
    activated = torch._addmm_activation(bias_in, x, weight.mT, use_gelu=True)
    return torch.addmm(bias_out, activated, weight)
