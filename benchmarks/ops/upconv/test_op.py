"""Up-convolutions and the skip connection that follows, as one operator and as PyTorch's.

Joined to the skip connection, joined and projected by a 1x1 convolution, and added to it.
"""

import torch

from benchmarks.measure import problem
from benchmarks.measure.problem import Problem
from benchmarks.ops.upconv import cases
from tokenfusion.kernels import upconv_add, upconv_concat, upconv_concat_project
from tokenfusion.kernels.upconv import reference

CASES = cases.CASES


def test_op(case: cases.Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: cases.Case, compiles: tuple[str, ...]) -> Problem:
    op = _operator(case)
    definition = getattr(reference, op.__name__)

    def timed(function):
        def with_all(x, weight, bias, *rest):
            return function(x, weight, bias, *(rest if case.Cs else (None, *rest)))

        return problem.passes(with_all, case.backward)

    def random(*shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, device=problem.device(), dtype=case.torch_dtype)
        return tensor.contiguous(memory_format=case.memory_format) if len(shape) == 4 else tensor

    def inputs() -> tuple[torch.Tensor, ...]:
        fine = case.k * case.size
        tensors = [random(case.B, case.Cin, case.size, case.size)]
        tensors.append(random(case.Cin, case.Cout, case.k, case.k).mul_(case.Cin**-0.5))
        tensors.append(random(case.Cout))
        if case.Cs:
            tensors.append(random(case.B, case.Cs, fine, fine))
        if case.Cp:
            joined = case.Cout + case.Cs
            tensors += [random(case.Cp, joined).mul_(joined**-0.5), random(case.Cp)]
        tensors = [tensor.requires_grad_(case.backward) for tensor in tensors]
        return (*tensors, random(case.B, case.channels, fine, fine)) if case.backward else tuple(tensors)

    registered = "upconv_concat" if op is upconv_concat else "upconv_concat_project"  # which is that of upconv_add, too
    kernels = problem.kernels_for(registered, *inputs()[:2])
    return Problem(
        f"{op.__name__}, the op",
        case.sizes(),
        problem.variants(timed, definition, op, kernels, compiles=compiles),
        inputs,
        timed(definition),
        moved=case.moved(),
        written=True,
        flops=case.flops(),
    )


def _operator(case: cases.Case):
    if isinstance(case, cases.Added):
        return upconv_add
    return upconv_concat_project if case.Cp else upconv_concat
