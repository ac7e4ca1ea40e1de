"""Random calls of every operator on the C++ kernels, against float64: no layout of an operand changes a result.

TOKENFUSION_RANDOM_CALLS=5000 makes so many calls of each operator; a failure names the number of its call.
"""

import os
import random

import pytest
import torch

import tokenfusion
from tests.random_calls import DTYPES, LAYOUTS, OPERATORS, laid_out, random_call
from tokenfusion.tuning import parity

CALLS = int(os.environ.get("TOKENFUSION_RANDOM_CALLS", "60"))


def results(call, tensors, grad, backend):
    """The output, and the gradients of all tensors."""
    leaves = [None if t is None else t.detach().requires_grad_(call.differentiable) for t in tensors]
    present = [leaf for leaf in leaves if leaf is not None]
    with tokenfusion.backend(backend), torch.set_grad_enabled(call.differentiable):
        out = call.function(*leaves)
        return [out.detach(), *(torch.autograd.grad(out, present, grad(out)) if call.differentiable else ())]


def drawn(shape: tuple[int, ...]) -> torch.Tensor:
    """Small enough that a softmax of products does not magnify their rounding."""
    return torch.randn(shape, dtype=torch.float64) * shape[-1] ** -0.5


def check(operator: str, number: int) -> None:
    pick = random.Random(f"{operator} {number}")
    torch.manual_seed(number)
    call, dtype = random_call(pick, operator), pick.choice(DTYPES)
    layouts = [pick.choice(LAYOUTS) for _ in (*call.shapes, "gradient")]
    tensors = [
        None if shape is None else laid_out(drawn(shape).to(dtype), layout, pick, i in call.innermost)
        for i, (shape, layout) in enumerate(zip(call.shapes, layouts))
    ]
    present = [t for t in tensors if t is not None]
    made = {}

    def grad(out):
        if not made:
            made["grad"] = laid_out(torch.randn(out.shape, dtype=torch.float64).to(dtype), layouts[-1], pick)
        return made["grad"].to(out.dtype)

    where = f"{operator}, call {number}, {dtype}: {[*zip(call.shapes, layouts)]}, gradient {layouts[-1]}"
    actual = results(call, tensors, grad, "cpu")
    unfused = results(call, tensors, grad, "reference")
    exact = results(call, [None if t is None else t.double() for t in tensors], grad, "reference")
    contiguous = results(call, [None if t is None else t.contiguous() for t in tensors], grad, "cpu")
    assert_call(actual, (unfused, contiguous), exact, max(t.numel() for t in present), where)


def assert_call(actual, others, exact, summands: int, where: str) -> None:
    """The parity rule, with the worst tensor of eager, and of the kernel for contiguous operands, for all of a call.

    On a few elements eager alone is too often lucky; the kernel for contiguous operands is tested elsewhere.
    """
    scale = max((e for e in exact if e.numel()), key=lambda e: e.abs().max(), default=None)
    found = {}
    for unfused in others:
        for i, (got, other, e) in enumerate(zip(actual, unfused, exact, strict=True)):
            assert got.dtype == other.dtype and got.shape == e.shape, f"{where}: result {i}"
            if not other.isfinite().all():  # PyTorch's own gradient of a bfloat16 transposed convolution, at times
                other = e.to(other.dtype)
            if e.numel():
                found.setdefault(i, []).append(parity.in_both_norms(got, other, e, summands, scale))
    for norm in ("largest difference", "root mean square"):
        allowed = max((of[norm].allowed for both in found.values() for of in both), default=0.0)
        for i, (of, _) in found.items():
            assert of[norm].error <= allowed, f"{where}: result {i}, {norm} {of[norm].error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_layouts_change_nothing(operator):
    for number in range(CALLS):
        check(operator, number)
