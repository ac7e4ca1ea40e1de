"""Every GPU kernel on the small calls of its operator: in Triton's interpreter, or on a GPU where there is one."""

import pytest
import torch

pytest.importorskip("triton")

import tokenfusion
from benchmarks.gpu_check import kernels
from tests.gradients import in_float64
from tests.parity import assert_parity
from tokenfusion.kernels import triton_support
from tokenfusion.kernels.dispatch import CannotRun

# The interpreter takes minutes, and every operator's own tests have its other dtypes.
DTYPES = (torch.float16,) if triton_support.INTERPRET else kernels.DTYPES
CALLS = [
    pytest.param(call, backend, id=f"{call.operator}-{backend}-{dtype}-{call.label}".replace(" ", "_"))
    for dtype in DTYPES
    for call in kernels.small_calls(dtype)
    for backend in kernels.gpu_backends(call.operator)
]


@pytest.mark.parametrize("call, backend", CALLS)
def test_parity(call, backend):
    reason = kernels.why_not(call.operator, backend)
    if reason is not None:
        pytest.skip(reason)
    tensors = kernels.on_device(call)
    with tokenfusion.backend("reference"):
        unfused, exact = (kernels.with_gradients(call, each) for each in (tensors, in_float64(tensors)))
    try:
        with tokenfusion.backend(backend):
            actual = kernels.with_gradients(call, tensors)
    except CannotRun as error:
        pytest.skip(str(error))
    for i, results in enumerate(zip(actual, unfused, exact, strict=True)):
        assert_parity(*results, name="the result" if i == 0 else f"gradient {i}")


def test_every_operator_with_a_gpu_kernel_has_small_calls():
    assert kernels.without_small_calls() == []


def test_repeats_see_a_kernel_that_changes_its_mind():
    call = kernels.small_calls(torch.float32)[0]
    tensors = kernels.on_device(call)
    with tokenfusion.backend("reference"):
        assert kernels.repeats(call, tensors, 5, seconds=60) == "5 repeats, all bit-equal"
        results = iter([1.0] * 3 + [2.0] * 9)
        unsteady = kernels.SmallCall("an operator", "unsteady", lambda x: x * next(results), (torch.ones(3),))
        unsteady.tensors[0].requires_grad_()
        with pytest.raises(AssertionError, match="differ"):
            kernels.repeats(unsteady, unsteady.tensors, 5, seconds=60)
