"""attention by the tiles of AMX against PyTorch's, and where it runs."""

import pytest
import torch
from torch.nn import functional as F

import tokenfusion
from tests.elsewhere import Watching, within, without_gradient
from tests.parity import assert_parity, assert_runs
from tokenfusion.kernels import dispatch, extension
from tokenfusion.kernels.attention import attention

pytestmark = [
    pytest.mark.backend("cpu"),
    pytest.mark.skipif(not extension.amx_allowed(), reason="no AMX here"),
]


def tensors(batch=2, heads=3, queries=50, tokens=None, channels=32, dtype=torch.bfloat16, seed=0):
    """q, k and v as a layer makes them: slices of one result, seen with the heads before the tokens."""
    generator = torch.Generator().manual_seed(seed)

    def made(count):
        return torch.randn(batch, count, heads, channels, generator=generator).to(dtype).transpose(1, 2)

    if tokens is not None:
        return made(queries), made(tokens), made(tokens)
    qkv = torch.randn(batch, queries, 3, heads, channels, generator=generator).to(dtype)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def kernel(q, k, v):
    return torch.ops.tokenfusion.attention_cpu(q, k, v, q.shape[-1] ** -0.5)


def check(q, k, v, scale=None):
    with torch.no_grad(), assert_runs("attention_cpu"):
        out = attention(q, k, v, scale=scale)
    unfused = F.scaled_dot_product_attention(q, k, v, scale=scale)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
    assert_parity(out, unfused, exact, summands=k.shape[2])
    assert out.stride() == unfused.stride()


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65, 100, 401])
def test_any_number_of_tokens(tokens):
    check(*tensors(queries=tokens))


@pytest.mark.parametrize("queries, tokens", [(1, 70), (7, 33), (16, 1), (33, 7), (64, 200), (100, 32), (5, 2048)])
def test_other_queries_than_tokens(queries, tokens):
    check(*tensors(queries=queries, tokens=tokens))


@pytest.mark.parametrize("channels", [1, 2, 5, 8, 15, 16, 17, 20, 31, 32, 33, 48, 63, 64, 65, 96, 100, 128])
def test_any_channels(channels):
    check(*tensors(channels=channels))


@pytest.mark.parametrize("scale", [1e-3, 0.17, 0.5, 3.0, 1e20])
def test_scale(scale):
    check(*tensors(), scale=scale)


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.contiguous(),
        lambda t: t[:1].expand(4, -1, -1, -1),
        lambda t: t[:, ::2],
        lambda t: F.pad(t, (3, 2))[..., 3:-2],
    ],
    ids=["contiguous", "expanded", "every other head", "odd offsets"],
)
def test_any_strides(layout):
    check(*map(layout, tensors()))


@pytest.mark.parametrize("batch, heads, threads", [(1, 1, 1), (1, 1, 2), (1, 1, 5), (1, 2, 3), (3, 5, 2), (16, 4, 2)])
def test_any_batch_and_threads(batch, heads, threads, set_threads):
    set_threads(threads)
    check(*tensors(batch, heads, queries=130))


def test_an_image_does_not_depend_on_the_others_nor_on_threads(set_threads):
    calls = tensors(5)
    with torch.no_grad():
        out = kernel(*calls)
        for threads in (1, 3):
            set_threads(threads)
            assert torch.equal(kernel(*(t[3:4] for t in calls)), out[3:4])


def test_fifty_calls_are_bit_equal():
    calls = tensors(queries=90)
    with torch.no_grad():
        first = kernel(*calls)
        assert all(torch.equal(kernel(*calls), first) for _ in range(50))


@pytest.mark.parametrize("channels", [20, 32, 40])
def test_guard_bands_are_not_read(channels):
    calls = tensors(queries=45, channels=channels)

    def guarded(tensor):
        memory = torch.full((4, 5, 49, channels + 9), torch.nan, dtype=tensor.dtype)
        return memory[1:3, 1:4, 2:47, 4:-5].copy_(tensor)

    with torch.no_grad():
        assert torch.equal(kernel(*map(guarded, calls)), kernel(*calls))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("count, token", [(40, 5), (37, 0)])  # what lies beyond 37 tokens must not be the first again
def test_nan_and_inf_propagate_as_in_the_definition(value, where, count, token):
    calls = tensors(queries=count)
    calls[where][1, 2, token, 7] = value
    with torch.no_grad():
        out = kernel(*calls)
    exact = F.scaled_dot_product_attention(*(t.double() for t in calls))
    assert torch.equal(out.isnan(), exact.isnan())
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02, equal_nan=True)


