"""A grid of probes over the same frozen tokens: ten learning rates by three weight decays, a training step of all."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from benchmarks.measure.problem import TRAINING
from benchmarks.ops.single_query_attention.cases import Case
from benchmarks.pooling.probe import CLASSES, Probe, frozen_tokens_problem
from tokenfusion.layers import ProbeGrid, SingleQueryAttention

_PROBES = 30
CASES = {
    "smoke": [Case(2, 64, 64, 2, direction=TRAINING)],
    "quick": [],
    "full": [Case(8, 256, 1024, 16, direction=TRAINING)],
}


class Plain(nn.Module):
    """Probe by probe."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.probes = nn.ModuleList(Probe(channels, num_heads) for _ in range(_PROBES))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([probe(tokens) for probe in self.probes], dim=1)


class Together(nn.Module):
    def __init__(self, plain: Plain, channels: int, num_heads: int):
        super().__init__()
        self.grid = ProbeGrid(_of_layers(probe, channels, num_heads) for probe in plain.probes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.grid(tokens), dim=1)


def _of_layers(probe: Probe, channels: int, num_heads: int) -> nn.Sequential:
    """The same probe in this package's layer."""
    attention = SingleQueryAttention(channels, num_heads, num_latents=1)
    theirs = [parameter.detach() for parameter in (probe.query, *probe.attention.parameters())]
    attention.load_state_dict(dict(zip(attention.state_dict(), _apart(theirs), strict=True)))
    return nn.Sequential(attention, nn.Flatten(), probe.classify)


def _apart(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A query and nn.MultiheadAttention's parameters, or their gradients, in the order of this package's layer."""
    query, weight, bias, *out = parameters
    return [query, *(each for pair in zip(weight.chunk(3), bias.chunk(3)) for each in pair), *out]


def _all_apart(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What the step of the plain grid returns, with its gradients in the order of the other."""
    scores, *gradients = results
    each = [gradients[i : i + len(gradients) // _PROBES] for i in range(0, len(gradients), len(gradients) // _PROBES)]
    return scores, *(gradient for own in each for gradient in (*_apart(own[:5]), *own[5:]))


def test_grid(case: Case, run, compiles):
    torch.manual_seed(0)
    plain = Plain(case.C, case.heads)
    found = frozen_tokens_problem(
        f"{_PROBES} attentive probes on the same tokens, a training step, eager is nn.MultiheadAttention",
        case,
        plain,
        Together(plain, case.C, case.heads),
        compiles,
        results=(_PROBES, CLASSES),
        queries=_PROBES,
    )
    variants = [replace(v, comparable=_all_apart) if v.backend else v for v in found.variants]
    run(replace(found, variants=variants))
