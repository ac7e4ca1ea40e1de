"""A batch of bags of different sizes in training: padded with a mask, padded with their lengths, and packed.

The padded batch and the packed one are there beforehand. The row that reads all of the padding is what the kernel did
before it knew lengths: it attends to zeros, so that its results are others.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import problem
from benchmarks.measure.problem import TRAINING, CaseBase, Problem, Variant
from benchmarks.pooling.probe import CLASSES, LayerProbe, Probe, in_layer_order, step
from benchmarks.report.table import PADDED, PADDING_READ


@dataclass(frozen=True)
class Case(CaseBase):
    """B bags of shortest to longest tokens, in equal steps."""

    B: int
    shortest: int
    longest: int
    C: int
    heads: int
    dtype: str = "float32"
    direction: str = TRAINING


CASES = {
    "smoke": [Case(4, 20, 200, 64, 2)],
    "quick": [],
    "full": [Case(16, 1000, 20000, 512, 8)],
}


class Masked(Probe):
    def __init__(self, case: Case, absent: torch.Tensor):
        super().__init__(case.C, case.heads)
        self.absent = absent

    def forward(self, padded: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(len(padded), -1, -1)
        return self.classify(self.attention(query, padded, padded, key_padding_mask=self.absent)[0][:, 0])


def test_packed(case: Case, run, compiles):
    run(_problem(case, compiles))


def _problem(case: Case, compiles: tuple[str, ...]) -> Problem:
    torch.manual_seed(0)
    options = {"device": problem.device(), "dtype": case.torch_dtype}
    lengths = torch.linspace(case.shortest, case.longest, case.B).long()
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(options["device"])
    absent = torch.arange(case.longest) >= lengths.unsqueeze(1)
    plain = Masked(case, absent.to(options["device"]))
    fused = LayerProbe(plain).to(**options)
    plain.to(**options)
    total, lengths = int(lengths.sum()), lengths.to(options["device"])

    def inputs() -> tuple[torch.Tensor, ...]:
        """The bags padded, packed, and the gradient of the scores."""
        values = torch.randn(total, case.C, **options)
        padded = torch.zeros(case.B, case.longest, case.C, **options)
        padded[~plain.absent] = values
        return padded, values, torch.randn(case.B, CLASSES, **options)

    def of_padded(module: nn.Module) -> Callable:
        call = step(module)
        return lambda padded, values, grad: call(padded, grad)

    def by_lengths(padded, values, grad):
        return with_lengths(padded, lengths, grad)

    def packed(padded, values, grad):
        return with_lengths(torch.nested.nested_tensor_from_jagged(values, offsets), None, grad)

    with_lengths = step(fused)
    kernel = problem.kernels_for("single_query_attention", *[torch.empty(1, 1, case.C, **options)] * 2, None)[0]
    found = problem.variants(of_padded, plain, fused, [], compiles=compiles)
    found.append(Variant(PADDING_READ, of_padded(fused), kernel, another_network=True))
    found.append(Variant(PADDED, by_lengths, kernel, comparable=_in_layer_order))
    found.append(Variant(problem.package(kernel), packed, kernel, comparable=_in_layer_order))
    return Problem(
        "A batch of bags, a training step without the optimizer, eager is nn.MultiheadAttention with a mask",
        case.sizes(),
        found,
        inputs,
        of_padded(copy.deepcopy(plain).double()),
        moved=2 * total * case.C * case.torch_dtype.itemsize,
        written=False,
        flops=3 * 4 * total * case.C * case.heads,
    )


def _in_layer_order(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    scores, *gradients = results
    return scores, *in_layer_order(gradients[:5]), *gradients[5:]
