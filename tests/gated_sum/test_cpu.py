"""gated_sum: the C++ kernel, and with it the CPU kernels' own matrix product."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import tokenfusion
from tests.forms import forced
from tests.parity import assert_parity, assert_runs
from tokenfusion.kernels import extension, gated_sum
from tokenfusion.kernels.gated_sum import op

DTYPES = [torch.float32, torch.bfloat16]


def problem(dtype, batch=2, tokens=37, inputs=51, outputs=45, count=2):
    """branches, weights, biases, gates, proj_weight, proj_bias."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator).to(dtype)

    return (
        [normal(batch, tokens, inputs) for _ in range(count)],
        [normal(outputs, inputs) for _ in range(count)],
        [normal(outputs), *[None] * (count - 1)],
        torch.rand(batch, count, outputs, generator=generator).to(dtype),
        normal(outputs, outputs),
        normal(outputs),
    )


def plain(branches, weights, biases, gates, *projection):
    y = sum(F.linear(*layer) * gate.unsqueeze(1) for *layer, gate in zip(branches, weights, biases, gates.unbind(1)))
    return F.linear(y, *projection) if projection else y


def exactly(*arguments):
    def wide(argument):
        return (
            [wide(a) for a in argument]
            if isinstance(argument, list)
            else None
            if argument is None
            else argument.double()
        )

    return plain(*map(wide, arguments))


def projected(branches, weights, biases, gates, *projection):
    out = branches[0].new_empty(*branches[0].shape[:2], len(projection[0]))
    return gated_sum(branches, weights, biases, gates, *projection, out=out)


def runs(dtype) -> bool:
    return dtype in extension.own_product_dtypes()


