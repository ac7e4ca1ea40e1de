"""The C++ kernels of single_query_attention against the reference."""

import functools

import pytest
import torch

import tokenfusion
from tests.gradients import check_frozen, check_repeats, in_float64, with_gradients
from tests.parity import assert_trains
from tests.single_query_attention.cases import (
    check,
    check_common_offset,
    check_every_float16,
    check_parity,
    make_inputs,
)
from tokenfusion.kernels import single_query_attention

pytestmark = pytest.mark.backend("cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = [dict(normalize=normalize, extra=extra) for normalize in (False, True) for extra in (False, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 197, 401, 577, 1157])
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_any_number_of_tokens(tokens, dtype, option):
    inputs = make_inputs(2, 6, tokens, 48, dtype=dtype, extra=option["extra"])
    check(inputs, normalize=option["normalize"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 24, 96, 128, 192, 224, 256, 384, 448, 768, 1000, 1152, 2048, 4096])
def test_any_channels(channels, dtype):
    check(make_inputs(3, 4, 37, channels, dtype=dtype, extra=True), normalize=True)


def with_means(inputs, mean, every, query_mean, dtype):
    """Tokens less their own mean, plus so many of their standard deviations for one in `every`."""
    query, tokens, *others = inputs
    with torch.no_grad():
        query += query_mean * query.std()
        tokens -= tokens.mean(2, keepdim=True)
        tokens[:, ::every] += mean * tokens[:, ::every].std(2, keepdim=True)
    return [None if x is None else x.detach().to(dtype).requires_grad_() for x in (query, tokens, *others)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 0.45, -0.49, 0.55, 10.0])
@pytest.mark.parametrize("query_mean", [0.0, 3.0])
@pytest.mark.parametrize("every", [1, 40], ids=["all", "some"])
def test_means_of_tokens(every, query_mean, mean, dtype):
    """Tokens lie in place where their means are small beside their deviation, and are copied less the means else."""
    inputs = make_inputs(3, 6, 120, 64, dtype=torch.float64)
    check(with_means(inputs, mean, every, query_mean, dtype), normalize=True)


@pytest.mark.parametrize("mean", [0.3, -0.49, 0.55])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_means_of_many_tokens(scale, mean):
    """Whose sum would be large beside what is left."""
    inputs = with_means(make_inputs(1, 3, 4000, 384, dtype=torch.float64), mean, 1, 0.0, torch.float32)
    with torch.no_grad():
        inputs[0] *= scale
    check(inputs, normalize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [0.1, -3.7, 1000.7])
def test_tokens_of_equal_elements_are_zeros(value, dtype):
    query, tokens, *_ = make_inputs(2, 3, 40, 384, dtype=dtype)
    with torch.no_grad():
        assert not single_query_attention(query, torch.full_like(tokens, value), normalize=True).any()


def test_every_float16():
    check_every_float16(single_query_attention)


def test_long_sums_keep_their_precision():
    inputs = make_inputs(8, 2, 40_000, 8, dtype=torch.float32)
    actual = with_gradients(single_query_attention, inputs, normalize=True)
    exact = with_gradients(single_query_attention, in_float64(inputs), normalize=True)
    for got, want in zip(actual, exact):
        assert (got - want).abs().max() < 8 * torch.finfo(torch.float32).eps * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 2, 3, 7, 12, 63, 64, 129, 300, 1024])
def test_any_number_of_queries(queries, dtype):
    check(make_inputs(2, queries, 50, 40, dtype=dtype, extra=True), normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_many_queries_run_in_blocks_over_parts_of_bags(normalize, dtype):
    inputs = make_inputs(3, 37, 2100, 2048, dtype=dtype, extra=True)
    check(inputs, lengths=torch.tensor([2100, 0, 70]), normalize=normalize)


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 1}, {1, 2}], ids=str)
def test_frozen_inputs_with_many_queries(frozen):
    inputs = make_inputs(2, 300, 20, 16, dtype=torch.bfloat16, extra=True)
    check_frozen(single_query_attention, inputs, frozen, normalize=True)


@pytest.mark.parametrize("batch", [1, 2, 5, 7, 8, 33])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_batches_split_over_tokens_or_not(batch, threads, set_threads):
    set_threads(threads)
    check(make_inputs(batch, 3, 700, 24, dtype=torch.float32, extra=True), normalize=True)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck_and_second_order(normalize):
    query, tokens, extra_token, _ = make_inputs(2, 3, 5, 8, dtype=torch.float64, extra=True)
    function = functools.partial(single_query_attention, normalize=normalize)
    assert torch.autograd.gradcheck(function, (query, tokens, extra_token))
    assert torch.autograd.gradgradcheck(function, (query, tokens, extra_token))


