"""mlp by the tiles of AMX against PyTorch's layers, and where it runs."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

import tokenfusion
from tests.elsewhere import Watching, within, without_gradient
from tests.parity import assert_parity, assert_runs
from tokenfusion.kernels import dispatch, extension
from tokenfusion.kernels.mlp import mlp

pytestmark = [
    pytest.mark.backend("cpu"),
    pytest.mark.skipif(not extension.amx_allowed(), reason="no AMX here"),
]


def tensors(rows=(2, 37), channels=48, features=96, outputs=48, biases=(True, True), dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes, scale=1.0):
        return (torch.randn(sizes, generator=generator) * scale).to(dtype)

    return (
        normal(*rows, channels),
        normal(features, channels, scale=channels**-0.5),
        normal(features) if biases[0] else None,
        normal(outputs, features, scale=features**-0.5),
        normal(outputs) if biases[1] else None,
    )


def kernel(*call):
    return torch.ops.tokenfusion.mlp_cpu(*call)


def plain(x, weight_in, bias_in, weight_out, bias_out):
    return F.linear(F.gelu(F.linear(x, weight_in, bias_in)), weight_out, bias_out)


def check(*call):
    with torch.no_grad(), assert_runs("mlp_cpu"):
        out = mlp(*call)
    exact = plain(*(None if t is None else t.double() for t in call))
    assert_parity(out, plain(*call), exact, summands=call[1].shape[0])
    assert out.is_contiguous()


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129, 300])
def test_any_number_of_rows(rows):
    check(*tensors(rows=(rows,)))


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 100, 128])
@pytest.mark.parametrize("which", ["channels", "features", "outputs"])
def test_any_width(which, size):
    check(*tensors(**{which: size}))


@pytest.mark.parametrize("biases", [(True, False), (False, True), (False, False)])
def test_biases_may_be_absent(biases):
    check(*tensors(biases=biases))


@pytest.mark.parametrize("rows", [(5,), (2, 3, 4), (2, 1, 7, 3)])
def test_any_rank(rows):
    check(*tensors(rows=rows))


def test_one_vector():
    check(*tensors(rows=()))


@pytest.mark.parametrize("which", [0, 1, 3], ids=["x", "weight_in", "weight_out"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.mT.contiguous().mT,
        lambda t: F.pad(t, (3, 2))[..., 3:-2],
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
    ],
    ids=["transposed", "odd offsets", "every other"],
)
def test_any_strides(which, layout):
    call = list(tensors())
    call[which] = layout(call[which])
    check(*call)


def test_biases_of_any_stride():
    x, weight_in, bias_in, weight_out, bias_out = tensors()
    check(x, weight_in, bias_in.repeat_interleave(2)[::2], weight_out, bias_out[:1].expand(48))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_do_not_depend_on_the_others_nor_on_threads(threads, set_threads):
    x, *layers = tensors(rows=(300,))
    with torch.no_grad():
        out = kernel(x, *layers)
        set_threads(threads)
        assert torch.equal(kernel(x, *layers), out)
        assert torch.equal(kernel(x[77:91], *layers), out[77:91])


def test_fifty_calls_are_bit_equal():
    call = tensors(rows=(300,))
    with torch.no_grad():
        first = kernel(*call)
        assert all(torch.equal(kernel(*call), first) for _ in range(50))


@pytest.mark.parametrize("channels", [40, 48, 64])
def test_guard_bands_are_not_read(channels):
    x, *layers = tensors(rows=(37,), channels=channels)

    def guarded(tensor):
        if tensor.dim() == 1:
            return torch.full((len(tensor) + 9,), torch.nan, dtype=tensor.dtype)[4:-5].copy_(tensor)
        memory = torch.full((len(tensor) + 4, tensor.shape[1] + 9), torch.nan, dtype=tensor.dtype)
        return memory[2:-2, 4:-5].copy_(tensor)

    with torch.no_grad():
        assert torch.equal(kernel(*map(guarded, (x, *layers))), kernel(x, *layers))


def through_gelu(values: torch.Tensor) -> torch.Tensor:
    """gelu(values) by the kernel: of one channel, with weights of 1."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    with torch.no_grad(), assert_runs("mlp_cpu"):
        return mlp(values.bfloat16().unsqueeze(1), one, None, one, None).squeeze(1)


