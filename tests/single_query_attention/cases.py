"""Inputs for the tests of single_query_attention, and what to hold results against."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from tests.gradients import Tensors, in_float64, with_gradients
from tests.parity import assert_parity, assert_trains
from tokenfusion.kernels import single_query_attention
from tokenfusion.kernels.single_query_attention import reference

without_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
KERNELS = ["cpu", pytest.param("triton", marks=without_triton)]
DTYPES = {
    "reference": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.float16),
}
BACKENDS_AND_DTYPES = [
    pytest.param(backend, dtype, marks=without_triton if backend == "triton" else ())
    for backend, dtypes in DTYPES.items()
    for dtype in dtypes
]
OPTIONS = [dict(normalize=normalize, extra=extra) for normalize in (False, True) for extra in (False, True)]


def kernels_of(backend):
    operators = ("single_query_attention", "single_query_attention_backward")
    return [] if backend == "reference" else [f"{operator}_{backend}" for operator in operators]


def make_inputs(
    batch: int,
    queries: int,
    tokens: int,
    channels: int,
    *,
    dtype: torch.dtype,
    extra: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Tensors:
    """query, tokens and extra_token that require gradients, a gradient of the context; scores of about unit size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    query = (normal(batch, queries, channels) / channels**0.5).to(dtype).requires_grad_()
    x = (normal(batch, tokens, channels) + 0.3).to(dtype).requires_grad_()
    extra_token = normal(batch, channels).to(dtype).requires_grad_() if extra else None
    return query, x, extra_token, normal(batch, queries, channels).to(dtype)


def check_parity(function: Callable, inputs: Tensors, **options) -> None:
    """Output and gradients of function obey the parity rule."""
    actual = with_gradients(function, inputs, **options)
    unfused = with_gradients(reference.single_query_attention, inputs, **options)
    exact = with_gradients(reference.single_query_attention, in_float64(inputs), **options)
    names = ["context", *(n for n, t in zip(("query", "tokens", "extra_token"), inputs) if t is not None)]
    for name, *tensors in zip(names, actual, unfused, exact):
        assert_parity(*tensors, name=name, summands=max(inputs[1].shape[1:]))


def check_common_offset(function: Callable, dtype: torch.dtype, normalize: bool, device: str = "cpu") -> None:
    """What all tokens share is not in the query's gradient: the gradients of the scores sum to zero.

    Rounding leaves a sum, which multiplies what is shared. The kernels take it out again, and are then more exact than
    PyTorch, whose error has that term.
    """
    query, tokens, _, grad = make_inputs(2, 3, 50, 48, dtype=dtype, device=device)
    shared = 10 * torch.randn(48, generator=torch.Generator().manual_seed(1)) if normalize else torch.tensor(10.0)
    inputs = query, (tokens.detach() + shared.to(dtype)).requires_grad_(), None, grad
    exact = with_gradients(reference.single_query_attention, in_float64(inputs), normalize=normalize)[1]
    fused, unfused = (
        (with_gradients(f, inputs, normalize=normalize)[1] - exact).abs().max()
        for f in (function, reference.single_query_attention)
    )
    assert fused < unfused / 2, f"error {fused:.2e}, unfused {unfused:.2e}"


def check_every_float16(function: Callable) -> None:
    """Every finite number is read and written as it is, and what lies between two is rounded to the even one."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    tokens = numbers[numbers.isfinite()].view(-1, 1, 8)
    query = torch.zeros(len(tokens), 1, 8, dtype=torch.float16)
    assert torch.equal(function(query, tokens), tokens)
    below = tokens.abs().clamp(max=32768)
    both = torch.stack((below, (below.view(torch.int16) + 1).view(torch.float16)), dim=1).squeeze(2)
    assert torch.equal(function(query, both), both.float().mean(dim=1, keepdim=True).half())


def check(inputs: Tensors, **options) -> None:
    """The backend in force computes output and gradients, and they obey the parity rule."""
    with assert_trains("single_query_attention"):
        check_parity(single_query_attention, inputs, **options)
