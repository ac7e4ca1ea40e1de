"""The two forms of single_query_attention in bfloat16 on one processor: by AMX and by vectors."""

import pytest
import torch

import tokenfusion
from tests.gradients import check_frozen, check_repeats, with_gradients
from tests.single_query_attention.cases import check, check_common_offset, make_inputs
from tokenfusion.kernels import single_query_attention

pytestmark = [pytest.mark.backend("cpu"), pytest.mark.usefixtures("amx_or_vectors")]


def inputs_of(batch, queries, tokens, channels, extra=True):
    return make_inputs(batch, queries, tokens, channels, dtype=torch.bfloat16, extra=extra)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 401, 1157])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_any_number_of_tokens(tokens, normalize, extra):
    check(inputs_of(2, 6, tokens, 64, extra), normalize=normalize)


@pytest.mark.parametrize("channels", [8, 16, 24, 32, 40, 56, 72, 384, 1000, 1024, 4096])
@pytest.mark.parametrize("normalize", [False, True])
def test_any_channels(channels, normalize):
    check(inputs_of(2, 5, 69, channels), normalize=normalize)


@pytest.mark.parametrize("queries", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 200])
def test_any_number_of_queries(queries):
    check(inputs_of(2, queries, 70, 96), normalize=True)


@pytest.mark.parametrize("extra", [False, True])
def test_lengths(extra):
    check(inputs_of(5, 6, 70, 64, extra), normalize=True, lengths=torch.tensor([0, 1, 32, 40, 70]))


@pytest.mark.parametrize("mean", [1, 30, 1000])
@pytest.mark.parametrize("channels", [24, 384])
def test_tokens_with_a_large_mean_keep_their_precision(mean, channels):
    query, tokens, extra_token, grad = inputs_of(2, 3, 50, channels)
    check((query, (tokens.detach() + mean).requires_grad_(), extra_token, grad), normalize=True)


def test_first_channels_unlike_the_others():
    query, tokens, extra_token, grad = inputs_of(2, 3, 50, 1024)
    tokens = tokens.detach().clone()
    tokens[..., :32] += 1000
    check((query, tokens.requires_grad_(), extra_token, grad), normalize=True)


@pytest.mark.parametrize("normalize", [False, True])
def test_what_all_tokens_share_is_not_in_the_gradient_of_the_query(normalize):
    check_common_offset(single_query_attention, torch.bfloat16, normalize)


def test_fifty_calls_are_bit_equal():
    check_repeats(single_query_attention, inputs_of(3, 6, 500, 64), normalize=True)


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}], ids=str)
def test_frozen_inputs(frozen):
    check_frozen(single_query_attention, inputs_of(2, 3, 70, 64), frozen, normalize=True)


@pytest.mark.parametrize("queries", [3, 20])
def test_an_image_does_not_depend_on_the_others(queries):
    inputs = inputs_of(5, queries, 100, 64)
    alone = tuple(t.detach()[3:4].requires_grad_(t.requires_grad) for t in inputs)
    of_all = with_gradients(single_query_attention, inputs, normalize=True)
    for got, want in zip(of_all, with_gradients(single_query_attention, alone, normalize=True), strict=True):
        assert torch.equal(got[3:4], want)


@pytest.mark.parametrize("channels", [32, 48])
def test_strided_tokens_are_read_in_place_and_guard_bands_not_at_all(channels):
    query, x, extra_token, grad = inputs_of(2, 3, 100, channels)
    guarded = torch.full((4, 104, channels + 24), torch.nan, dtype=torch.bfloat16)
    view = guarded[1:3, 2:102, 8 : 8 + channels]
    view.copy_(x.detach())
    got = with_gradients(single_query_attention, (query, view.requires_grad_(), extra_token, grad), normalize=True)
    want = with_gradients(single_query_attention, (query, x, extra_token, grad), normalize=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "tokens", "extra_token"])
@pytest.mark.parametrize("normalize", [False, True])
def test_nan_and_inf_propagate_as_in_the_reference(value, where, normalize):
    query, tokens, extra_token, _ = (t.detach() for t in inputs_of(3, 2, 40, 16))
    {"query": query[1, 0], "tokens": tokens[1, 7], "extra_token": extra_token[1]}[where][3] = value
    got = single_query_attention(query, tokens, extra_token, normalize=normalize)
    with tokenfusion.backend("reference"):
        want = single_query_attention(query, tokens, extra_token, normalize=normalize)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02, equal_nan=True)