@pytest.mark.parametrize("extra", [False, True])
def test_opcheck(extra):
    query, tokens, extra_token, grad = make_inputs(2, 3, 5, 16, dtype=torch.float32, extra=extra)
    torch.library.opcheck(
        torch.ops.tokenfusion.single_query_attention_cpu, (query, tokens, extra_token, None, None, True, 1e-6)
    )
    context, lse = torch.ops.tokenfusion.single_query_attention_cpu(query, tokens, extra_token, None, None, True, 1e-6)
    arguments = (grad, query, tokens, extra_token, None, None, context.detach(), lse, True, 1e-6, [True, True, extra])
    torch.library.opcheck(torch.ops.tokenfusion.single_query_attention_backward_cpu, arguments)


def test_strided_tokens_are_read_in_place():
    query, x, extra_token, grad = make_inputs(3, 4, 60, 64, dtype=torch.float32, extra=True)
    views = {
        "slice of tokens": x[:, 1:],
        "every other token": x[:, ::2],
        "slice of channels": x[..., 8:48],
        "tokens before batch": x.transpose(0, 1).contiguous().transpose(0, 1),
        "one token for all": x[:, :1].expand(-1, 9, -1),
        "one image for all": x[:1].expand(3, -1, -1),
    }
    for name, tokens in views.items():
        channels = tokens.shape[2]
        arguments = query[..., :channels], tokens, extra_token[..., :channels]
        view = single_query_attention(*arguments, normalize=True)
        copied = single_query_attention(*(t.contiguous() for t in arguments), normalize=True)
        assert torch.equal(view, copied), name
        present = [query, x, extra_token]
        gradients = [torch.autograd.grad(out, present, grad[..., :channels]) for out in (view, copied)]
        for got, expected in zip(*gradients):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, msg=name)


def test_forward_allocates_nothing_of_the_size_of_the_tokens():
    from tokenfusion.measure import peak_extra_bytes

    query, x, _, _ = make_inputs(2, 6, 4098, 64, dtype=torch.float32)
    with torch.no_grad():
        peak = peak_extra_bytes(lambda: single_query_attention(query, x[:, 1:], normalize=True))
    assert peak < 0.05 * x.nbytes


def test_backward_over_frozen_tokens_allocates_nothing_of_their_size():
    from tokenfusion.measure import peak_extra_bytes

    query, x, _, grad = make_inputs(2, 6, 4098, 64, dtype=torch.float32)
    x = x.detach()
    peak = peak_extra_bytes(lambda: torch.autograd.grad(single_query_attention(query, x, normalize=True), query, grad))
    assert peak < 0.05 * x.nbytes


def test_query_and_gradient_of_any_strides():
    query, tokens, _, grad = make_inputs(2, 6, 30, 32, dtype=torch.float32)
    expected = with_gradients(single_query_attention, (query, tokens, None, grad), normalize=True)
    transposed = query.transpose(0, 2).contiguous().transpose(0, 2)
    actual = with_gradients(
        single_query_attention,
        (transposed, tokens, None, grad.transpose(1, 2).contiguous().transpose(1, 2)),
        normalize=True,
    )
    for got, want in zip(actual, expected):
        assert torch.equal(got, want)
    expanded = torch.ones((), dtype=torch.float32).expand(grad.shape)
    got = with_gradients(single_query_attention, (query, tokens, None, expanded), normalize=True)
    want = with_gradients(single_query_attention, (query, tokens, None, expanded.contiguous()), normalize=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_guard_bands_are_not_read():
    query, x, _, grad = make_inputs(2, 3, 40, 24, dtype=torch.float32)
    guarded = torch.full((4, 44, 40), torch.nan)
    guarded[1:3, 2:42, 8:32] = x.detach()
    tokens = guarded[1:3, 2:42, 8:32].requires_grad_()
    got = with_gradients(single_query_attention, (query, tokens, None, grad), normalize=True)
    want = with_gradients(single_query_attention, (query, x, None, grad), normalize=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}], ids=str)
def test_frozen_inputs(frozen):
    inputs = make_inputs(2, 3, 20, 16, dtype=torch.float32, extra=True)
    check_frozen(single_query_attention, inputs, frozen, normalize=True)


@pytest.mark.parametrize("extra", [False, True])
def test_empty_batch(extra):
    inputs = make_inputs(0, 3, 20, 16, dtype=torch.float32, extra=extra)
    context, *grads = with_gradients(single_query_attention, inputs, normalize=True)
    assert context.shape == (0, 3, 16)
    assert [g.shape for g in grads] == [t.shape for t in inputs[:3] if t is not None]


