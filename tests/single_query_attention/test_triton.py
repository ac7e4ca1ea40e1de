"""The Triton kernels of single_query_attention against the reference: in the interpreter, or on a GPU."""

import functools

import pytest
import torch

pytest.importorskip("triton")

import tokenfusion
from tests.gradients import check_frozen, with_gradients
from tests.interpreter import DEVICE, DTYPES, rounding_as_a_gpu
from tests.single_query_attention import cases
from tests.single_query_attention.cases import check, check_common_offset, check_parity
from tokenfusion.kernels import single_query_attention
from tokenfusion.kernels.single_query_attention import triton_host

pytestmark = pytest.mark.backend("triton")

make_inputs = functools.partial(cases.make_inputs, device=DEVICE)
OPTIONS = [dict(normalize=normalize, extra=extra) for normalize in (False, True) for extra in (False, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 197])
def test_any_number_of_tokens(tokens, dtype):
    check(make_inputs(2, 6, tokens, 24, dtype=dtype, extra=True), normalize=True)


@pytest.mark.parametrize("tokens", [401, 577, 1157])
@pytest.mark.parametrize("splits", [1, 4])
def test_many_tokens_in_few_splits(tokens, splits, monkeypatch):
    monkeypatch.setattr(triton_host, "MAX_SPLITS", splits)
    check(make_inputs(1, 3, tokens, 16, dtype=torch.float32, extra=True), normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_options(option, dtype):
    inputs = make_inputs(2, 6, 70, 48, dtype=dtype, extra=option["extra"])
    check(inputs, normalize=option["normalize"])


@pytest.mark.parametrize("channels", [8, 24, 96, 128, 192, 224, 384, 768, 1000])
def test_any_channels(channels):
    check(make_inputs(1, 4, 18, channels, dtype=torch.float32, extra=True), normalize=True)


@pytest.mark.parametrize("channels", [96, 224, 448])
def test_any_channels_in_half_precision(channels):
    check(make_inputs(1, 4, 18, channels, dtype=torch.float16, extra=True), normalize=True)


@pytest.mark.parametrize("queries", [1, 3, 12, 17, 64, 70])
def test_any_number_of_queries(queries):
    check(make_inputs(2, queries, 40, 40, dtype=torch.float32, extra=True), normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_queries_over_many_channels_run_in_blocks(dtype):
    assert triton_host._query_block(40, 520) == 16
    check(make_inputs(1, 40, 18, 520, dtype=dtype, extra=True), normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_what_all_tokens_share_is_not_in_the_gradient_of_the_query(normalize, dtype):
    check_common_offset(single_query_attention, dtype, normalize, DEVICE)


def test_splits_cover_every_block_and_none_is_empty():
    for batch in (1, 2, 7, 64, 256, 1000):
        for blocks in (1, 2, 5, 13, 40, 1000):
            splits, each = triton_host._splits(batch, blocks, torch.device(DEVICE))
            assert (splits - 1) * each < blocks <= splits * each and 1 <= splits <= triton_host.MAX_SPLITS


def test_chunks_pad_little():
    for channels in (96, 128, 192, 224, 256, 384, 448, 768):
        for itemsize in (2, 4):
            for backward in (False, True):
                widest, *_ = triton_host._tile(channels, itemsize, backward)
                assert channels % triton_host._chunk(channels, widest) == 0, (channels, itemsize, backward)


def test_strided_tokens_are_read_in_place():
    query, x, extra_token, grad = make_inputs(3, 4, 40, 64, dtype=torch.float32, extra=True)
    views = {
        "slice of tokens": x[:, 1:],
        "every other token": x[:, ::2],
        "slice of channels": x[..., 8:48],
        "tokens before batch": x.transpose(0, 1).contiguous().transpose(0, 1),
        "one token for all": x[:, :1].expand(-1, 9, -1),
        "one image for all": x[:1].expand(3, -1, -1),
        "odd strides": torch.nn.functional.pad(x, (0, 1))[..., :64],
    }
    for name, tokens in views.items():
        channels = tokens.shape[2]
        arguments = query[..., :channels], tokens, extra_token[..., :channels]
        results = []
        for inputs in (arguments, [t.contiguous() for t in arguments]):
            context = single_query_attention(*inputs, normalize=True)
            present = (query, x, extra_token)
            results.append([context, *torch.autograd.grad(context, present, grad[..., :channels], retain_graph=True)])
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected), name


def test_only_aligned_rows_are_promised_to_the_compiler():
    def unit(tokens, extra_token=None):
        return triton_host._plan(tokens, tokens, extra_token, None, None, False, 1e-6, backward=False)[1]["STRIDE_UNIT"]

    x = torch.zeros(2, 8, 32, dtype=torch.float16, device=DEVICE)
    assert unit(x) == unit(x[:, 1:]) == unit(x[..., 8:16]) == unit(x, x[:, 0]) == 8
    assert unit(x[..., 4:12]) == unit(x[..., :8], x[:, 0, 4:12]) == unit(x.view(2, 64, 4)[:, ::3]) == 1


def test_query_and_gradient_of_any_strides():
    query, tokens, extra_token, grad = make_inputs(2, 3, 20, 16, dtype=torch.float32, extra=True)
    expected = with_gradients(single_query_attention, (query, tokens, extra_token, grad))
    inputs = [t.mT.contiguous().mT for t in (query, tokens, grad)]
    inputs[1] = tokens
    stepped = torch.stack((extra_token, extra_token), -1)[..., 0]
    got = with_gradients(single_query_attention, (inputs[0], tokens, stepped, inputs[2]))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    ones = torch.ones((), device=DEVICE).expand(grad.shape)
    got, expected = (
        with_gradients(single_query_attention, (query, tokens, None, g)) for g in (ones, ones.contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}], ids=str)
def test_frozen_inputs(frozen):
    inputs = make_inputs(2, 3, 20, 16, dtype=torch.float32, extra=True)
    check_frozen(single_query_attention, inputs, frozen, normalize=True)


def test_unneeded_gradients_are_empty():
    query, tokens, extra_token, grad = (t.detach() for t in make_inputs(2, 3, 40, 16, dtype=torch.float32, extra=True))
    context, lse = torch.ops.tokenfusion.single_query_attention_triton(
        query, tokens, extra_token, None, None, True, 1e-6
    )
    for needed in ([True, False, False], [False, True, False], [False, False, True]):
        grads = torch.ops.tokenfusion.single_query_attention_backward_triton(
            grad, query, tokens, extra_token, None, None, context, lse, True, 1e-6, needed
        )
        assert [g.numel() > 0 for g in grads] == needed


@pytest.mark.parametrize("extra", [False, True])
def test_log_sum_exp(extra):
    query, tokens, extra_token, _ = make_inputs(2, 3, 100, 16, dtype=torch.float32, extra=extra)
    _, lse = torch.ops.tokenfusion.single_query_attention_triton(query, tokens, extra_token, None, None, False, 1e-6)
    keys = tokens if extra_token is None else torch.cat((extra_token[:, None], tokens), 1)
    torch.testing.assert_close(lse, (query @ keys.mT).logsumexp(-1))


def test_guard_bands_are_not_read():
    query, x, _, grad = make_inputs(2, 3, 40, 24, dtype=torch.float32)
    guarded = torch.full((4, 44, 40), torch.nan, device=DEVICE)
    guarded[1:3, 2:42, 8:32] = x.detach()
    tokens = guarded[1:3, 2:42, 8:32].requires_grad_()
    got = with_gradients(single_query_attention, (query, tokens, None, grad), normalize=True)
    want = with_gradients(single_query_attention, (query, x, None, grad), normalize=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("extra", [False, True])
def test_empty_batch(extra):
    inputs = make_inputs(0, 3, 20, 16, dtype=torch.float32, extra=extra)
    context, *grads = with_gradients(single_query_attention, inputs, normalize=True)
    assert context.shape == (0, 3, 16)
    assert [g.shape for g in grads] == [t.shape for t in inputs[:3] if t is not None]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "tokens", "extra_token"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_inf_propagate_as_in_the_reference(value, where, normalize):
    inputs = make_inputs(2, 2, 50, 16, dtype=torch.float32, extra=True)
    query, tokens, extra_token, _ = (t.detach() for t in inputs)
    {"query": query[1, 0], "tokens": tokens[1, 7], "extra_token": extra_token[1]}[where][3] = value
    got = single_query_attention(query, tokens, extra_token, normalize=normalize)
    with tokenfusion.backend("reference"):
        want = single_query_attention(query, tokens, extra_token, normalize=normalize)
    torch.testing.assert_close(got, want, equal_nan=True)


def test_large_scores_do_not_overflow():
    query, tokens, extra_token, _ = (t.detach() for t in make_inputs(2, 3, 50, 16, dtype=torch.float32, extra=True))
    with tokenfusion.backend("reference"):
        want = single_query_attention(query * 1e4, tokens, extra_token)
    torch.testing.assert_close(single_query_attention(query * 1e4, tokens, extra_token), want)


def test_tokens_with_a_large_mean_keep_their_precision():
    query, tokens, extra_token, grad = make_inputs(2, 3, 50, 64, dtype=torch.float32, extra=True)
    check_parity(
        single_query_attention, (query, (tokens.detach() + 1000).requires_grad_(), extra_token, grad), normalize=True
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="for the interpreter; a GPU rounds so by itself")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("channels, queries", [(32, 3), (96, 3), (192, 6), (1040, 3)])
def test_float32_on_a_gpu_is_as_exact_as_eager(channels, queries, seed):
    batch = max(2, 256 // channels)  # of fewer elements the largest error is a matter of chance
    inputs = make_inputs(batch, queries, 41, channels, dtype=torch.float32, extra=True, seed=seed)
    with rounding_as_a_gpu(seed):
        check(inputs, normalize=True)


def test_elements_beyond_the_range_of_32_bits():
    channels, tokens, far = 8, 20, 2**31 + 64
    memory = torch.empty(0, dtype=torch.float16, device=DEVICE)
    memory.untyped_storage().resize_(4 * (far + channels * tokens))  # pages that nobody touches take no memory
    query, values, _, _ = (
        t if t is None else t.detach() for t in make_inputs(2, 2, tokens, channels, dtype=torch.float16)
    )
    for n, stride_b, stride_n in ((tokens, far, channels), (tokens, channels, far // 16), (2, channels, far)):
        x = memory.as_strided((2, n, channels), (stride_b, stride_n, 1))
        x.copy_(values[:, :n])
        assert torch.equal(single_query_attention(query, x), single_query_attention(query, values[:, :n]))


def test_opcheck():
    query, tokens, extra_token, grad = make_inputs(2, 3, 5, 16, dtype=torch.float32, extra=True)
    torch.library.opcheck(
        torch.ops.tokenfusion.single_query_attention_triton, (query, tokens, extra_token, None, None, True, 1e-6)
    )
    context, lse = torch.ops.tokenfusion.single_query_attention_triton(
        query, tokens, extra_token, None, None, True, 1e-6
    )
    arguments = (grad, query, tokens, extra_token, None, None, context.detach(), lse, True, 1e-6, [True, True, True])
    torch.library.opcheck(torch.ops.tokenfusion.single_query_attention_backward_triton, arguments)
