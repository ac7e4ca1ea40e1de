"""The Triton kernels of single_query_attention for more channels than fit on chip, which take fewer just as well."""

import functools

import pytest
import torch

pytest.importorskip("triton")

import tokenfusion
from tests.gradients import check_frozen, with_gradients
from tests.interpreter import DEVICE, DTYPES
from tests.single_query_attention import cases, test_packed
from tests.single_query_attention.cases import OPTIONS, check, check_common_offset
from tokenfusion.kernels import single_query_attention
from tokenfusion.kernels.single_query_attention import triton_host

pytestmark = [
    pytest.mark.backend("triton"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]
make_inputs = functools.partial(cases.make_inputs, device=DEVICE)


@pytest.fixture
def whatever_the_channels(monkeypatch):
    monkeypatch.setattr(triton_host, "MAX_CHANNELS_ON_CHIP", 0)


@pytest.mark.parametrize("dtype, channels", [(torch.float32, 1032), (torch.float32, 2048), (torch.float16, 4096)])
def test_more_channels(dtype, channels):
    check(make_inputs(1, 4, 18, channels, dtype=dtype, extra=True), normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [None, [70, 0, 33]], ids=str)
def test_options(whatever_the_channels, lengths, option, dtype):
    inputs = make_inputs(3, 20, 70, 136, dtype=dtype, extra=option["extra"])
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    check(inputs, lengths=lengths, normalize=option["normalize"])


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("bags, lengths", [([900, 3, 0], None), ([0], None), ([3, 0, 40], [3, 0, 30])], ids=str)
def test_packed_bags(whatever_the_channels, bags, lengths, extra):
    inputs = test_packed.make_inputs(bags, 3, 24, dtype=torch.float32, extra=extra, device=DEVICE)
    test_packed.check(inputs, "triton", bags=bags, lengths=lengths, normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_what_all_tokens_share_is_not_in_the_gradient_of_the_query(whatever_the_channels, normalize, dtype):
    check_common_offset(single_query_attention, dtype, normalize, DEVICE)


def test_frozen_inputs(whatever_the_channels):
    inputs = make_inputs(2, 3, 20, 16, dtype=torch.float32, extra=True)
    check_frozen(single_query_attention, inputs, {0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}, normalize=True)


def test_log_sum_exp(whatever_the_channels):
    query, tokens, *_ = (t if t is None else t.detach() for t in make_inputs(3, 2, 300, 16, dtype=torch.float32))
    lengths = torch.tensor([0, 7, 300], device=DEVICE)
    _, lse = torch.ops.tokenfusion.single_query_attention_triton(query, tokens, None, lengths, None, False, 1e-6)
    want = [(q @ t[:n].mT).logsumexp(-1) for q, t, n in zip(query, tokens, lengths)]
    torch.testing.assert_close(lse, torch.stack(want))


def test_tokens_in_a_larger_tensor_are_read_in_place(whatever_the_channels):
    query, x, _, grad = make_inputs(2, 3, 40, 24, dtype=torch.float32)
    guarded = torch.full((4, 44, 40), torch.nan, device=DEVICE)
    guarded[1:3, 2:42, 8:32] = x.detach()
    tokens = guarded[1:3, 2:42, 8:32].requires_grad_()
    got = with_gradients(single_query_attention, (query, tokens, None, grad), normalize=True)
    want = with_gradients(single_query_attention, (query, x, None, grad), normalize=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_tokens_with_a_large_mean_keep_their_precision(whatever_the_channels):
    query, tokens, extra_token, grad = make_inputs(2, 3, 50, 64, dtype=torch.float32, extra=True)
    check((query, (tokens.detach() + 1000).requires_grad_(), extra_token, grad), normalize=True)


def test_large_scores_do_not_overflow(whatever_the_channels):
    query, tokens, extra_token, _ = (t.detach() for t in make_inputs(2, 3, 50, 16, dtype=torch.float32, extra=True))
    with tokenfusion.backend("reference"):
        want = single_query_attention(query * 1e4, tokens, extra_token)
    torch.testing.assert_close(single_query_attention(query * 1e4, tokens, extra_token), want)
