"""The Triton kernels of tied_ffn against the reference: in the interpreter, or on a GPU where there is one."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from tests.gradients import check_frozen, with_gradients
from tests.interpreter import DEVICE, DTYPES
from tests.tied_ffn import cases
from tests.tied_ffn.cases import check
from tokenfusion.kernels import tied_ffn
from tokenfusion.kernels.tied_ffn import reference, triton_host

pytestmark = pytest.mark.backend("triton")

make_inputs = functools.partial(cases.make_inputs, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("recompute", [True, False])
def test_activations(activation, dtype, recompute):
    inputs = make_inputs(2, 20, channels=24, features=50, dtype=dtype)
    check(inputs, activation=activation, recompute=recompute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, features", [(1, 1), (7, 13), (130, 70), (136, 40)])
def test_any_widths(channels, features, dtype):
    check(make_inputs(3, 20, channels=channels, features=features, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 31, 150])
def test_any_number_of_tokens_in_several_splits(tokens, dtype, monkeypatch):
    monkeypatch.setattr(triton_host, "ROWS_PER_SPLIT", 32)
    check(make_inputs(tokens, channels=16, features=24, dtype=dtype))


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("channels", [16, 136])
def test_biases_may_be_absent(biases, channels):
    check(make_inputs(2, 10, channels=channels, features=24, dtype=torch.float32, biases=biases))


@pytest.mark.parametrize("frozen", [{0}, {1}, {2, 3}, {0, 1, 2}], ids=str)
def test_frozen_inputs(frozen):
    inputs = make_inputs(2, 10, channels=16, features=24, dtype=torch.float32)
    check_frozen(tied_ffn, inputs, frozen)


def test_views_and_expanded_gradients():
    x, weight, bias_in, bias_out, _ = make_inputs(2, 10, channels=16, features=24, dtype=torch.float32)
    view = x.transpose(0, 1)[1:]
    got = with_gradients(
        tied_ffn, (view, weight.t().contiguous().t(), bias_in, bias_out, torch.ones((), device=DEVICE).expand(9, 2, 16))
    )
    want = with_gradients(tied_ffn, (view.contiguous(), weight, bias_in, bias_out, torch.ones(9, 2, 16, device=DEVICE)))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_empty_batch():
    y, *grads = with_gradients(tied_ffn, make_inputs(0, 20, channels=16, features=24, dtype=torch.float32))
    assert y.shape == (0, 20, 16) and all((g == 0).all() for g in grads)


def test_opcheck():
    *tensors, grad = make_inputs(2, 5, channels=8, features=12, dtype=torch.float32)
    torch.library.opcheck(torch.ops.tokenfusion.tied_ffn_triton, (*tensors, "gelu", True))
    _, hidden = torch.ops.tokenfusion.tied_ffn_triton(*tensors, "gelu", True)
    arguments = (grad, *tensors[:3], hidden.detach(), "gelu", [True] * 4)
    torch.library.opcheck(torch.ops.tokenfusion.tied_ffn_backward_triton, arguments)
