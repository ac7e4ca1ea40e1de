"""What it costs that a fused nn.ConvTranspose2d waits for what is done with its result, where a call is short.

torch.cat with a skip connection follows, and both are one operator: beside the fused layer stands that operator, called
by a layer that knows the skip connection.
"""

import copy

import torch
from torch import nn

import tokenfusion
from benchmarks.measure import problem
from benchmarks.measure.problem import TRAINING, Problem, Variant
from benchmarks.ops.upconv.cases import Case
from tokenfusion import layers

_SIZES = ((1, 64, 64, 64, 16, 2), (1, 128, 128, 128, 32, 2))  # the least that is deferred, and a middle one
CASES = {
    "smoke": [Case(*_SIZES[0])],
    "quick": [],
    "full": [Case(*sizes, direction=direction) for sizes in _SIZES for direction in ("forward", TRAINING)],
}


class Joined(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.up = nn.ConvTranspose2d(case.Cin, case.Cout, case.k, case.k)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.up(x), skip), dim=1)


def test_deferred(case: Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: Case, compiles: tuple[str, ...]) -> Problem:
    torch.manual_seed(0)
    plain = Joined(case).to(problem.device(), case.torch_dtype)
    exact, fused = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    tokenfusion.fuse(fused, strict=True)
    direct = layers.UpConvConcat(case.Cin, case.Cout, case.k).to(problem.device(), case.torch_dtype)
    direct.load_state_dict(plain.up.state_dict())

    def timed(function):
        return problem.passes(function, case.backward)

    def random(channels: int, size: int) -> torch.Tensor:
        return torch.randn(case.B, channels, size, size, device=problem.device(), dtype=case.torch_dtype)

    def inputs() -> tuple[torch.Tensor, ...]:
        fine = case.k * case.size
        tensors = random(case.Cin, case.size), random(case.Cs, fine)
        if not case.backward:
            return tensors
        return *(tensor.requires_grad_() for tensor in tensors), random(case.channels, fine)

    kernels = problem.kernels_for("upconv_concat", inputs()[0], plain.up.weight)
    compiles = [name for name in compiles if name == "eager"]  # of which a compiled fused layer is the equal
    return Problem(
        "Deferred result, nn.ConvTranspose2d before torch.cat",
        case.sizes(),
        [
            *problem.variants(timed, plain, fused, kernels, compiles=compiles),
            *(Variant(f"{problem.package(name)}, not deferred", timed(direct), name) for name in kernels),
        ],
        inputs,
        timed(exact),
        moved=case.moved(),
        written=True,
        flops=case.flops(),
    )
