"""Trying out whether a module of somebody else's class computes what its fused form does."""

import copy

import torch
from torch import nn

_TOLERANCE = 1e-6  # relative, in float64


class Draws:
    """Normal random numbers in float64, the same in every trial."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu")


def with_drawn_parameters(module: nn.Module, drawn: Draws) -> nn.Module:
    """A copy for evaluation, in float64 and without hooks, whose linear layers keep the size of what they take."""
    plain = _without_hooks(copy.deepcopy(module)).to_empty(device="cpu").double().eval()
    for name, tensor in (*plain.named_parameters(), *plain.named_buffers()):  # not all buffers are in the state_dict
        tensor.data.copy_(_drawn_like(tensor, name, drawn))
    return plain.requires_grad_()


def same(got: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
    """scale: of which size the rounding errors are; by default the largest value's."""
    scale = _largest(expected) if scale is None else scale
    return bool(_largest(got - expected) <= _TOLERANCE * scale)


def _largest(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, float("inf"))


def failed(error: Exception) -> str:
    return f"its forward cannot be tried out: {type(error).__name__}: {error}".splitlines()[0]


def _drawn_like(tensor: torch.Tensor, name: str, drawn: Draws) -> torch.Tensor:
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor)
    values = drawn(*tensor.shape) / max(tensor[:1].numel(), 1) ** 0.5 if tensor.dim() else drawn()
    return values.square() + 0.5 if name.endswith("running_var") else values


def _without_hooks(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    return module