@pytest.mark.parametrize("factor", [1e3, 1e15, 1e18])
def test_large_scores_do_not_overflow(factor):
    """Softmax picks one token then, or those that are equal."""
    q, k, v = tensors(queries=40)
    exact = F.scaled_dot_product_attention(*(t.double() for t in (q * factor, k * factor, v)))
    with torch.no_grad():
        out = kernel(q * factor, k * factor, v)
    assert out.isfinite().all()
    agree = (out - exact).abs().amax(-1) < 0.05
    assert agree.float().mean() > 0.95  # float32 cannot tell some scores apart


def gradient(q, k, v):
    return attention(q.requires_grad_(), k, v)


ELSEWHERE = {
    "a gradient": gradient,
    "float32": without_gradient(lambda q, k, v: attention(q.float(), k.float(), v.float())),
    "dropout": without_gradient(lambda q, k, v: attention(q, k, v, dropout_p=1e-30)),
    "a mask": without_gradient(lambda q, k, v: attention(q, k, v, torch.ones(50, 50, dtype=torch.bool))),
    "causal": without_gradient(lambda q, k, v: attention(q, k, v, is_causal=True)),
    "an infinite scale": without_gradient(lambda q, k, v: attention(q, k, v, scale=float("inf"))),
    "channels of q apart": without_gradient(lambda q, k, v: attention(q.mT.contiguous().mT, k, v)),
    "channels of v apart": without_gradient(lambda q, k, v: attention(q, k, v.mT.contiguous().mT)),
    "a negative scale": without_gradient(lambda q, k, v: attention(q, k, v, scale=-0.1)),
    "three dimensions": without_gradient(lambda q, k, v: attention(q[0], k[0], v[0])),
    "other channels of v": without_gradient(lambda q, k, v: attention(q, k, v[..., :16])),
    "broadcast heads": without_gradient(lambda q, k, v: attention(q, k[:, :1], v[:, :1])),
    "many channels": without_gradient(lambda q, k, v: attention(*(t.repeat(1, 1, 1, 5) for t in (q, k, v)))),
    "many tokens": without_gradient(lambda q, k, v: attention(q, k.repeat(1, 1, 41, 1), v.repeat(1, 1, 41, 1))),
    "no queries": without_gradient(lambda q, k, v: attention(q[:, :, :0], k, v)),
    "no tokens": without_gradient(lambda q, k, v: attention(q, k[:, :, :0], v[:, :, :0])),
    "the reference": within(lambda: tokenfusion.backend("reference"), attention),
    "autocast to float16": within(lambda: torch.autocast("cpu", torch.float16), attention),
    "a dispatch mode": within(Watching, attention),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_pytorchs_function_elsewhere(name):
    calls = tensors()
    with dispatch.observe() as seen:
        ELSEWHERE[name](*calls)
    assert not seen.ran


def test_autocast_to_bfloat16_runs_the_kernel():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), assert_runs("attention_cpu"):
        attention(*tensors())


def test_few_scores_are_pytorchs(monkeypatch):
    monkeypatch.undo()
    q, k, v = tensors(1, 1)
    with torch.no_grad(), assert_runs():
        attention(q, k, v)


def test_switched_off_amx():
    from tokenfusion import _C

    _C.allow_amx(False)
    try:
        with torch.no_grad(), assert_runs():
            attention(*tensors())
        with pytest.raises(RuntimeError, match="no AMX"):
            torch.ops.tokenfusion.attention_cpu(*tensors(), 0.1)
    finally:
        _C.allow_amx(True)


def test_compiles_without_graph_breaks():
    calls = tensors()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*calls), F.scaled_dot_product_attention(*calls))


BAD = [
    (lambda q, k, v: (q[0], k, v), ValueError, "q: got shape"),
    (lambda q, k, v: (q, k[0], v), ValueError, "k: got shape"),
    (lambda q, k, v: (q, k[:1], v), ValueError, "k: got shape"),
    (lambda q, k, v: (q, k, v[:, :, 1:]), ValueError, "v: got shape"),
    (lambda q, k, v: (q.float(), k, v), TypeError, "q: got dtype"),
    (lambda q, k, v: (q, k, v.half()), TypeError, "v: got dtype"),
    (lambda q, k, v: (q, k.mT.contiguous().mT, v), ValueError, "k: got strides"),
    (lambda q, k, v: (q[:0], k[:0], v[:0]), ValueError, "expected elements"),
]


@pytest.mark.parametrize("spoil, error, message", BAD)
def test_the_operator_refuses(spoil, error, message):
    with torch.no_grad(), pytest.raises(error, match=message):
        torch.ops.tokenfusion.attention_cpu(*spoil(*tensors()), 0.1)


def test_the_operator_refuses_to_record_gradients():
    q, k, v = tensors()
    with pytest.raises(NotImplementedError, match="requires a gradient"):
        torch.ops.tokenfusion.attention_cpu(q.requires_grad_(), k, v, 0.1)


def test_opcheck():
    torch.library.opcheck(torch.ops.tokenfusion.attention_cpu.default, (*tensors(), 0.1))
