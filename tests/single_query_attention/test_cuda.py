"""The CUDA kernels of single_query_attention against the reference, on a GPU."""

import pytest
import torch

from tests.gradients import check_repeats, with_gradients
from tests.parity import assert_trains
from tests.single_query_attention import test_lengths as padded
from tests.single_query_attention import test_packed as packed
from tests.single_query_attention.cases import check, make_inputs
from tokenfusion.kernels import extension, single_query_attention
from tokenfusion.kernels.single_query_attention import op

pytestmark = pytest.mark.backend("cuda")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
on_gpu = pytest.mark.skipif(extension.why_not_cuda() is not None, reason=str(extension.why_not_cuda()))


def inputs_on_gpu(*sizes: int, device: str = "cuda", **options):
    return tuple(
        None if t is None else t.detach().to(device).requires_grad_(t.requires_grad)
        for t in make_inputs(*sizes, **options)
    )


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 16, 17, 197, 401, 1025])
def test_any_number_of_tokens(tokens, extra, normalize, dtype):
    check(inputs_on_gpu(3, 6, tokens, 192, dtype=dtype, extra=extra), normalize=normalize)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "channels, queries",
    [(16, 1), (96, 3), (192, 3), (384, 6), (448, 7), (768, 12), (512, 32), (64, 40), (2048, 32), (1040, 70)],
)
def test_any_channels_and_queries(channels, queries, dtype):
    inputs = inputs_on_gpu(5, queries, 100, channels, dtype=dtype, extra=True)
    if op._cuda_can_run(*inputs[:3]) is not None:
        pytest.skip(op._cuda_can_run(*inputs[:3]))
    check(inputs, normalize=True)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 33, 300])
def test_batches_split_over_tokens_or_not(batch, dtype):
    check(inputs_on_gpu(batch, 3, 577, 96, dtype=dtype, extra=True), normalize=True)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", [False, True])
def test_bags_of_any_length(extra, dtype):
    lengths = [0, 1, 16, 17, 100, 1999, 2000]
    padded.check(inputs_on_gpu(7, 3, 2000, 192, dtype=dtype, extra=extra), lengths, "cuda", normalize=True)
    inputs = packed.make_inputs(lengths, 3, 192, dtype=dtype, extra=extra, device="cuda")
    packed.check(inputs, "cuda", bags=lengths, normalize=True)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [2, 300])
def test_fifty_calls_are_bit_equal(batch, dtype):
    inputs = inputs_on_gpu(batch, 6, 401, 384, dtype=dtype, extra=True)
    check_repeats(single_query_attention, inputs, normalize=True)


@on_gpu
def test_strided_tokens_are_read_in_place():
    query, x, extra_token, grad = inputs_on_gpu(3, 4, 60, 96, dtype=torch.bfloat16, extra=True)
    guarded = torch.full((3, 70, 128), torch.nan, dtype=x.dtype, device=x.device)
    guarded[:, 3:63, 16:112] = x.detach()
    for view, same in (
        (x[:, 1:], x[:, 1:]),
        (x[:, ::2], x[:, ::2]),
        (x[:1].expand(3, -1, -1), x[:1].expand(3, -1, -1)),
        (guarded[:, 3:63, 16:112], x),
    ):
        results = [
            with_gradients(single_query_attention, (query, t.detach().requires_grad_(), extra_token, grad))
            for t in (view, same.contiguous())
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_gpu
def test_unaligned_rows_are_refused():
    query, x, *_ = inputs_on_gpu(2, 3, 20, 40, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="cuda: the rows of tokens are not aligned to 16 bytes"):
        single_query_attention(query[..., 4:36], x[..., 4:36])
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        torch.ops.tokenfusion.single_query_attention_cuda(query[..., 4:36], x[..., 4:36], None, None, None, False, 1e-6)


@on_gpu
def test_graph_capture_and_replay():
    query, x, extra_token, _ = (t.detach() for t in inputs_on_gpu(2, 6, 197, 192, dtype=torch.float16, extra=True))
    want = single_query_attention(query, x, extra_token, normalize=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = single_query_attention(query, x, extra_token, normalize=True)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


@on_gpu
def test_runs_on_the_current_stream():
    query, x, extra_token, _ = (t.detach() for t in inputs_on_gpu(8, 6, 401, 384, dtype=torch.bfloat16, extra=True))
    want = single_query_attention(query, x, extra_token)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        got = single_query_attention(query, late, extra_token)
    stream.synchronize()
    assert torch.equal(got, want)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_runs_where_the_tensors_are():
    inputs = inputs_on_gpu(2, 3, 50, 96, dtype=torch.float32, extra=True, device="cuda:1")
    with torch.cuda.device(0):
        check(inputs, normalize=True)


@on_gpu
@pytest.mark.parametrize("extra", [False, True])
def test_empty_batch(extra):
    inputs = inputs_on_gpu(0, 3, 20, 16, dtype=torch.float32, extra=extra)
    context, *grads = with_gradients(single_query_attention, inputs, normalize=True)
    assert context.shape == (0, 3, 16)
    assert [g.shape for g in grads] == [t.shape for t in inputs[:3] if t is not None]


@on_gpu
def test_opcheck():
    query, tokens, extra_token, grad = inputs_on_gpu(2, 3, 5, 16, dtype=torch.float32, extra=True)
    torch.library.opcheck(
        torch.ops.tokenfusion.single_query_attention_cuda, (query, tokens, extra_token, None, None, True, 1e-6)
    )
    context, lse = torch.ops.tokenfusion.single_query_attention_cuda(query, tokens, extra_token, None, None, True, 1e-6)
    arguments = (grad, query, tokens, extra_token, None, None, context.detach(), lse, True, 1e-6, [True, True, True])
    torch.library.opcheck(torch.ops.tokenfusion.single_query_attention_backward_cuda, arguments)


@on_gpu
def test_compiles_without_graph_breaks():
    inputs = inputs_on_gpu(2, 3, 20, 32, dtype=torch.float32, extra=True)
    torch.compiler.reset()

    def function(query, x, extra_token):
        return single_query_attention(query * 1.0, x[:, 1:], extra_token, normalize=True)

    with assert_trains("single_query_attention"):
        got = with_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(got, with_gradients(function, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(extension.why_not_cuda() is None, reason="CUDA kernels run here")
def test_without_a_gpu_the_reason_is_said():
    query, tokens, *_ = make_inputs(2, 3, 5, 16, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: cuda: ") as error:
        single_query_attention(query, tokens)
    assert extension.why_not_cuda() in str(error.value)


@pytest.mark.parametrize(
    "channels, offset, reason",
    [
        (384, 0, None),
        (384, 8, None),
        (384, 4, "not aligned to 16 bytes"),
        (24, 0, "C = 24 is not a multiple of 16"),
    ],
)
def test_what_the_kernels_cannot_take(channels, offset, reason):
    x = torch.zeros(2, 5, channels + 8, dtype=torch.bfloat16)[..., offset : offset + channels]
    said = op._why_not_cuda_kernel(x)
    assert said is None if reason is None else reason in said


def test_the_question_can_be_compiled():
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def function(query, x):
        return query + 1 if op._why_not_cuda_kernel(x[:, 1:]) is None else query

    for batch in (2, 3, 4):
        query = torch.zeros(batch, 6, 96)
        assert torch.equal(function(query, torch.zeros(batch, 20, 96)), query + 1)
