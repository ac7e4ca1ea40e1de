"""Inputs for the tests of tied_ffn, and what to hold results against."""

from collections.abc import Callable

import torch

from tests.gradients import Tensors, in_float64, with_gradients
from tests.parity import assert_parity, assert_trains
from tokenfusion.kernels import tied_ffn
from tokenfusion.kernels.tied_ffn import reference

NAMES = ("x", "weight", "bias_in", "bias_out")


def make_inputs(
    *leading: int, channels: int, features: int, dtype: torch.dtype, biases=(True, True), device: str = "cpu"
) -> Tensors:
    """x, weight, bias_in and bias_out that require gradients, and a gradient of y; all of about unit size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(device, dtype)

    x, weight = normal(*leading, channels), normal(features, channels, scale=channels**-0.5)
    bias_in, bias_out = normal(features, scale=0.5), normal(channels, scale=0.5)
    tensors = (x, weight, bias_in if biases[0] else None, bias_out if biases[1] else None)
    return *(t if t is None else t.requires_grad_() for t in tensors), normal(*leading, channels)


def check_parity(function: Callable, inputs: Tensors, *, activation: str = "gelu", **options) -> None:
    """Output and gradients of function obey the parity rule."""
    actual = with_gradients(function, inputs, activation=activation, **options)
    unfused = with_gradients(reference.tied_ffn, inputs, activation=activation)
    exact = with_gradients(reference.tied_ffn, in_float64(inputs), activation=activation)
    names = ["y", *(name for name, t in zip(NAMES, inputs) if t is not None)]
    tokens, widest = inputs[-1][..., 0].numel(), max(inputs[1].shape)
    for name, *tensors in zip(names, actual, unfused, exact, strict=True):
        assert_parity(*tensors, name=name, summands=widest if name in ("y", "x") else tokens)


def check(inputs: Tensors, **options) -> None:
    """The backend in force computes output and gradients, and they obey the parity rule."""
    with assert_trains("tied_ffn"):
        check_parity(tied_ffn, inputs, **options)
