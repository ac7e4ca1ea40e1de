"""The CUDA kernels of dynamic_mixing in the emulated GPU, against the reference: their mathematics, indices and
barriers, without a GPU."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from tests.dynamic_mixing.cases import check_parity, make_inputs
from tests.dynamic_mixing.emulated import KERNELS, Emulated, plan
from tests.emulation import COMPILER, DTYPES, SCHEDULES
from tests.gradients import check_frozen, with_gradients
from tests.parity import assert_parity
from tokenfusion.kernels.dynamic_mixing import reference

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER})")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, dim", [(1, 1), (2, 2), (7, 1), (15, 2), (16, 1), (17, 2), (32, 1)])
def test_any_number_of_tokens(tokens, dim, dtype):
    height, width = (tokens, 2) if dim == 1 else (2, tokens)
    # many segments: the error of a gradient of few elements is a matter of chance
    check_parity(Emulated(), make_inputs(2, height, width, 24, segments=6, dim=dim, dtype=dtype), segments=6, dim=dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [33, 64])
def test_many_tokens(tokens, dtype):
    inputs = make_inputs(1, tokens, 2, 12, segments=6, dim=1, reduced=1, dtype=dtype)
    check_parity(Emulated(), inputs, segments=6, dim=1)


@pytest.mark.parametrize("tokens, channels, segments, reduced", [(32, 192, 8, 2), (16, 384, 16, 2), (32, 256, 8, 8)])
def test_stages_of_dynamixer(tokens, channels, segments, reduced):
    inputs = make_inputs(1, tokens, 2, channels, segments=segments, dim=1, reduced=reduced, dtype=torch.bfloat16)
    check_parity(Emulated(splits=2), inputs, segments=segments, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, segments", [(1, 1), (7, 1), (7, 7), (24, 1), (40, 1), (72, 1), (30, 2), (192, 8)])
def test_any_segments(channels, segments, dtype):
    check_parity(
        Emulated(), make_inputs(2, 3, 5, channels, segments=segments, dim=2, dtype=dtype), segments=segments, dim=2
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduced", [1, 3, 8, 16])
def test_any_reduced_dimension(reduced, dtype):
    inputs = make_inputs(1, 2, 6, 16, segments=4, dim=2, reduced=reduced, dtype=dtype)
    check_parity(Emulated(), inputs, segments=4, dim=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_more_inputs_than_a_block_takes(dtype):
    inputs = make_inputs(1, 2, 17, 16, segments=4, dim=2, reduced=16, dtype=dtype)
    check_parity(Emulated(), inputs, segments=4, dim=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kilobytes", [30, 40])
@pytest.mark.parametrize("channels", [96, 90])
def test_segments_that_do_not_fit_into_shared_memory(channels, kilobytes, dtype):
    width = channels // 2
    assert plan(17, width, 1, dtype, "forward", kilobytes * 1024)[1] < width
    assert plan(17, width, 1, dtype, "grad_weight", kilobytes * 1024)[1] < width
    inputs = make_inputs(1, 2, 17, channels, segments=2, dim=2, reduced=1, dtype=dtype)
    check_parity(Emulated(most_bytes=kilobytes * 1024), inputs, segments=2, dim=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_a_block_fits_where_its_smallest_form_does(kilobytes, dtype):
    most = kilobytes * 1024
    for tokens in (1, 7, 16, 32, 33, 48, 64):
        reduced = [d for d in range(1, 17) if plan(tokens, 1, d, dtype, "grad_compressed", 0)[0] <= most]
        if tokens <= 32 and (dtype != torch.float32 or kilobytes > 99):
            assert 8 in reduced  # those of DynaMixer
        for d in reduced:
            for width in (1, 24, 32, 512):
                assert all(plan(tokens, width, d, dtype, kernel, most)[0] <= most for kernel in KERNELS)


def with_mean(function, inputs, **options):
    """mixed, its mean, and gradients for gradients of both."""
    x, weight, bias, *generate, grad = inputs
    tensors = x, F.linear(x, weight, bias).detach().requires_grad_(), *generate
    outputs = function(*tensors, **options)
    grads = grad, grad[:, 0, 0] * grad.shape[1] * grad.shape[2]
    return [*outputs, *torch.autograd.grad(outputs, tensors, grads)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [18, 48])
def test_mean_and_its_gradients(channels, dtype):
    def mix(*tensors, **options):
        mixed = reference.mix(*tensors, **options)
        return mixed, mixed.mean(dim=(1, 2))

    inputs = make_inputs(2, 4, 18, channels, segments=3, dim=2, dtype=dtype)
    got = with_mean(Emulated().mix, inputs, segments=3, dim=2)
    unfused = with_mean(mix, inputs, segments=3, dim=2)
    x, weight, bias, *rest = inputs
    compressed = F.linear(x, weight, bias).detach()

    def exactly(x, _, *generate, **options):
        return mix(x, exact_compressed, *generate, **options)

    exact_compressed = compressed.double().requires_grad_()
    x, *generate, grad = (t.detach().double().requires_grad_() for t in (x, *rest))
    outputs = exactly(x, None, *generate, segments=3, dim=2)
    grads = grad, grad[:, 0, 0] * grad.shape[1] * grad.shape[2]
    exact = [*outputs, *torch.autograd.grad(outputs, (x, exact_compressed, *generate), grads)]
    names = ("mixed", "mean", "x", "compressed", "generate_weight", "generate_bias")
    for name, *tensors in zip(names, got, unfused, exact, strict=True):
        assert_parity(*tensors, name=name)


@pytest.mark.parametrize("dtype, most_bytes", [(torch.float32, 30 * 1024), (torch.bfloat16, 227 * 1024)])
def test_results_do_not_depend_on_the_schedule(most_bytes, dtype):
    inputs = make_inputs(1, 5, 17, 96, segments=2, dim=2, reduced=1, dtype=dtype)
    results = [
        with_gradients(Emulated(splits=2, most_bytes=most_bytes, **schedule), inputs, segments=2, dim=2)
        for schedule in SCHEDULES
    ]
    for schedule, got in zip(SCHEDULES, results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True)), schedule


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_splits_of_the_rows(splits, dtype):
    inputs = make_inputs(3, 7, 6, 24, segments=6, dim=2, dtype=dtype)
    check_parity(Emulated(splits=splits), inputs, segments=6, dim=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2])
def test_strided_tensors_between_guard_bands(dim, dtype):
    x, weight, bias, *generate, grad = make_inputs(2, 5, 6, 24, segments=3, dim=dim, dtype=dtype)
    compressed = F.linear(x, weight, bias).detach()

    def mix(*tensors, **options):
        return Emulated().mix(*tensors, **options)[0]

    def between_guards(tensor, first):
        guarded = torch.full((4, 9, 10, 48), torch.nan, dtype=dtype)
        view = guarded[1:3, 2:7, 2:8, first : first + tensor.shape[3]]
        return view.copy_(tensor.detach())

    want = with_gradients(mix, (x, compressed.requires_grad_(), *generate, grad), segments=3, dim=dim)
    for first in (8, 5):  # rows aligned to 16 bytes, and not
        columns = torch.full((2, 6, 5, 32), torch.nan, dtype=dtype)[..., 8:].transpose(1, 2)
        strided = [between_guards(t, first).requires_grad_() for t in (x, compressed)]
        got = with_gradients(mix, (*strided, *generate, columns.copy_(grad)), segments=3, dim=dim)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("trained", [{0}, {1, 2}, {3}, {4}], ids=str)
def test_frozen_inputs_and_weights(trained):
    inputs = make_inputs(2, 4, 5, 16, segments=2, dim=2, dtype=torch.bfloat16)
    check_frozen(Emulated(), inputs, set(range(5)) - trained, segments=2, dim=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", range(5))
def test_nan_and_inf_propagate_as_in_the_reference(value, where, dtype):
    *tensors, _ = (t.detach() for t in make_inputs(2, 3, 17, 6, segments=2, dim=2, dtype=dtype))
    tensors[where].view(-1)[3 if where else 40] = value  # not the first, and for x not of the first line
    got = Emulated()(*tensors, segments=2, dim=2)
    unfused = reference.dynamic_mixing(*tensors, segments=2, dim=2)
    assert torch.equal(got.isnan(), unfused.isnan())
    finite = unfused.isfinite()
    exact = reference.dynamic_mixing(*(t.double() for t in tensors), segments=2, dim=2)
    assert_parity(got[finite], unfused[finite], exact[finite])


def test_large_logits_do_not_overflow():
    x, compress_weight, *rest, _ = (t.detach() for t in make_inputs(2, 3, 5, 8, segments=2, dim=2))
    for scale in (1e4, 1e10):
        call = (x, compress_weight * scale, *rest)
        want = reference.dynamic_mixing(*call, segments=2, dim=2)
        torch.testing.assert_close(Emulated()(*call, segments=2, dim=2), want)


def test_elements_beyond_the_range_of_32_bits():
    far = 2**31 + 64
    memory = torch.empty(0, dtype=torch.bfloat16)
    memory.untyped_storage().resize_((2 * far + 256) * 2)  # pages that nobody touches take no memory
    x, *rest, _ = (t.detach() for t in make_inputs(2, 3, 3, 8, segments=2, dim=2, dtype=torch.bfloat16))
    want = Emulated()(x, *rest, segments=2, dim=2)
    for strides in ((far, 24, 8, 1), (24, far, 8, 1), (24, 8, far, 1)):
        view = memory.as_strided((1, 3, 3, 8), strides)
        view.copy_(x[:1])
        compressed = F.linear(x[:1], *rest[:2])
        got = Emulated().mix(view, compressed, *rest[2:], segments=2, dim=2)[0]
        assert torch.equal(got, want[:1])
