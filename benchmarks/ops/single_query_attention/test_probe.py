"""A training step of an attentive probe on frozen tokens, and of the pooling of a long bag: the operator is all of it.

One learned query, torch's own nn.MultiheadAttention as people call it, which is with need_weights, and a classifier.
The tokens need no gradient.
"""

import copy

import torch
from torch import nn

import tokenfusion
from benchmarks.measure import problem
from benchmarks.measure.problem import TRAINING, Problem
from benchmarks.ops.single_query_attention.cases import Case

_CLASSES = 100
_SIZES = ((32, 1024, 768, 12), (1, 20000, 1024, 8), (32, 256, 1024, 16))
CASES = {
    "smoke": [Case(8, 196, 192, 3, direction=TRAINING)],
    "quick": [Case(*_SIZES[0], direction=TRAINING)],
    "full": [Case(*sizes, dtype, TRAINING) for dtype in ("float32", "bfloat16") for sizes in _SIZES],
}


class Probe(nn.Module):
    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, channels))
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.classify = nn.Linear(channels, _CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found, _ = self.attention(self.query.expand(tokens.shape[0], -1, -1), tokens, tokens)
        return self.classify(found[:, 0])


def test_probe(case: Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: Case, compiles: tuple[str, ...]) -> Problem:
    torch.manual_seed(0)
    plain = Probe(case.C, case.heads).to(problem.device(), case.torch_dtype)
    exact, fused = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    tokenfusion.fuse(fused, strict=True)

    def step(probe: nn.Module):
        parameters = list(probe.parameters())

        def call(tokens: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scores = probe(tokens)
            return scores, *torch.autograd.grad(scores, parameters, grad)

        return call

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        options = {"device": problem.device(), "dtype": case.torch_dtype}
        return torch.randn(case.B, case.N, case.C, **options), torch.randn(case.B, _CLASSES, **options)

    tokens = case.B * case.N * case.C
    kernels = problem.kernels_for("single_query_attention", inputs()[0][:, : case.heads], inputs()[0], None)
    return Problem(
        "Attentive probe on frozen tokens, a training step without the optimizer, eager is nn.MultiheadAttention",
        case.sizes(),
        problem.variants(step, plain, fused, kernels, compiles=compiles),
        inputs,
        step(exact),
        moved=2 * tokens * case.torch_dtype.itemsize,
        written=False,
        flops=3 * 4 * tokens * case.heads,
    )