def test_fifty_calls_are_bit_equal():
    inputs = make_inputs(3, 6, 500, 64, dtype=torch.float32, extra=True)
    check_repeats(single_query_attention, inputs, normalize=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "tokens", "extra_token"])
@pytest.mark.parametrize("normalize", [False, True])
def test_nan_and_inf_propagate_as_in_the_reference(value, where, normalize):
    query, tokens, extra_token, _ = (t.detach() for t in make_inputs(3, 2, 20, 16, dtype=torch.float32, extra=True))
    {"query": query[1, 0], "tokens": tokens[1, 7], "extra_token": extra_token[1]}[where][3] = value
    got = single_query_attention(query, tokens, extra_token, normalize=normalize)
    with tokenfusion.backend("reference"):
        want = single_query_attention(query, tokens, extra_token, normalize=normalize)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, equal_nan=True)


def test_large_scores_do_not_overflow():
    query, tokens, extra_token, _ = (t.detach() for t in make_inputs(2, 3, 50, 16, dtype=torch.float32, extra=True))
    for scale in (1e4, 1e10):
        with tokenfusion.backend("reference"):
            want = single_query_attention(query * scale, tokens, extra_token)
        torch.testing.assert_close(single_query_attention(query * scale, tokens, extra_token), want)


def test_tokens_with_a_large_mean_keep_their_precision():
    query, tokens, extra_token, grad = make_inputs(2, 3, 50, 64, dtype=torch.float32, extra=True)
    inputs = query, (tokens.detach() + 1000).requires_grad_(), extra_token, grad
    check_parity(single_query_attention, inputs, normalize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_all_tokens_share_is_not_in_the_gradient_of_the_query(normalize, dtype):
    check_common_offset(single_query_attention, dtype, normalize)


def test_elements_beyond_the_range_of_32_bits():
    channels, tokens, far = 8, 20, 2**31 + 64
    memory = torch.empty(0, dtype=torch.bfloat16)
    memory.untyped_storage().resize_((far + channels * tokens) * 2)  # pages that nobody touches take no memory
    x = memory.as_strided((2, tokens, channels), (far, channels, 1))
    query, values, _, _ = (
        t if t is None else t.detach() for t in make_inputs(2, 2, tokens, channels, dtype=torch.bfloat16)
    )
    x.copy_(values)
    assert torch.equal(single_query_attention(query, x), single_query_attention(query, values))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend):
    inputs = make_inputs(2, 3, 20, 16, dtype=torch.float32, extra=True)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(query, x, extra_token):
        return single_query_attention(query * 1.0, x[:, 1:], extra_token, normalize=True)

    def eager(query, x, extra_token):
        return single_query_attention(query * 1.0, x[:, 1:], extra_token, normalize=True)

    with assert_trains("single_query_attention"):
        got = with_gradients(compiled, inputs)
    for a, b in zip(got, with_gradients(eager, inputs)):
        torch.testing.assert_close(a, b)


def test_compiled_code_takes_another_batch_without_recompiling_each_time():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda q, t: single_query_attention(q, t), fullgraph=True, backend=counter)
    for batch in range(2, 8):
        query, tokens, *_ = make_inputs(batch, 3, 20, 16, dtype=torch.float32)
        compiled(query, tokens)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_reads_the_tokens_as_they_are(dtype):
    query, tokens, extra_token, grad = make_inputs(2, 3, 20, 16, dtype=dtype, extra=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), assert_trains("single_query_attention"):
        context = single_query_attention(query.bfloat16(), tokens, extra_token.float(), normalize=True)
        assert context.dtype == dtype
        context.backward(grad)
    assert (query.grad.dtype, tokens.grad.dtype, extra_token.grad.dtype) == (dtype, dtype, dtype)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability, run_python):
    """The builds for older processors, which a new one can run too."""
    run_python(
        f"""
        import torch, tokenfusion._C
        from tests.single_query_attention.cases import check_every_float16, check_parity, make_inputs
        import tokenfusion
        from tokenfusion.kernels import single_query_attention
        assert tokenfusion._C.capability() == {capability!r}, tokenfusion._C.capability()
        with tokenfusion.backend("cpu"):
            check_every_float16(single_query_attention)
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                for channels in (8, 24, 192):
                    inputs = make_inputs(2, 3, 37, channels, dtype=dtype, extra=True)
                    check_parity(single_query_attention, inputs, normalize=True)
                    check_parity(single_query_attention, inputs, lengths=torch.tensor([5, 37]), normalize=True)
        """,
        ATEN_CPU_CAPABILITY=capability,
    )
