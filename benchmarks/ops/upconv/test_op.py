"""upconv_concat and upconv_concat_project beside transposed convolution, concatenation and 1x1 convolution."""

import torch

from benchmarks.measure import problem
from benchmarks.measure.problem import Problem, Variant
from benchmarks.ops.upconv import cases
from tokenfusion.kernels import upconv_concat, upconv_concat_project
from tokenfusion.kernels.upconv_concat import reference
from tokenfusion.kernels.upconv_concat_project import reference as project_reference

CASES = {profile: [*cases.CASES[profile], *cases.PROJECTED[profile]] for profile in cases.CASES}


def test_op(case: cases.Case, run, request):
    run(_problem(case, with_compile=request.config.option.profile != "smoke"))


def _problem(case: cases.Case, with_compile: bool) -> Problem:
    name = "upconv_concat_project" if case.Cp else "upconv_concat"
    op, definition = (
        (upconv_concat_project, project_reference.upconv_concat_project)
        if case.Cp
        else (upconv_concat, reference.upconv_concat)
    )

    def call(function):
        def with_all(*tensors):
            x, weight, bias, *rest = tensors
            skip = rest.pop(0) if case.Cs else None
            return function(x, weight, bias, skip, *rest)

        return (problem.forward_backward if case.backward else problem.forward)(with_all)

    def random(*shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, device=problem.device(), dtype=case.torch_dtype)
        return tensor.contiguous(memory_format=case.memory_format) if len(shape) == 4 else tensor

    def inputs() -> tuple[torch.Tensor, ...]:
        fine, joined = case.k * case.size, case.Cout + case.Cs
        tensors = [random(case.B, case.Cin, case.size, case.size)]
        tensors.append(random(case.Cin, case.Cout, case.k, case.k).mul_(case.Cin**-0.5))
        tensors.append(random(case.Cout))
        if case.Cs:
            tensors.append(random(case.B, case.Cs, fine, fine))
        if case.Cp:
            tensors += [random(case.Cp, joined).mul_(joined**-0.5), random(case.Cp)]
        tensors = [tensor.requires_grad_(case.backward) for tensor in tensors]
        return (*tensors, random(case.B, case.Cp or joined, fine, fine)) if case.backward else tuple(tensors)

    variants = [Variant(problem.EAGER, call(definition))]
    if with_compile:
        variants.append(Variant(problem.COMPILED, call(problem.compiled(definition))))
    for backend in problem.kernels_for(name, *inputs()[:2]):
        variants.append(Variant(problem.package(backend), call(op), backend))
    return Problem(
        f"{name}, the op",
        case.sizes(),
        variants,
        inputs,
        call(definition),
        moved=case.moved(),
        written=True,
        flops=case.flops(),
    )