def test_gelu_of_every_number():
    """Where it is not below 1e-7, GELU is right to the last place or its neighbour."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    values = values[values.isfinite() & (values.abs() >= torch.finfo(torch.bfloat16).tiny)]  # not the subnormal ones
    out, exact = through_gelu(values).double(), F.gelu(values.double())
    large = exact.abs() > 1e-7
    assert ((out - exact).abs() <= exact.abs() * 2**-8)[large].all()
    assert (out.abs() <= 2e-7)[~large].all()


def test_gelu_of_special_values():
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38, -3e38])
    exact = F.gelu(values.bfloat16().double())
    torch.testing.assert_close(through_gelu(values).double(), exact, equal_nan=True)


@pytest.mark.parametrize("features", [50, 96])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", range(5))
def test_nan_and_inf_propagate_as_in_the_definition(value, where, features):
    call = tensors(features=features)
    call[where].view(-1)[5] = value
    with torch.no_grad():
        out = kernel(*call)
    exact = plain(*(t.double() for t in call))
    assert torch.equal(out.isnan(), exact.isnan())
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.05, equal_nan=True)


def with_another(which, change):
    def call(*tensors):
        changed = list(tensors)
        changed[which] = change(changed[which])
        with contextlib.suppress(RuntimeError):  # PyTorch's own, of sizes that do not match
            mlp(*changed)

    return without_gradient(call)


ELSEWHERE = {
    "a gradient": lambda x, *layers: mlp(x.requires_grad_(), *layers),
    "float32": without_gradient(lambda *tensors: mlp(*(t.float() for t in tensors))),
    "a weight of another dtype": with_another(3, torch.Tensor.float),
    "a weight of another size": with_another(3, lambda t: t[:, 1:]),
    "a bias of another size": with_another(2, lambda t: t[:1]),
    "no rows": with_another(0, lambda t: t[:0]),
    "the reference": within(lambda: tokenfusion.backend("reference"), mlp),
    "autocast to float16": within(lambda: torch.autocast("cpu", torch.float16), mlp),
    "a dispatch mode": within(Watching, mlp),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_pytorchs_layers_elsewhere(name):
    with dispatch.observe() as seen:
        ELSEWHERE[name](*tensors())
    assert not seen.ran


def test_autocast_to_bfloat16_runs_the_kernel():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), assert_runs("mlp_cpu"):
        mlp(*tensors())


def test_few_rows_are_single_products(monkeypatch):
    monkeypatch.undo()
    with torch.no_grad(), assert_runs():
        mlp(*tensors())


def test_switched_off_amx():
    from tokenfusion import _C

    _C.allow_amx(False)
    try:
        with torch.no_grad(), assert_runs():
            mlp(*tensors())
        with pytest.raises(RuntimeError, match="no AMX"):
            torch.ops.tokenfusion.mlp_cpu(*tensors())
    finally:
        _C.allow_amx(True)


def test_compiles_without_graph_breaks():
    call = tensors()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*call), plain(*call))


BAD = [
    (0, lambda t: t.float(), TypeError, "x: got dtype"),
    (0, lambda t: t[:0], ValueError, "expected elements"),
    (0, lambda t: t[..., 1:], ValueError, "weight_in: got shape"),
    (1, lambda t: t[0], ValueError, "weight_in: got shape"),
    (1, lambda t: t.float(), TypeError, "weight_in: got dtype"),
    (2, lambda t: t[1:], ValueError, "bias_in: got shape"),
    (3, lambda t: t[:, 1:], ValueError, "weight_out: got shape"),
    (4, lambda t: t.half(), TypeError, "bias_out: got dtype"),
]


@pytest.mark.parametrize("which, spoil, error, message", BAD)
def test_the_operator_refuses(which, spoil, error, message):
    call = list(tensors())
    call[which] = spoil(call[which])
    with torch.no_grad(), pytest.raises(error, match=message):
        torch.ops.tokenfusion.mlp_cpu(*call)


def test_opcheck():
    torch.library.opcheck(torch.ops.tokenfusion.mlp_cpu.default, tensors())
