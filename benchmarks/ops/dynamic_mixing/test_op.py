"""dynamic_mixing along the columns of square images, beside its authors' form in plain PyTorch."""

from functools import partial

import torch

from benchmarks.measure import problem
from benchmarks.measure.problem import Problem, Variant
from benchmarks.ops.dynamic_mixing import cases, plain
from tokenfusion.kernels import dynamic_mixing
from tokenfusion.kernels.dynamic_mixing import reference

CASES = cases.CASES
_DIM = 1


def test_op(case: cases.Case, run, request):
    run(_problem(case, with_compile=request.config.option.profile != "smoke"))


def _problem(case: cases.Case, with_compile: bool) -> Problem:
    op = partial(dynamic_mixing, segments=case.S, dim=_DIM)

    def authors(x, *weights):
        return plain.along(x, _DIM, lambda sequences: plain.mixed(sequences, *weights, segments=case.S))

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        tensor = scale * torch.randn(shape, device=problem.device())
        return tensor.to(case.torch_dtype).requires_grad_(case.backward)

    inputs_of_row = case.N * case.d
    weights = (
        random(case.S * case.d, case.D, scale=case.D**-0.5),
        random(case.S * case.d),
        random(case.N**2, inputs_of_row, scale=inputs_of_row**-0.5),
        random(case.N**2),
    )

    def call(function, parameters=weights):
        def of_tokens(x):
            return function(x, *parameters)

        return problem.forward_backward(of_tokens, parameters) if case.backward else problem.forward(of_tokens)

    def inputs():
        x = random(case.B, case.N, case.N, case.D)
        return (x, torch.randn_like(x)) if case.backward else (x,)

    exact = [weight.detach().double().requires_grad_(case.backward) for weight in weights]
    x = inputs()[0]
    compressed = x[..., : case.S * case.d]
    kernels = problem.backends_for("dynamic_mixing", x, compressed, *weights[2:], case.S, _DIM)
    variants = [Variant(problem.EAGER, call(authors))]
    if with_compile:
        variants.append(Variant(problem.COMPILED, call(problem.compiled(authors))))
    variants += [Variant(problem.package(backend), call(op), backend) for backend in kernels]
    return Problem(
        "dynamic_mixing, the op",
        case.sizes(),
        variants,
        inputs,
        call(partial(reference.dynamic_mixing, segments=case.S, dim=_DIM), exact),
        moved=case.moved(shared=sum(weight.numel() for weight in weights), outputs=1),
        written=True,
        flops=case.mixing_flops() + case.linear_flops(case.S * case.d),
    )
