"""The parity rule: what it takes for right, and what it does not."""

import pytest
import torch

from tests.parity import assert_parity

TERMS = 200
LANE = torch.arange(64) % 16 == 5


def factors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((96, TERMS), (TERMS, 64)))
    return left.to(dtype), right.to(dtype)


def passes(*tensors: torch.Tensor, **sums) -> bool:
    try:
        assert_parity(*tensors, **sums)
    except AssertionError as error:
        assert "allowed" in str(error)
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twice_the_error_of_eager_is_right_and_three_times_is_wrong(dtype):
    left, right = factors()
    exact = left.double() @ right.double()
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = 20 * torch.finfo(dtype).eps * exact.square().mean().sqrt() * noise
    eager = (exact + error).to(dtype)
    for other in (-error, error.roll(1), error.flip(0)):
        assert passes((exact + 2 * other).to(dtype), eager, exact)
        assert not passes((exact + 3 * other).to(dtype), eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_sum_in_another_order_is_right_and_eagers_luck_does_not_matter(dtype):
    left, right = factors(dtype)
    exact = left.double() @ right.double()
    wide = torch.promote_types(dtype, torch.float32)
    one_by_one = torch.zeros(96, 64, dtype=wide)
    for i in range(TERMS):
        one_by_one += left[:, i : i + 1].to(wide) * right[i].to(wide)
    assert_parity(one_by_one.to(dtype), exact.to(dtype), exact, summands=TERMS)


def test_a_longer_sum_may_round_more_often():
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(1 << 14, 100, generator=generator)
    exact = terms.double().sum(0)
    one_by_one = torch.zeros(100)
    for term in terms:
        one_by_one += term
    assert passes(one_by_one, exact.float(), exact, summands=len(terms))
    assert not passes(one_by_one, exact.float(), exact)
    assert not passes(one_by_one - terms[777], exact.float(), exact, summands=len(terms))


@pytest.mark.parametrize(
    "fault, dtypes",
    [
        (lambda left, right: left @ right * 1.01, "float32 bfloat16 float16"),
        (lambda left, right: left @ right * 1.005, "float32 float16"),
        (lambda left, right: left @ right * 1.00001, "float32"),
        (lambda left, right: left @ right * (1 + 0.05 * LANE).to(left), "float32 bfloat16 float16"),
        (lambda left, right: left @ right * (1 + 1e-4 * LANE), "float32"),
        (lambda left, right: left[:, 1:] @ right[1:], "float32 bfloat16 float16"),
        (lambda left, right: torch.cat(((left @ right)[:-1], left[-1:, 1:] @ right[1:])), "float32 bfloat16 float16"),
        (lambda left, right: left @ right + 0.3, "float32 bfloat16 float16"),
        (lambda left, right: left @ right + 1e-3 * torch.eye(96, 64), "float32"),
        (lambda left, right: (left @ right).index_fill(0, torch.tensor([95]), torch.nan), "float32 bfloat16 float16"),
        (lambda left, right: left @ right * (1 + 1e-12), "float64"),
    ],
    ids=[
        *("1 % too large", "0.5 % too large", "0.001 % too large", "a lane 5 % too large", "a lane 0.01 % too large"),
        *("a term is missing", "a term of the last row is missing", "all is shifted", "a diagonal is shifted", "NaN"),
        "a little too large",
    ],
)
def test_faults_are_seen(fault, dtypes):
    for dtype in (getattr(torch, name) for name in dtypes.split()):
        left, right = factors(dtype)
        exact = left.double() @ right.double()
        assert passes(left @ right, left @ right, exact, summands=TERMS)
        assert not passes(fault(left, right), left @ right, exact, summands=TERMS), dtype


def test_terms_that_cancel_are_judged_by_their_norm():
    terms = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)).double()
    terms = torch.cat((terms, -terms.roll(3, 0)))
    exact, lucky = terms.sum(0), torch.zeros(16)
    assert exact.abs().max() < 1e-12
    sums = {"summands": len(terms), "scale": terms.norm(dim=0)}
    one_by_one = torch.zeros(16)
    for term in terms.float():
        one_by_one += term
    assert passes(one_by_one, lucky, exact, **sums) and not passes(one_by_one, lucky, exact)
    assert not passes(terms[1:].float().sum(0), lucky, exact, **sums)
    assert not passes((terms * (1 + 1e-4 * (terms > 0))).float().sum(0), lucky, exact, **sums)


def test_dtype_and_shape_are_part_of_it():
    exact = torch.ones(3, 4, dtype=torch.float64)
    for other in (exact.bfloat16(), exact[:2].float()):
        with pytest.raises(AssertionError, match="expected"):
            assert_parity(other, exact.float(), exact)
    assert_parity(*(torch.ones(0, 4),) * 3)
