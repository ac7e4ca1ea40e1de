"""The Triton kernels of dynamic_mixing against the reference: in the interpreter, or on a GPU where there is one."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from tests.dynamic_mixing import cases
from tests.dynamic_mixing.cases import check
from tests.gradients import check_frozen, with_gradients
from tests.interpreter import DEVICE, DTYPES
from tokenfusion.kernels import dynamic_mixing
from tokenfusion.kernels.dynamic_mixing import reference
from tokenfusion.kernels.dynamic_mixing.op import mix

pytestmark = pytest.mark.backend("triton")

make_inputs = functools.partial(cases.make_inputs, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 14, 15, 16, 20, 33])
def test_any_number_of_tokens(tokens, dtype):
    # many segments: the error of a gradient of few elements is a matter of chance
    check(make_inputs(2, tokens, 2, 24, segments=12, dim=1, dtype=dtype), segments=12, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, segments", [(7, 1), (7, 7), (24, 1), (40, 1), (48, 2), (24, 8)])
def test_any_segments(channels, segments, dtype):
    check(make_inputs(2, 2, 5, channels, segments=segments, dim=2, dtype=dtype), segments=segments, dim=2)


@pytest.mark.parametrize("reduced", [1, 3, 8, 16])
def test_any_reduced_dimension(reduced):
    check(make_inputs(1, 2, 6, 8, segments=4, dim=2, reduced=reduced), segments=4, dim=2)


def compressed_inputs(dtype=torch.float32):
    x, weight, bias, *generate, _ = make_inputs(2, 3, 4, 6, segments=2, dim=2, dtype=dtype)
    return x, torch.nn.functional.linear(x, weight, bias).detach().requires_grad_(), *generate


def test_mean_and_its_gradients():
    tensors = compressed_inputs()
    mixed, mean = mix(*tensors, segments=2, dim=2, with_mean=True)
    torch.testing.assert_close(mean, mixed.mean(dim=(1, 2)))
    weights = torch.randn_like(mixed), torch.randn_like(mean)
    got = torch.autograd.grad((mixed, mean), tensors, weights)
    mixed = reference.mix(*tensors, segments=2, dim=2)
    want = torch.autograd.grad((mixed, mixed.mean(dim=(1, 2))), tensors, weights)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_strided_tensors_are_read_in_place():
    x, *weights, grad = make_inputs(2, 5, 6, 12, segments=2, dim=1)
    guarded = torch.full((4, 9, 10, 28), torch.nan, device=DEVICE)
    guarded[1:3, 2:7, 2:8, 8:20] = x.detach()
    view = guarded[1:3, 2:7, 2:8, 8:20].requires_grad_()
    got = with_gradients(
        dynamic_mixing, (view, *weights, grad.transpose(1, 3).contiguous().transpose(1, 3)), segments=2, dim=1
    )
    want = with_gradients(dynamic_mixing, (x, *weights, grad), segments=2, dim=1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("trained", [{0}, {1, 2}, {3}, {4}], ids=str)
def test_frozen_inputs_and_weights(trained):
    inputs = make_inputs(1, 2, 5, 8, segments=2, dim=2)
    check_frozen(dynamic_mixing, inputs, set(range(5)) - trained, segments=2, dim=2)


def test_empty_batch():
    mixed, *grads = with_gradients(dynamic_mixing, make_inputs(0, 3, 4, 6, segments=2, dim=1), segments=2, dim=1)
    assert mixed.shape == (0, 3, 4, 6)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", range(5))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_inf_propagate_as_in_the_reference(value, where):
    *tensors, _ = (t.detach() for t in make_inputs(2, 2, 5, 6, segments=2, dim=2))
    tensors[where].view(-1)[3 if where else 40] = value
    got = dynamic_mixing(*tensors, segments=2, dim=2)
    torch.testing.assert_close(got, reference.dynamic_mixing(*tensors, segments=2, dim=2), equal_nan=True)


def test_elements_beyond_the_range_of_32_bits():
    far = 2**31 + 64
    memory = torch.empty(0, dtype=torch.float16, device=DEVICE)
    memory.untyped_storage().resize_((far + 128) * 2)  # pages that nobody touches take no memory
    x, compressed, *generate = (t.detach() for t in compressed_inputs(torch.float16))
    view = memory.as_strided(x.shape, (far, 24, 6, 1))
    view.copy_(x)
    call = (compressed, *generate)
    assert torch.equal(mix(view, *call, segments=2, dim=2)[0], mix(x, *call, segments=2, dim=2)[0])


def test_opcheck():
    tensors = compressed_inputs()
    torch.library.opcheck(torch.ops.tokenfusion.dynamic_mixing_triton, (*tensors, 2, 2, True))
    arguments = (
        torch.randn(2, 3, 4, 6, device=DEVICE),
        torch.randn(2, 6, device=DEVICE),
        *(t.detach() for t in tensors),
        2,
        2,
        [True] * 4,
    )
    torch.library.opcheck(torch.ops.tokenfusion.dynamic_mixing_backward_triton, arguments)
