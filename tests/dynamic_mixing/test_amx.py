"""The two forms of dynamic_mixing in bfloat16 on one processor: by AMX and by vectors."""

import pytest
import torch

from tests.dynamic_mixing.cases import check, make_inputs
from tests.gradients import check_frozen, check_repeats, in_float64, with_gradients
from tokenfusion.kernels import dynamic_mixing
from tokenfusion.kernels.dynamic_mixing import reference
from tokenfusion.kernels.dynamic_mixing.op import mix

pytestmark = [pytest.mark.backend("cpu"), pytest.mark.usefixtures("amx_or_vectors")]


def inputs_of(batch, height, width, channels, **options):
    return make_inputs(batch, height, width, channels, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 7, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64])
def test_any_number_of_tokens(tokens, dim):
    height, width = (tokens, 5) if dim == 1 else (5, tokens)
    check(inputs_of(2, height, width, 36, segments=12, dim=dim), segments=12, dim=dim)


@pytest.mark.parametrize(
    "channels, segments",
    [(33, 1), (40, 1), (64, 2), (62, 2), (96, 3), (195, 5), (192, 8), (96, 12), (48, 48), (70, 70)],
)
def test_any_segments(channels, segments):
    check(inputs_of(2, 7, 18, channels, segments=segments, dim=2), segments=segments, dim=2)


@pytest.mark.parametrize("reduced", [1, 2, 3, 5, 8, 16])
def test_any_reduced_dimension(reduced):
    check(inputs_of(3, 20, 9, 32, segments=8, dim=1, reduced=reduced), segments=8, dim=1)


@pytest.mark.parametrize("batch, threads", [(1, 1), (1, 2), (3, 1), (5, 2), (7, 3)])
def test_any_batch_and_threads(batch, threads, set_threads):
    set_threads(threads)
    check(inputs_of(batch, 9, 12, 48, segments=6, dim=1), segments=6, dim=1)


@pytest.mark.parametrize("trained", [{0}, {1}, {2}, {3}, {4}, {0, 3}, {1, 2, 3, 4}], ids=str)
def test_frozen_inputs_and_weights(trained):
    inputs = inputs_of(2, 18, 5, 48, segments=6, dim=1)
    check_frozen(dynamic_mixing, inputs, set(range(5)) - trained, segments=6, dim=1)


def test_fifty_calls_are_bit_equal():
    check_repeats(dynamic_mixing, inputs_of(3, 18, 18, 48, segments=3, dim=1), segments=3, dim=1)


@pytest.mark.parametrize("dim", [1, 2])
def test_an_image_does_not_depend_on_the_others(dim):
    x, *weights, grad = inputs_of(5, 18, 20, 48, segments=6, dim=dim)
    weights = [weight.detach() for weight in weights]
    alone = x.detach()[3:4].requires_grad_(), *weights, grad[3:4]
    of_all = with_gradients(dynamic_mixing, (x, *weights, grad), segments=6, dim=dim)
    for got, want in zip(of_all, with_gradients(dynamic_mixing, alone, segments=6, dim=dim), strict=False):
        assert torch.equal(got[3:4], want)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("width", [24, 32, 13])
def test_guard_bands_are_not_read(width, dim):
    """Of tokens, compressed tokens and gradients, whose rows end anywhere."""
    channels = 3 * width
    x, weight, bias, *generate, grad = (t.detach() for t in inputs_of(2, 17, 18, channels, segments=3, dim=dim))
    compressed = torch.nn.functional.linear(x, weight, bias)

    def guarded(tensor):
        memory = torch.full((4, 21, 22, tensor.shape[3] + 10), torch.nan, dtype=tensor.dtype)
        view = memory[1:3, 2:19, 3:21, 4:-6]
        return view.copy_(tensor)

    def run(*tensors):
        *inputs, grad = tensors
        inputs = [t.requires_grad_() for t in inputs]
        mixed, mean = mix(*inputs, *generate, segments=3, dim=dim, with_mean=True)
        return mixed, mean, *torch.autograd.grad((mixed, mean), inputs, (grad, torch.ones_like(mean)))

    got = run(*map(guarded, (x, compressed, grad)))
    for a, b in zip(got, run(x, compressed, grad), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", range(5))
def test_nan_and_inf_propagate_as_in_the_definition(value, where):
    """In float64: PyTorch's product in bfloat16 spreads a NaN over other rows."""
    inputs = *tensors, _ = inputs_of(2, 3, 17, 36, segments=3, dim=2)
    with torch.no_grad():
        tensors[where].view(-1)[3 if where else 40] = value  # not the first, and for x not of the first line
    got = with_gradients(dynamic_mixing, inputs, segments=3, dim=2)
    want = with_gradients(reference.dynamic_mixing, in_float64(inputs), segments=3, dim=2)
    assert torch.equal(got[0].isnan(), want[0].isnan())
    torch.testing.assert_close(got[0].double(), want[0], rtol=0.02, atol=0.02, equal_nan=True)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


def test_large_logits_do_not_overflow():
    x, compress_weight, *rest, _ = (t.detach() for t in inputs_of(2, 3, 17, 8, segments=2, dim=2))
    call = (x, compress_weight * 1e4, *rest)
    want = reference.dynamic_mixing(*(t.double() for t in call), segments=2, dim=2)
    got = dynamic_mixing(*call, segments=2, dim=2)
    assert got.isfinite().all() and (got - want).abs().mean() < 0.05 * want.abs().mean()