def check(*arguments):
    dtype = arguments[0][0].dtype
    with torch.no_grad(), assert_runs(*["gated_sum_out_cpu"] if runs(dtype) else []):
        with_projection, alone = projected(*arguments), gated_sum(*arguments[:4])
    summands = sum(weight.shape[1] for weight in arguments[1])
    assert_parity(with_projection, plain(*arguments), exactly(*arguments), "projected", summands=summands)
    assert_parity(alone, plain(*arguments[:4]), exactly(*arguments[:4]), "alone", summands=summands)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(tokens=1, inputs=1, outputs=1, count=1),
        dict(tokens=13, inputs=32, outputs=32, count=3),
        dict(batch=3, tokens=14, inputs=33, outputs=16),
        dict(batch=1, tokens=28 * 8 + 3, inputs=400, outputs=70),  # a further block of rows; a long sum
        dict(tokens=8, inputs=770, outputs=31),
        dict(batch=0),
    ],
    ids=str,
)
def test_obeys_the_parity_rule(dtype, sizes):
    check(*problem(dtype, **sizes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """Tokens that are contiguous, or the inputs; slices; transposed weights; neither innermost."""
    branches, weights, *others = problem(dtype, count=3)
    branches[0] = branches[0].mT.contiguous().mT
    branches[1] = torch.cat([branches[1]] * 2, dim=2)[:, :, 51:]
    branches[2] = torch.stack([branches[2]] * 2, dim=3)[..., 1]
    weights[0] = weights[0].t().contiguous().t()
    weights[1] = torch.stack([weights[1]] * 2, dim=2)[..., 1]
    check(branches, weights, *others)


@pytest.mark.skipif(not extension.own_product_dtypes(), reason="every product is the library's here")
@pytest.mark.parametrize(
    "sizes", [dict(), dict(tokens=1, inputs=1, outputs=1, count=1), dict(tokens=550, count=3)], ids=str
)
@pytest.mark.parametrize("strided", [False, True])
def test_the_library_s_products(sizes, strided, set_threads):
    """Of more tokens than a block has, by any number of threads; slices and transposed weights."""
    branches, weights, *others = problem(torch.float32, **sizes)
    if strided:
        branches = [torch.stack([branch] * 2, dim=3)[..., 1] for branch in branches]
        weights = [weight.t().contiguous().t() for weight in weights]
    arguments = branches, weights, *others
    for threads in (1, 2, 3):
        set_threads(threads)
        with torch.no_grad(), forced("cpu:library"):
            with_projection, alone = projected(*arguments), gated_sum(*arguments[:4])
        assert_parity(with_projection, plain(*arguments), exactly(*arguments), "projected")
        assert_parity(alone, plain(*arguments[:4]), exactly(*arguments[:4]), "alone")


@pytest.mark.parametrize(
    "sizes", [dict(), dict(batch=5, tokens=9, inputs=40, outputs=64, count=3), dict(batch=0)], ids=str
)
@pytest.mark.parametrize("expanded", [False, True])
def test_gradients_obey_the_parity_rule(sizes, expanded, monkeypatch):
    monkeypatch.setattr(op, "_LARGE_MATRIX", 0)
    *arguments, _, _ = problem(torch.float32, **sizes)
    arguments[0][0] = arguments[0][0].mT.contiguous().mT

    def gradients(function, dtype):
        leaves = [
            [None if t is None else t.to(dtype).requires_grad_() for t in group] if isinstance(group, list) else group
            for group in (*arguments[:3], [arguments[3]])
        ]
        *groups, (gates,) = leaves
        out = function(*groups, gates)
        torch.manual_seed(1)
        grad = torch.randn(out.shape[2]).to(dtype).expand_as(out) if expanded else torch.randn(out.shape).to(dtype)
        return torch.autograd.grad(out, [t for group in leaves for t in group if t is not None], grad)

    with assert_runs(*["gated_sum_out_cpu", "gated_sum_backward_cpu"] if runs(torch.float32) else []):
        actual = gradients(gated_sum, torch.float32)
    unfused, exact = gradients(plain, torch.float32), gradients(plain, torch.float64)
    for got, plainly, expected in zip(actual, unfused, exact, strict=True):
        assert_parity(got, plainly, expected)


@pytest.mark.skipif(not runs(torch.float32), reason="no kernel for this processor")
def test_backward_called_directly_takes_a_gradient_of_the_channels_alone():
    branches, weights, _, gates, *_ = problem(torch.float32)
    with torch.no_grad(), pytest.raises(ValueError, match=r"grad: got shape \[2, 37, 1\], expected \[2, 37, 45\]"):
        torch.ops.tokenfusion.gated_sum_backward_cpu(torch.ones(2, 37, 1), gates, branches, weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(dtype, set_threads):
    arguments, threads = problem(dtype, batch=3, tokens=130), torch.get_num_threads()
    with torch.no_grad():
        expected = projected(*arguments)
        set_threads(5 - min(threads, 4))
        assert torch.equal(projected(*arguments), expected)


def test_not_a_number_stays_in_its_row():
    arguments = problem(torch.float32)
    arguments[0][0][0, 3, 5] = torch.nan
    with torch.no_grad():
        out = projected(*arguments)
    assert out.isnan().all(dim=2).nonzero().tolist() == [[0, 3]]
    assert out.isnan().any(dim=2).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_left_to_pytorch(dtype):
    arguments = problem(dtype)
    with torch.no_grad(), assert_runs():
        assert_parity(projected(*arguments), plain(*arguments), exactly(*arguments))


def test_another_backend_is_left_to_pytorch():
    arguments = problem(torch.float32)
    with torch.no_grad(), tokenfusion.backend("reference"), assert_runs():
        assert_parity(projected(*arguments), plain(*arguments), exactly(*arguments))


def test_transforms_are_left_to_pytorch():
    branches, *others = problem(torch.float32)
    with torch.no_grad(), assert_runs():
        batched = torch.func.vmap(lambda *branches: projected(list(branches), *others))(
            *(p.unsqueeze(0) for p in branches)
        )
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(branch, branch) for branch in branches]
            tangent = forward_ad.unpack_dual(projected(duals, *others)).tangent
    expected = plain(branches, *others)
    torch.testing.assert_close(batched[0], expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        tangent, expected - plain([0 * branch for branch in branches], *others), rtol=1e-4, atol=1e-3
    )
