"""dynamic_mixing along the columns of square images, beside its authors' form in plain PyTorch."""

import copy

import torch
from torch import nn

from benchmarks.measure import problem
from benchmarks.measure.problem import Problem
from benchmarks.ops.dynamic_mixing import cases
from tokenfusion.kernels import dynamic_mixing
from tokenfusion.kernels.dynamic_mixing import reference
from tokenfusion.models.dynamixer_reference import PlainOp

CASES = cases.CASES
_DIM = 1


class Columns(PlainOp):
    """The authors' operation on the columns of x [B, H, W, D], without the layer that follows."""

    def __init__(self, case: cases.Case):
        super().__init__(case.D, case.N, case.S, case.d)
        self.out = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = x.transpose(1, 2)
        return super().forward(columns.reshape(-1, *columns.shape[2:])).view(columns.shape).transpose(1, 2)


def test_op(case: cases.Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: cases.Case, compiles: tuple[str, ...]) -> Problem:
    torch.manual_seed(0)
    authors = Columns(case).to(problem.device(), case.torch_dtype).requires_grad_(case.backward)
    exact = list(copy.deepcopy(authors).double().parameters())
    weights = list(authors.parameters())

    def with_weights(function, weights=weights):
        return lambda x: function(x, *weights, segments=case.S, dim=_DIM)

    def timed(function):
        parameters = () if isinstance(function, nn.Module) else weights
        return problem.passes(function, case.backward, parameters)

    def inputs():
        x = torch.randn(case.B, case.N, case.N, case.D, device=problem.device(), dtype=case.torch_dtype)
        return (x.requires_grad_(), torch.randn_like(x)) if case.backward else (x,)

    x = inputs()[0]
    compressed = x[..., : case.S * case.d]
    backends = problem.backends_for("dynamic_mixing", x, compressed, *weights[2:], case.S, _DIM)
    fused = with_weights(dynamic_mixing)
    return Problem(
        "dynamic_mixing, the op",
        case.sizes(),
        problem.variants(timed, authors, fused, backends, compiles=compiles),
        inputs,
        problem.passes(with_weights(reference.dynamic_mixing, exact), case.backward, exact),
        moved=case.moved(shared=sum(weight.numel() for weight in weights), outputs=1),
        written=True,
        flops=case.mixing_flops() + case.linear_flops(case.S * case.d),
    )
