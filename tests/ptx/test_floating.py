"""Floating-point arithmetic against fractions, rounded once."""

from fractions import Fraction

import numpy as np
import pytest

from .exact import bf16_bits, bf16_values, round_fraction
from .kernels import evaluate, random_bits, random_floats

EXACT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": lambda a, b, c: a * b + c,
}


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the sign of a zero, every NaN being equal."""
    np.testing.assert_array_equal(got, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(expected[numbers]))


def expected_values(name, operation, operands, mode, nearest):
    """By fractions where operands are finite and the result is not zero; else by numpy's own arithmetic."""
    results = []
    for each in zip(*operands):
        with np.errstate(all="ignore"):
            plain = float(nearest(*each))
        exact = None
        if all(np.isfinite(each)) and not (operation == "div" and each[1] == 0):
            exact = EXACT[operation](*(Fraction(float(one)) for one in each))
        if exact:
            plain = round_fraction(exact, name, mode)
        elif exact == 0 and mode == "rm" and operation in ("add", "sub", "fma"):
            plain = nearest_zero_down(operation, each)
        results.append(plain)
    return np.array(results)


def nearest_zero_down(operation, operands):
    """An exact zero is -0 when rounding down, but for the sum of two positive zeros."""
    a, b = operands[-2:] if operation != "fma" else (operands[0] * operands[1], operands[2])
    b = -b if operation == "sub" else b
    return 0.0 if not np.signbit(a) and not np.signbit(b) and a == b == 0 else -0.0


NEAREST = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "fma": lambda a, b, c: a * b + c,
}


def close_pairs(seed, dtype, count=600):
    """Operands of like magnitude, so that sums cancel and roundings are ties."""
    generator = np.random.default_rng(seed)
    exact = generator.integers(-64, 64, count) * 2.0 ** generator.integers(-12, 3, count)
    return np.where(generator.random(count) < 0.5, exact, random_floats(seed, dtype, count)).astype(dtype)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("operation", EXACT)
def test_float32_is_rounded_once(operation, mode):
    count = 3 if operation == "fma" else 2
    operands = [close_pairs(seed, np.float32) for seed in range(count)]
    names = ", ".join("%a %b %c".split()[:count])
    got = evaluate(f"{operation}.{mode}.f32 %d, {names};", np.float32, *operands)
    same(got, expected_values("f32", operation, operands, mode, NEAREST[operation]).astype(np.float32))


def test_fma_rounds_sums_once_that_lie_near_a_tie():
    """In float64 the sum falls on the middle between two float32; the exact one lies just beside it."""
    one = np.float32(1 + 2**-12)
    a = np.array([one, one, -one], np.float32)
    c = np.array([2.0**40 + 2.0**17, 2.0**-60, -(2.0**-60)], np.float32)
    got = evaluate("fma.rn.f32 %d, %a, %b, %c;", np.float32, a, np.full(3, one), c)
    expected = [
        round_fraction(Fraction(float(x)) * Fraction(float(one)) + Fraction(float(z)), "f32") for x, z in zip(a, c)
    ]
    same(got, np.array(expected, np.float32))
    tie = Fraction(float(one)) ** 2
    assert np.float32(round_fraction(tie, "f32")) != got[1], "the case does not tell rounding once from rounding twice"


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_float64(operation):
    operands = [random_floats(seed, np.float64) for seed in range(2)]
    with np.errstate(all="ignore"):
        expected = NEAREST[operation](*operands)
    same(evaluate(f"{operation}.rn.f64 %d, %a, %b;", np.float64, *operands), expected)


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma"])
def test_halves_are_rounded_once(operation):
    count = 3 if operation == "fma" else 2
    names = ", ".join("%a %b %c".split()[:count])
    operands = [close_pairs(seed, np.float16) for seed in range(count)]
    wide = [each.astype(np.float64) for each in operands]
    expected = expected_values("f16", operation, wide, "rn", NEAREST[operation]).astype(np.float16)
    same(evaluate(f"{operation}.rn.f16 %d, {names};", np.float16, *operands), expected)

    operands = [
        np.where(np.arange(600) % 2, random_bits(seed, np.uint16, 600), bf16_bits(each))
        for seed, each in enumerate(operands)
    ]
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = [bf16_values(each).astype(np.float64) for each in operands]
    expected = expected_values("bf16", operation, wide, "rn", NEAREST[operation])
    same(bf16_values(evaluate(f"{operation}.rn.bf16 %d, {names};", np.uint16, *operands)), expected.astype(np.float32))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "fma", "min", "max"])
def test_packed_halves_are_two_halves(kind, operation):
    count = 3 if operation == "fma" else 2
    names = ", ".join("%a %b %c".split()[:count])
    rounding = "" if operation in ("min", "max") else ".rn"
    halves = [random_bits(seed, np.uint16, 256) for seed in range(count)]
    single = evaluate(f"{operation}{rounding}.{kind[:-2]} %d, {names};", np.uint16, *halves)
    packed = evaluate(
        f"{operation}{rounding}.{kind} %d, {names};", np.uint32, *(each.view(np.uint32) for each in halves)
    )
    np.testing.assert_array_equal(packed.view(np.uint16), single)


