"""The CUDA kernels of single_query_attention in the emulated GPU, against the reference: their mathematics, indices and
barriers, without a GPU."""

import shutil

import pytest
import torch

from tests.emulation import COMPILER, DTYPES, SCHEDULES
from tests.gradients import check_frozen, with_gradients
from tests.parity import assert_parity
from tests.single_query_attention.cases import check_parity, make_inputs
from tests.single_query_attention.emulated import Emulated, first_tiles, planned_bytes
from tokenfusion.kernels.single_query_attention import reference

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER})")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("channels, queries", [(16, 1), (96, 3), (192, 6), (224, 8), (384, 6), (768, 12), (256, 32)])
def test_any_channels_and_queries(channels, queries, normalize, dtype):
    check_parity(Emulated(), make_inputs(1, queries, 21, channels, dtype=dtype, extra=True), normalize=normalize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 15, 16, 17, 65, 197])
def test_any_number_of_tokens(tokens, extra, dtype):
    check_parity(Emulated(), make_inputs(2, 3, tokens, 32, dtype=dtype, extra=extra), normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_a_block_fits_where_its_smallest_form_does(kilobytes, dtype):
    most = kilobytes * 1024
    for queries, widest in ((8, 1024), (16, 768 if dtype == torch.float32 else 1024), (32, 512)):
        fitting = [c for c in range(64, widest + 1, 64) if planned_bytes(c, queries, 1, dtype, True, most) <= most]
        assert fitting
        for channels in fitting:
            for backward in (False, True):
                assert planned_bytes(channels, queries, 4000, dtype, backward, most) <= most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits, groups, stages", [(1, 1, 2), (1, 3, 4), (2, 1, 3), (3, 2, 2), (5, 4, 4)])
def test_splits_groups_and_stages(splits, groups, stages, dtype):
    emulated = Emulated(splits=splits, groups=groups, stages=stages)
    check_parity(emulated, make_inputs(2, 5, 90, 96, dtype=dtype, extra=True), normalize=True)


@pytest.mark.parametrize("rows", [1, 16 * 264, 20_000_000, 2**30 - 1])
def test_blocks_share_all_rows(rows):
    splits = -(-rows // 8192)
    first = first_tiles(rows, splits)
    assert first[0] == 0 and first[-1] == -(-rows // 16)
    assert all(0 <= b - a <= 8192 // 16 for a, b in zip(first, first[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stages", [2, 4])
def test_results_do_not_depend_on_the_schedule(stages, dtype):
    inputs = make_inputs(1, 6, 150, 144, dtype=dtype, extra=True)
    results = [
        with_gradients(Emulated(splits=2, groups=2, stages=stages, **schedule), inputs, normalize=True)
        for schedule in SCHEDULES
    ]
    for schedule, got in zip(SCHEDULES, results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True)), schedule


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tokens_between_guard_bands(dtype):
    query, x, extra_token, grad = make_inputs(2, 3, 40, 64, dtype=dtype, extra=True)
    guarded = torch.full((4, 44, 96), torch.nan, dtype=dtype)
    guarded[1:3, 2:42, 16:80] = x.detach()
    inside = guarded[1:3, 2:42, 16:80]
    views = {
        "a slice of tokens": (inside[:, 1:], x[:, 1:]),
        "every other token": (inside[:, ::2], x[:, ::2]),
        "tokens before batch": (x.transpose(0, 1).contiguous().transpose(0, 1), x),
        "one token for all": (inside[:, :1].expand(-1, 9, -1), x[:, :1].expand(-1, 9, -1)),
        "one image for all": (inside[:1].expand(2, -1, -1), x[:1].expand(2, -1, -1)),
    }
    for name, (view, same) in views.items():
        results = [
            with_gradients(Emulated(), (query, tokens.detach().requires_grad_(), extra_token, grad), normalize=True)
            for tokens in (view, same.contiguous())
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


def test_query_and_extra_token_of_any_strides():
    inputs = make_inputs(2, 3, 20, 32, dtype=torch.float16, extra=True)
    query, tokens, extra_token, grad = inputs
    steps = torch.stack((query, query), 2)[:, :, 1]
    both = torch.cat((extra_token, extra_token), 1)[:, 32:]
    strided = (t.detach().requires_grad_() for t in (steps, tokens, both))
    for a, b in zip(with_gradients(Emulated(), inputs), with_gradients(Emulated(), (*strided, grad)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}], ids=str)
def test_frozen_inputs(frozen, splits):
    inputs = make_inputs(2, 3, 36, 32, dtype=torch.bfloat16, extra=True)
    check_frozen(Emulated(splits=splits), inputs, frozen, normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean, scale", [(1000, 1), (0, 100), (0, 0.01), (-300, 30)])
def test_tokens_of_any_mean_and_scale(mean, scale, dtype):
    query, tokens, extra_token, grad = make_inputs(2, 3, 50, 64, dtype=dtype, extra=True)
    moved = (tokens.detach() * scale + mean).requires_grad_()
    check_parity(Emulated(), (query, moved, extra_token, grad), normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_all_tokens_share_does_not_reach_the_gradient_of_the_query(dtype):
    query, tokens, extra_token, grad = make_inputs(2, 3, 100, 64, dtype=dtype, extra=True)
    moved = (tokens.detach() + 30).requires_grad_()
    check_parity(Emulated(), (query, moved, (extra_token.detach() + 30).requires_grad_(), grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_without_variance_and_with_outliers(dtype):
    query, tokens, extra_token, grad = make_inputs(2, 3, 50, 64, dtype=dtype, extra=True)
    tokens = tokens.detach()
    tokens[0, 5:9] = 0
    tokens[1, 20] = 3
    tokens[:, 7, 0] = 60
    tokens[:, 11, 63] = -60
    check_parity(Emulated(), (query, tokens.requires_grad_(), extra_token, grad), normalize=True)


def test_long_sums_keep_their_precision():
    inputs = make_inputs(1, 2, 8192, 16, dtype=torch.float32)
    check_parity(Emulated(groups=1), inputs, normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "tokens", "extra_token"])
@pytest.mark.parametrize("normalize", [False, True])
def test_nan_and_inf_propagate_as_in_the_reference(value, where, normalize, dtype):
    query, tokens, extra_token, _ = (t.detach() for t in make_inputs(2, 2, 20, 16, dtype=dtype, extra=True))
    {"query": query[1, 0], "tokens": tokens[1, 7], "extra_token": extra_token[1]}[where][3] = value
    got = Emulated()(query, tokens, extra_token, normalize=normalize)
    unfused = reference.single_query_attention(query, tokens, extra_token, normalize=normalize)
    assert torch.equal(got.isnan(), unfused.isnan())
    exact = (t.double() for t in (query, tokens, extra_token))
    exact = reference.single_query_attention(*exact, normalize=normalize)
    finite = ~unfused.isnan()
    assert_parity(got[finite], unfused[finite], exact[finite])


def test_large_scores_do_not_overflow():
    query, tokens, extra_token, _ = (t.detach() for t in make_inputs(2, 3, 50, 16, dtype=torch.float32, extra=True))
    for scale in (1e4, 1e10):
        want = reference.single_query_attention(query * scale, tokens, extra_token)
        torch.testing.assert_close(Emulated(splits=2)(query * scale, tokens, extra_token), want)


def test_elements_beyond_the_range_of_32_bits():
    channels, tokens, far = 16, 20, 2**31 + 128
    memory = torch.empty(0, dtype=torch.bfloat16)
    memory.untyped_storage().resize_(4 * (far + channels * tokens))  # pages that nobody touches take no memory
    query, values, _, _ = (
        t if t is None else t.detach() for t in make_inputs(2, 2, tokens, channels, dtype=torch.bfloat16)
    )
    for n, stride_b, stride_n in ((tokens, far, channels), (tokens, channels, far // 16), (2, channels, far)):
        x = memory.as_strided((2, n, channels), (stride_b, stride_n, 1))
        x.copy_(values[:, :n])
        assert torch.equal(Emulated()(query, x), Emulated()(query, values[:, :n].contiguous()))
