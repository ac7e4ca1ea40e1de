"""The definition of the up-convolutions in low precision, where PyTorch's own gradient may be wrong."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tokenfusion
from tests.gradients import in_float64, with_gradients
from tests.upconv.cases import FORMATS, OPS, make_inputs
from tokenfusion.kernels.upconv import reference
from tokenfusion.kernels.upconv.shapes import is_channels_last
from tokenfusion.layers import deferred
from tokenfusion.tuning.parity import compare

DTYPES = (torch.bfloat16, torch.float16)
# where oneDNN's convolution is wrong in bfloat16 with AMX: few channels, and channels x k more than 32
CHANNELS = [((16, 16, 4), 4), ((64, 24, 0), 4), ((16, 16, 3), 6), ((16, 8, 2), 8), ((64, 4, 3), 16), ((8, 2, 0), 32)]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def in_float32(inputs):
    return tuple(t if t is None else t.detach().float().requires_grad_(t.requires_grad) for t in inputs)


def check(actual, inputs, function):
    """As right as in float32, but for rounding to the dtype, and of intermediate results."""
    exact, wide = (with_gradients(function, of(inputs)) for of in (in_float64, in_float32))
    rounded = [tensor.to(actual[0].dtype) for tensor in wide]
    found = compare(actual, rounded, exact, slack=2)
    assert found.passes, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("channels, scale", CHANNELS, ids=str)
def test_the_gradient_in_low_precision_is_right(channels, scale, op, dtype):
    inputs = make_inputs(op, 1, channels, (2, 3), scale, dtype=dtype)
    with Seen() as seen:
        actual = with_gradients(OPS[op][1], inputs)
    assert "convolution_backward" not in seen.names or op == "project"  # that of 1x1 is right
    check(actual, inputs, OPS[op][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_result_is_laid_out_as_that_of_the_convolution(bias, layout, dtype):
    x, weight, bias_, *_ = make_inputs(dtype=dtype, bias=bias, formats=(layout,) * 4)
    trained = reference.upconv_concat(x, weight, bias_, None)
    plain = reference.upconv_concat(x.detach(), weight, bias_, None)
    assert is_channels_last(trained) == is_channels_last(plain) == (layout == "nhwc")
    torch.testing.assert_close(trained, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_under_a_transform(dtype):
    inputs = make_inputs("concat", 1, (16, 16, 4), (2, 3), 4, dtype=dtype)
    x, weight, bias, skip, grad = (t.detach() for t in inputs)
    _, pull_back = torch.func.vjp(lambda x: reference.upconv_concat(x, weight, bias, skip), x)
    exact = with_gradients(reference.upconv_concat, in_float64(inputs))[1]
    torch.testing.assert_close(pull_back(grad)[0].double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("of_weight", [False, True])
def test_a_deferred_result_whose_gradient_no_kernel_takes(of_weight, dtype):
    x, weight, bias, _, grad = make_inputs("concat", 1, (16, 16, 0), (2, 3), 4, dtype=dtype)
    wanted = (x, weight, bias) if of_weight else (x,)
    results = []
    for backend in ("auto", "reference"):
        up = deferred.defer(x, weight.requires_grad_(of_weight), bias) * 1
        with tokenfusion.backend(backend):
            results.append(torch.autograd.grad(up, wanted, grad))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
