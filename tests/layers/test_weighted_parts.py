"""The sum of weighted linear layers: the C++ kernel, and with it the CPU kernels' own matrix product."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import tokenfusion
from tests.parity import assert_parity, assert_runs
from tokenfusion.kernels import extension
from tokenfusion.layers import weighted_parts as sum_module
from tokenfusion.layers.weighted_parts import project_weighted_parts, weighted_parts

KERNEL = "weighted_parts"
DTYPES = [torch.float32, torch.bfloat16]


def problem(dtype, batch=2, tokens=37, inputs=51, outputs=45, count=2):
    """parts, weights, biases, shares, proj_weight, proj_bias."""
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


def plain(parts, weights, biases, shares, *projection):
    y = sum(F.linear(*layer) * share.unsqueeze(1) for *layer, share in zip(parts, weights, biases, shares.unbind(1)))
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


def projected(parts, weights, biases, shares, *projection):
    out = parts[0].new_empty(*parts[0].shape[:2], len(projection[0]))
    project_weighted_parts(parts, weights, biases, shares, *projection, out=out)
    return out


def runs(dtype) -> bool:
    return dtype in extension.own_product_dtypes()


def check(*arguments):
    dtype = arguments[0][0].dtype
    with torch.no_grad(), assert_runs(*[KERNEL] if runs(dtype) else []):
        with_projection, alone = projected(*arguments), weighted_parts(*arguments[:4])
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
    parts, weights, *others = problem(dtype, count=3)
    parts[0] = parts[0].mT.contiguous().mT
    parts[1] = torch.cat([parts[1]] * 2, dim=2)[:, :, 51:]
    parts[2] = torch.stack([parts[2]] * 2, dim=3)[..., 1]
    weights[0] = weights[0].t().contiguous().t()
    weights[1] = torch.stack([weights[1]] * 2, dim=2)[..., 1]
    check(parts, weights, *others)


@pytest.mark.parametrize(
    "sizes", [dict(), dict(batch=5, tokens=9, inputs=40, outputs=64, count=3), dict(batch=0)], ids=str
)
@pytest.mark.parametrize("expanded", [False, True])
def test_gradients_obey_the_parity_rule(sizes, expanded, monkeypatch):
    monkeypatch.setattr(sum_module, "_LARGE_MATRIX", 0)
    *arguments, _, _ = problem(torch.float32, **sizes)
    arguments[0][0] = arguments[0][0].mT.contiguous().mT

    def gradients(function, dtype):
        leaves = [
            [None if t is None else t.to(dtype).requires_grad_() for t in group] if isinstance(group, list) else group
            for group in (*arguments[:3], [arguments[3]])
        ]
        *groups, (shares,) = leaves
        out = function(*groups, shares)
        torch.manual_seed(1)
        grad = torch.randn(out.shape[2]).to(dtype).expand_as(out) if expanded else torch.randn(out.shape).to(dtype)
        return torch.autograd.grad(out, [t for group in leaves for t in group if t is not None], grad)

    with assert_runs(*[KERNEL, f"{KERNEL}_backward"] if runs(torch.float32) else []):
        actual = gradients(weighted_parts, torch.float32)
    unfused, exact = gradients(plain, torch.float32), gradients(plain, torch.float64)
    for got, plainly, expected in zip(actual, unfused, exact, strict=True):
        assert_parity(got, plainly, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(dtype):
    arguments, threads = problem(dtype, batch=3, tokens=130), torch.get_num_threads()
    with torch.no_grad():
        expected = projected(*arguments)
        try:
            torch.set_num_threads(5 - min(threads, 4))
            assert torch.equal(projected(*arguments), expected)
        finally:
            torch.set_num_threads(threads)


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
    parts, *others = problem(torch.float32)
    with torch.no_grad(), assert_runs():
        batched = torch.func.vmap(lambda *parts: projected(list(parts), *others))(*(p.unsqueeze(0) for p in parts))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(part, part) for part in parts]
            tangent = forward_ad.unpack_dual(projected(duals, *others)).tangent
    expected = plain(parts, *others)
    torch.testing.assert_close(batched[0], expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(tangent, expected - plain([0 * part for part in parts], *others), rtol=1e-4, atol=1e-3)
