"""Approximate functions: correctly rounded, or as far off as documented and no further."""

import numpy as np
import pytest

from .kernels import evaluate


def spread(low, high, count=4096):
    return np.geomspace(low, high, count).astype(np.float32)


EVERYWHERE = spread(1e-30, 1e30)
CASES = {
    # instruction: (function, operands, largest error relative to the result, largest absolute error)
    "ex2.approx.f32": (np.exp2, np.linspace(-120, 120, 4096, dtype=np.float32), 2.0**-22.5, 0),
    "ex2.approx.ftz.f32": (np.exp2, np.linspace(-120, 120, 4096, dtype=np.float32), 2.0**-22.5, 0),
    "lg2.approx.f32": (np.log2, np.concatenate([spread(1e-30, 0.5), spread(2, 1e30)]), 2.0**-22, 0),
    "lg2.approx.ftz.f32": (np.log2, np.linspace(0.51, 1.99, 4096, dtype=np.float32), 0, 2.0**-22),
    "rcp.approx.f32": (lambda a: 1 / a, EVERYWHERE, 2.0**-24, 0),  # and rounding: 1 unit of the last place
    "rsqrt.approx.f32": (lambda a: 1 / np.sqrt(a), EVERYWHERE, 2.0**-22.9, 0),
    "sqrt.approx.f32": (np.sqrt, EVERYWHERE, 2.0**-23, 0),
    "sin.approx.f32": (np.sin, np.linspace(-6.28, 6.28, 4096, dtype=np.float32), 0, 2.0**-20.5),
    "cos.approx.f32": (np.cos, np.linspace(-6.28, 6.28, 4096, dtype=np.float32), 0, 2.0**-20.5),
    "tanh.approx.f32": (np.tanh, np.linspace(-8, 8, 4096, dtype=np.float32), 2.0**-11, 0),
}


@pytest.mark.parametrize("text", CASES)
def test_unary(text):
    function, operands, relative, absolute = CASES[text]
    exact = function(operands.astype(np.float64))
    allowed = relative * np.abs(exact) + absolute
    rounding = np.spacing(np.abs(exact).astype(np.float32)) / 2
    near = evaluate(f"{text} %d, %a;", np.float32, operands)
    assert (np.abs(near - exact) <= rounding).all()
    off = evaluate(f"{text} %d, %a;", np.float32, operands, approximate=True)
    error = (off - exact) / np.where(allowed, allowed, 1)
    assert (np.abs(off - exact) <= allowed + rounding).all()
    assert error.max() > 0.7 and error.min() < -0.7, "the error is not as large as it may be"
    again = evaluate(f"{text} %d, %a;", np.float32, operands, approximate=True)
    np.testing.assert_array_equal(off, again)


@pytest.mark.parametrize("text", ["div.approx.f32", "div.full.f32", "div.approx.ftz.f32"])
def test_division_is_off_by_two_units_at_most(text):
    a, b = EVERYWHERE, np.random.default_rng(0).permutation(spread(1e-5, 1e5))
    exact = a.astype(np.float64) / b
    off = evaluate(f"{text} %d, %a, %b;", np.float32, a, b, approximate=True)
    units = (off - exact) / np.spacing(exact.astype(np.float32))
    assert 1 < np.abs(units).max() <= 2
    near = evaluate(f"{text} %d, %a, %b;", np.float32, a, b)
    np.testing.assert_array_equal(near, exact.astype(np.float32))


def test_special_values():
    a = np.array([0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    with np.errstate(all="ignore"):
        for text, function in (("ex2", np.exp2), ("lg2", np.log2), ("rcp", np.reciprocal), ("sqrt", np.sqrt)):
            expected = function(a)
            for approximate in (False, True):
                got = evaluate(f"{text}.approx.f32 %d, %a;", np.float32, a, approximate=approximate)
                np.testing.assert_array_equal(got, expected)


def test_ftz_flushes_operands_and_results():
    a = np.array([-130.0, -126.0], np.float32)
    assert evaluate("ex2.approx.ftz.f32 %d, %a;", np.float32, a).tolist() == [0, 2.0**-126]
    assert evaluate("ex2.approx.f32 %d, %a;", np.float32, a).tolist() == [2.0**-130, 2.0**-126]
    tiny = np.array([2.0**-130], np.float32)
    assert evaluate("rcp.approx.ftz.f32 %d, %a;", np.float32, tiny).tolist() == [np.inf]
    assert evaluate("rsqrt.approx.ftz.f32 %d, %a;", np.float32, tiny).tolist() == [np.inf]
