"""The rule by which a kernel counts as right, and how a test sees which backend ran."""

import contextlib

import torch
from torch import nn

from tokenfusion.kernels import dispatch
from tokenfusion.tuning import parity


def assert_parity(
    actual: torch.Tensor,
    unfused: torch.Tensor,
    exact: torch.Tensor,
    name: str = "",
    *,
    summands: int = 0,
    scale: torch.Tensor | None = None,
) -> None:
    """The error of `actual` is at most twice that of the unfused PyTorch path, and rounding: `tuning/parity.py`.

    summands: the terms of an element's sum, where they are many; scale: their norm, where they cancel.
    """
    assert actual.dtype == unfused.dtype, f"{name}: dtype {actual.dtype}, expected {unfused.dtype}"
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    for norm, found in parity.in_both_norms(actual, unfused, exact, summands, scale).items():
        assert found.passes, f"{name}: {norm} {found.error:.2e}, allowed {found.allowed:.2e}"


def longest_sum(model: nn.Module) -> int:
    """The most terms that a linear layer or a convolution of it adds up for one element."""
    weights = (layer.weight[0] for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return max((weight.numel() for weight in weights), default=0)


@contextlib.contextmanager
def assert_runs(*operators: str):
    """The with-block runs each of these operators of the namespace tokenfusion, and no other of it."""
    with dispatch.observe() as seen:
        yield
    ran = {"_".join(kernel) for kernel in seen.ran}
    assert ran == set(operators), f"ran {sorted(ran)}, expected {sorted(operators)}"


def assert_trains(operator: str):
    """The with-block runs this operator forward and backward on the backend in force, and no other operator."""
    backend = dispatch.get_backend()
    return assert_runs(f"{operator}_{backend}", f"{operator}_backward_{backend}")
