"""A grid of probes over the same frozen tokens: ten learning rates by three weight decays, a training step of all."""

from dataclasses import replace

import torch
from torch import nn

from benchmarks.measure.problem import TRAINING
from benchmarks.ops.single_query_attention.cases import Case
from benchmarks.pooling.probe import CLASSES, LayerProbe, Probe, frozen_tokens_problem, in_layer_order
from tokenfusion.layers import ProbeGrid

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
    def __init__(self, plain: Plain):
        super().__init__()
        probes = map(LayerProbe, plain.probes)
        self.grid = ProbeGrid(nn.Sequential(probe.attention, nn.Flatten(), probe.classify) for probe in probes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.grid(tokens), dim=1)


def _all_apart(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What the step of the plain grid returns, with its gradients in the order of the other."""
    scores, *gradients = results
    each = [gradients[i : i + len(gradients) // _PROBES] for i in range(0, len(gradients), len(gradients) // _PROBES)]
    return scores, *(gradient for own in each for gradient in (*in_layer_order(own[:5]), *own[5:]))


def test_grid(case: Case, run, compiles):
    torch.manual_seed(0)
    plain = Plain(case.C, case.heads)
    found = frozen_tokens_problem(
        f"{_PROBES} attentive probes on the same tokens, a training step, eager is nn.MultiheadAttention",
        case,
        plain,
        Together(plain),
        compiles,
        results=(_PROBES, CLASSES),
        queries=_PROBES,
    )
    variants = [replace(v, comparable=_all_apart) if v.backend else v for v in found.variants]
    run(replace(found, variants=variants))
