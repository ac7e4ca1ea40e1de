"""An attentive probe, and the pooling of a bag: the operator is all of the work. As a problem, in training or not."""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import tokenfusion
from benchmarks.measure import problem
from benchmarks.measure.problem import Problem, Variant
from benchmarks.ops.single_query_attention.cases import Case
from tokenfusion.layers import SingleQueryAttention

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


class FlexProbe(Probe):
    """By flex_attention, which PyTorch has for CPUs without a backward pass and compiled alone."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        attention, heads = self.attention, self.attention.num_heads
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        tensors = (self.query.expand(tokens.shape[0], -1, -1), tokens, tokens)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(tensors, weights, biases)
        )
        return self.classify(attention.out_proj(_compiled_flex_attention()(q, k, v).transpose(1, 2).flatten(2))[:, 0])


@functools.cache
def _compiled_flex_attention() -> Callable:
    return problem.compiled(flex_attention)


def probe_problem(group: str, case: Case, compiles: Sequence[str]) -> Problem:
    torch.manual_seed(0)
    plain = Probe(case.C, case.heads)
    without_weights = copy.deepcopy(plain)
    without_weights.need_weights = False
    fused = copy.deepcopy(plain)
    tokenfusion.fuse(fused, strict=True)
    others = [(problem.PROJECTIONS, without_weights)]
    if compiles and not case.backward:
        by_flex = copy.deepcopy(plain)
        by_flex.__class__ = FlexProbe
        others.append((problem.FLEX, by_flex))
    return frozen_tokens_problem(group, case, plain, fused, compiles, others)


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
        return step(module) if case.backward else problem.forward(module)

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


def step(module: nn.Module) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A call of (*tensors, gradient of the result) that returns the result and the gradients of the parameters."""
    parameters = list(module.parameters())

    def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *tensors, grad = inputs
        result = module(*tensors)
        return result, *torch.autograd.grad(result, parameters, grad)

    return call


def in_layer_order(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A query and nn.MultiheadAttention's parameters, or their gradients, in the order of SingleQueryAttention's."""
    query, weight, bias, *out = parameters
    return [query, *(each for pair in zip(weight.chunk(3), bias.chunk(3)) for each in pair), *out]


class LayerProbe(nn.Module):
    """A probe in this package's layer, of the same parameters."""

    def __init__(self, probe: Probe):
        super().__init__()
        attention = probe.attention
        self.attention = SingleQueryAttention(attention.embed_dim, attention.num_heads, num_latents=1)
        theirs = in_layer_order([parameter.detach() for parameter in (probe.query, *attention.parameters())])
        self.attention.load_state_dict(dict(zip(self.attention.state_dict(), theirs, strict=True)))
        self.classify = copy.deepcopy(probe.classify)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return self.classify(self.attention(tokens, lengths=lengths)[:, 0])
