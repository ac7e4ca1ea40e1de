"""Is a result right: against float64, at most twice the error that eager PyTorch makes in the same dtype."""

from dataclasses import dataclass

import torch

_ZERO = 1e-12


@dataclass(frozen=True)
class Parity:
    """The largest error beside the largest one allowed, both as a share of the largest exact element."""

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

    Beyond twice eager's error, the rounding of the exact result is allowed, and four units in float32's last place of
    the largest element. A gradient that is zero in exact arithmetic has no scale of its own; it gets that of the
    largest tensor. slack multiplies all that is allowed.
    """
    scales = [float(tensor.detach().abs().max()) for tensor in exact]
    largest = max(scales) or 1.0
    scales = [scale if scale > _ZERO * largest else largest for scale in scales]
    parities = [_compare(*tensors, slack) for tensors in zip(results, eager, exact, scales, strict=True)]
    return max(parities, key=lambda p: p.error / p.allowed if p.error == p.error else float("inf"))


def _compare(result: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, scale: float, slack: float) -> Parity:
    tiny = torch.finfo(result.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    return Parity(_error(result, exact) / scale, slack * (2 * _error(eager, exact) / scale + tiny))


def _error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.detach()[: len(exact)].double() - exact.detach()).abs().max())