def test_saturation_takes_nan_to_zero():
    a = np.array([-1, 0.25, 3, np.nan, np.inf, -np.inf], np.float32)
    assert evaluate("add.sat.f32 %d, %a, 0f00000000;", np.float32, a).tolist() == [0, 0.25, 1, 0, 1, 0]
    assert evaluate("fma.rn.sat.f32 %d, %a, 0f3F800000, 0f00000000;", np.float32, a).tolist() == [0, 0.25, 1, 0, 1, 0]


def test_ftz_flushes_operands_and_results():
    tiny = np.float32(2.0**-126)
    a = np.array([tiny / 2, -tiny / 2, tiny * 1.5, 2 * tiny], np.float32)
    same(
        evaluate("add.ftz.f32 %d, %a, 0f80000000;", np.float32, a),
        np.array([0, -0.0, tiny * 1.5, 2 * tiny], np.float32),
    )
    same(evaluate("mul.ftz.f32 %d, %a, 0f3F000000;", np.float32, a), np.array([0, -0.0, 0, tiny], np.float32))
    same(evaluate("mul.f32 %d, %a, 0f3F000000;", np.float32, a), a / 2)
    expected = np.array([0, -0.0, tiny * 1.5, 2 * tiny], np.float32)
    same(evaluate("fma.rn.ftz.f32 %d, %a, 0f3F800000, 0f80000000;", np.float32, a), expected)
    same(evaluate("neg.ftz.f32 %d, %a;", np.float32, a), -expected)


@pytest.mark.parametrize("operation, choose", [("min", min), ("max", max)])
def test_extremes_and_nan(operation, choose):
    a, b = random_floats(1), random_floats(2)
    zeros = [(-0.0, 0.0), (0.0, -0.0), (0.0, 0.0), (-0.0, -0.0)]
    a[:4], b[:4] = zip(*zeros)
    nan = np.isnan(a) | np.isnan(b)
    signed = [choose((x, not np.signbit(x)), (y, not np.signbit(y)))[0] for x, y in zip(a, b)]
    number = np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.array(signed, np.float32)))
    same(evaluate(f"{operation}.f32 %d, %a, %b;", np.float32, a, b), number)
    strict = np.where(nan, np.float32(np.nan), number)
    same(evaluate(f"{operation}.NaN.f32 %d, %a, %b;", np.float32, a, b), strict)
    c = np.roll(a, 7)
    of_three = evaluate(f"{operation}.f32 %d, %a, %b; {operation}.f32 %d, %d, %c;", np.float32, a, b, c)
    same(evaluate(f"{operation}.f32 %d, %a, %b, %c;", np.float32, a, b, c), of_three)


def test_signs_of_all_formats():
    for kind, dtype in (("f32", np.uint32), ("f64", np.uint64), ("f16", np.uint16), ("bf16", np.uint16)):
        bits = random_bits(1, dtype)
        top = dtype(1 << (8 * bits.itemsize - 1))
        np.testing.assert_array_equal(evaluate(f"neg.{kind} %d, %a;", dtype, bits), bits ^ top)
        np.testing.assert_array_equal(evaluate(f"abs.{kind} %d, %a;", dtype, bits), bits & ~top)
    bits = random_bits(1, np.uint32)
    np.testing.assert_array_equal(evaluate("neg.f16x2 %d, %a;", np.uint32, bits), bits ^ np.uint32(0x80008000))


def test_copysign_takes_the_sign_of_the_first_operand():
    a, b = random_floats(1, finite=True), random_floats(2, finite=True)
    same(evaluate("copysign.f32 %d, %a, %b;", np.float32, a, b), np.copysign(b, a))


def test_roots_and_reciprocals_are_rounded_correctly():
    a = np.abs(random_floats(1))
    with np.errstate(all="ignore"):
        same(evaluate("sqrt.rn.f32 %d, %a;", np.float32, a), np.sqrt(a.astype(np.float64)).astype(np.float32))
        same(evaluate("rcp.rn.f32 %d, %a;", np.float32, a), (np.float32(1) / a))
    finite = a[np.isfinite(a) & (a > 0)]
    down = [round_fraction(1 / Fraction(float(each)), "f32", "rm") for each in finite]
    same(evaluate("rcp.rm.f32 %d, %a;", np.float32, finite), np.array(down, np.float32))


def test_testp():
    a = np.array([1, np.inf, np.nan, 0, 1e-40], np.float32)
    assert evaluate("testp.finite.f32 %d, %a;", bool, a).tolist() == [True, False, False, True, True]
    assert evaluate("testp.infinite.f32 %d, %a;", bool, a).tolist() == [False, True, False, False, False]
    assert evaluate("testp.notanumber.f32 %d, %a;", bool, a).tolist() == [False, False, True, False, False]
    assert evaluate("testp.subnormal.f32 %d, %a;", bool, a).tolist() == [False, False, False, False, True]
