"""Argument checks shared by the operators: each error names the argument, what came and what was expected."""

from collections.abc import Iterable
from numbers import Integral

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def symbolic(*tensors: torch.Tensor | None) -> bool:
    """Whether torch.fx traces some of them as symbols, whose sizes and dtypes are not known to any check."""
    return any(isinstance(tensor, torch.fx.Proxy) for tensor in tensors)


def check_sizes(least: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < least:
            raise ValueError(f"{name}: got {size!r}, expected a whole number of at least {least}")


def check_rate(name: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}: got {rate}, expected a rate in [0, 1]")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected float16, bfloat16, float32 or float64")


def check_rank(name: str, tensor: torch.Tensor, layout: str) -> None:
    rank = layout.count(",") + 1
    if tensor.dim() != rank:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {rank} dimensions {layout}")


def check_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: is on {tensor.device}, expected {other.device}, where {other_name} is")


def check_same(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Same device and dtype."""
    check_device(name, tensor, other_name, other)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {other.dtype}, the dtype of {other_name}")


def check_shape(name: str, tensor: torch.Tensor, expected: list[int], because: str) -> None:
    if list(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {expected} {because}")


def check_not_recorded(name: str, out: torch.Tensor | None, tensors: Iterable[torch.Tensor | None]) -> None:
    """That no gradient is recorded of what is written to `out`."""
    if out is not None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            f"{name}: a gradient would be recorded, which needs a result of its own; expected torch.no_grad()"
        )


def autocast_like(leader: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Under autocast, the others in the dtype of the leader, the big tensor that is read as it is."""
    if not isinstance(leader, torch.Tensor):
        return others
    if all(other is None or getattr(other, "dtype", None) == leader.dtype for other in others):
        return others
    if not torch.is_autocast_enabled(leader.device.type):
        return others
    return tuple(
        other.to(leader.dtype) if isinstance(other, torch.Tensor) and other.is_floating_point() else other
        for other in others
    )


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast, tensors in its dtype, as it does with those of a matrix product; float64 stays."""
    leader = tensors[0]
    if not isinstance(leader, torch.Tensor) or leader.is_meta or not torch.is_autocast_enabled(leader.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(leader.device.type)
    lower = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in lower else t for t in tensors)
