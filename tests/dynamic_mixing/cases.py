"""Inputs for the tests of dynamic_mixing, and what to hold results against."""

from collections.abc import Callable

import torch

from tests.gradients import Tensors, in_float64, with_gradients
from tests.parity import assert_parity, assert_trains
from tokenfusion.kernels import dynamic_mixing
from tokenfusion.kernels.dynamic_mixing import reference

NAMES = ("mixed", "x", "compress_weight", "compress_bias", "generate_weight", "generate_bias")


def make_inputs(
    batch: int,
    height: int,
    width: int,
    channels: int,
    *,
    segments: int,
    dim: int,
    reduced: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> Tensors:
    """x and the four parameters, which require gradients, and a gradient of the output; logits of about unit size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    length, inputs = (height, width)[dim - 1], (height, width)[dim - 1] * reduced
    tensors = (
        normal(batch, height, width, channels) + 0.3,
        normal(segments * reduced, channels, scale=channels**-0.5),
        normal(segments * reduced),
        normal(length**2, inputs, scale=inputs**-0.5),
        normal(length**2),
    )
    tensors = (
        *(t.to(device, dtype).requires_grad_() for t in tensors),
        normal(batch, height, width, channels).to(device, dtype),
    )
    return tensors


def check_parity(function: Callable, inputs: Tensors, **options) -> None:
    """Output and gradients of function obey the parity rule."""
    actual = with_gradients(function, inputs, **options)
    unfused = with_gradients(reference.dynamic_mixing, inputs, **options)
    exact = with_gradients(reference.dynamic_mixing, in_float64(inputs), **options)
    tokens, widest = inputs[0][..., 0].numel(), max(inputs[0].shape[-1], inputs[3].shape[1])
    for name, *tensors in zip(NAMES, actual, unfused, exact, strict=True):
        assert_parity(*tensors, name=name, summands=widest if name in ("mixed", "x") else tokens)


def check(inputs: Tensors, **options) -> None:
    """The backend in force computes output and gradients, and they obey the parity rule."""
    with assert_trains("dynamic_mixing"):
        check_parity(dynamic_mixing, inputs, **options)
