"""An attentive probe, and the pooling of a bag: the operator is all of the work. As a problem, in training or not."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

import tokenfusion
from benchmarks.measure import problem
from benchmarks.measure.problem import Problem, Variant
from benchmarks.ops.single_query_attention.cases import Case

CLASSES = 100


class Probe(nn.Module):
    """One learned query and a classifier around torch's own nn.MultiheadAttention, as most people call it."""

    def __init__(self, channels: int, num_heads: int, need_weights: bool = True):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, channels))
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.classify = nn.Linear(channels, CLASSES)
        self.need_weights = need_weights

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(tokens.shape[0], -1, -1)
        found, _ = self.attention(query, tokens, tokens, need_weights=self.need_weights)
        return self.classify(found[:, 0])


def probe_problem(group: str, case: Case, compiles: Sequence[str]) -> Problem:
    torch.manual_seed(0)
    plain = Probe(case.C, case.heads)
    without_weights = copy.deepcopy(plain)
    without_weights.need_weights = False
    fused = copy.deepcopy(plain)
    tokenfusion.fuse(fused, strict=True)
    sdpa = [(problem.PROJECTIONS, without_weights)]
    return frozen_tokens_problem(group, case, plain, fused, compiles, sdpa)


def frozen_tokens_problem(
    group: str,
    case: Case,
    plain: nn.Module,
    fused: nn.Module,
    compiles: Sequence[str],
    others: Sequence[tuple[str, nn.Module]] = (),
    results: Sequence[int] = (CLASSES,),
    queries: int = 1,
) -> Problem:
    """A pass of modules of the same parameters over tokens that need no gradient; in training, without the optimizer.

    Args:
        results: what a module makes of an image, [B, *results].
        queries: how many a head has.
    """
    options = {"device": problem.device(), "dtype": case.torch_dtype}
    modules = {name: module.to(**options) for name, module in {"plain": plain, "fused": fused, **dict(others)}.items()}
    exact = copy.deepcopy(modules.pop("plain")).double()

    def inputs() -> tuple[torch.Tensor, ...]:
        tokens = torch.randn(case.B, case.N, case.C, **options)
        return (tokens, torch.randn(case.B, *results, **options)) if case.backward else (tokens,)

    def timed(module: nn.Module) -> Callable:
        return _step(module) if case.backward else problem.forward(module)

    tokens = case.B * case.N * case.C
    some = torch.empty(case.B, 1, case.C, **options)
    kernels = problem.kernels_for("single_query_attention", some, some, None)
    found = [Variant(name, timed(modules[name])) for name, _ in others]
    return Problem(
        group,
        case.sizes(),
        problem.variants(timed, plain, modules["fused"], kernels, compiles=compiles, others=found),
        inputs,
        timed(exact),
        moved=(2 if case.backward else 1) * tokens * case.torch_dtype.itemsize,
        written=False,
        flops=(3 if case.backward else 1) * 4 * tokens * case.heads * queries,
    )


def _step(module: nn.Module) -> Callable[..., tuple[torch.Tensor, ...]]:
    parameters = list(module.parameters())

    def call(tokens: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = module(tokens)
        return result, *torch.autograd.grad(result, parameters, grad)

    return call
