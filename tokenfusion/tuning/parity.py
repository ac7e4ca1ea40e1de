"""The rule by which a result counts as right, in benchmarks and tests: against float64 on the same rounded inputs.

Its error is at most twice that of eager PyTorch in the same dtype, in two norms. The largest difference sees a single
wrong element. The root mean square averages the luck of single roundings, and so sees a small error that all elements
share. (A cosine distance is half the square of what turns the tensor: twice the error would be four times the distance,
and a wrong factor, which turns nothing, would be none.)

Eager sums in another order and may be lucky, so rounding that no implementation avoids is allowed on top. The result
is rounded to its dtype: half a unit in the last place. Adding n terms rounds n partial sums, in float32 where the
dtype has less: n independent errors of half a unit come to sqrt(n) of them. The unit is that of the partial sums, whose
size is the norm of the terms; terms of either sign add up to about as much, so the size of the result stands for it.
Where they cancel it cannot, as in a gradient that is zero in exact arithmetic: there the norm of the terms is given.
"""

from dataclasses import dataclass

import torch

_FEWEST_SUMMANDS = 64  # four units: a short sum, too, is of rounded results of others
_ZERO = 1e-12


@dataclass(frozen=True)
class Parity:
    """An error beside the largest one allowed, both as shares of the exact tensor's size in the same norm."""

    error: float
    allowed: float

    @property
    def passes(self) -> bool:
        return self.error <= self.allowed


def in_float64(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Inputs whose floating-point tensors are in float64."""
    return tuple(t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs)


def compare(results, eager, exact, slack: float = 1) -> Parity:
    """The worst of several tensors. Where exact holds the first of a batch alone, only these are compared.

    A gradient that is zero in exact arithmetic gets the scale of the largest tensor. slack multiplies all that is
    allowed.
    """
    largest = max(exact, key=_largest)
    scales = [tensor if _largest(tensor) > _ZERO * _largest(largest) else largest for tensor in exact]
    parities = [
        Parity(parity.error, slack * parity.allowed)
        for *tensors, scale in zip(results, eager, exact, scales, strict=True)
        for parity in in_both_norms(*tensors, scale=scale).values()
    ]
    return max(parities, key=lambda p: p.error / p.allowed if p.error == p.error else float("inf"))


def in_both_norms(result, eager, exact, summands: int = 0, scale: torch.Tensor | None = None) -> dict[str, Parity]:
    """The rule for one tensor, whose elements are sums of so many terms; scale: their norms, where exact is smaller."""
    unit = torch.finfo(result.dtype).eps
    rounding = (unit + max(summands, _FEWEST_SUMMANDS) ** 0.5 * min(unit, torch.finfo(torch.float32).eps)) / 2
    if result.dtype == torch.float64:
        rounding = 1000 * unit  # exact is no more exact, and eager its equal
    exact = exact.detach().double()
    errors = [tensor.detach()[: len(exact)].double() - exact for tensor in (result, eager)]
    parities = {}
    for name, norm in {"largest difference": _largest, "root mean square": _root_mean_square}.items():
        size = max(norm(exact), 0.0 if scale is None else norm(scale)) or 1.0
        error, of_eager = (norm(each) / size for each in errors)
        parities[name] = Parity(error, 2 * of_eager + rounding)
    return parities


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.detach().abs().max())


def _root_mean_square(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())
