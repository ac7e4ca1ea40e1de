"""cvt against fractions and Python's integers."""

from fractions import Fraction

import numpy as np
import pytest

from .exact import bf16_bits, bf16_values, round_fraction
from .kernels import evaluate, random_bits, random_floats

INTEGERS = {
    f"{letter}{bits}": np.dtype(f"{'i' if letter == 's' else 'u'}{bits // 8}").type
    for letter in "us"
    for bits in (8, 16, 32, 64)
}


def dtype_of(name):
    return INTEGERS.get(name) or {"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16}[name]


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_integers_are_cut_or_extended_and_saturate(target, source):
    a = random_bits(1, INTEGERS[source])
    bits = int(target[1:])
    cut = np.array([int(each) & ((1 << bits) - 1) for each in a], f"u{bits // 8}").view(INTEGERS[target])
    np.testing.assert_array_equal(evaluate(f"cvt.{target}.{source} %d, %a;", INTEGERS[target], a), cut)
    limits = np.iinfo(INTEGERS[target])
    limited = np.array([min(max(int(each), int(limits.min)), int(limits.max)) for each in a], INTEGERS[target])
    np.testing.assert_array_equal(evaluate(f"cvt.sat.{target}.{source} %d, %a;", INTEGERS[target], a), limited)


def test_a_narrow_result_fills_a_wide_register_by_its_sign():
    a = np.array([0x80, 0x7F], np.int32)
    assert evaluate("cvt.s8.s32 %d, %a;", np.int32, a).tolist() == [-128, 127]
    assert evaluate("cvt.u8.u32 %d, %a;", np.int32, a).tolist() == [128, 127]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", ["s32", "u32", "s16", "u8"])
@pytest.mark.parametrize("target", ["f32", "f16"])
def test_integers_to_floats(target, source, mode):
    a = random_bits(1, INTEGERS[source])
    expected = [round_fraction(Fraction(int(each)), target, mode) for each in a]
    got = evaluate(f"cvt.{mode}.{target}.{source} %d, %a;", dtype_of(target), a)
    np.testing.assert_array_equal(got, np.array(expected, dtype_of(target)))


@pytest.mark.parametrize("source", ["s64", "u64"])
def test_long_integers_to_float32_are_rounded_once(source):
    a = random_bits(1, INTEGERS[source])
    a[0] = (1 << 54) + (1 << 30) + 1  # in float64 the middle between two float32
    expected = [round_fraction(Fraction(int(each)), "f32") for each in a]
    np.testing.assert_array_equal(
        evaluate(f"cvt.rn.f32.{source} %d, %a;", np.float32, a), np.array(expected, np.float32)
    )


ROUND = {
    "rni": lambda a: round(a),
    "rzi": lambda a: int(a),
    "rmi": lambda a: a.__floor__(),
    "rpi": lambda a: a.__ceil__(),
}


@pytest.mark.parametrize("mode", ROUND)
@pytest.mark.parametrize("target", ["s32", "u32", "s64", "u64", "s16", "u8"])
@pytest.mark.parametrize("source", ["f32", "f64", "f16"])
def test_floats_to_integers_stay_in_range(source, target, mode):
    a = random_floats(1, dtype_of(source))
    a[::2] = (np.random.default_rng(0).integers(-600, 600, len(a[::2])) / 4).astype(a.dtype)
    limits = np.iinfo(INTEGERS[target])

    def convert(value):
        if np.isnan(value):
            return 0
        if np.isinf(value):
            return limits.max if value > 0 else limits.min
        return min(max(ROUND[mode](Fraction(float(value))), int(limits.min)), int(limits.max))

    got = evaluate(f"cvt.{mode}.{target}.{source} %d, %a;", INTEGERS[target], a)
    np.testing.assert_array_equal(got, np.array([convert(each) for each in a], INTEGERS[target]))


def rounded(values, target, mode):
    def one(value):
        exact = np.isfinite(value) and value != 0
        return round_fraction(Fraction(float(value)), target, mode) if exact else float(value)

    return np.array([one(each) for each in values])


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("target", ["f16", "bf16"])
def test_float32_to_halves(target, mode):
    a = random_floats(1)
    a[::2] = np.random.default_rng(0).standard_normal(len(a[::2])) * 100
    got = evaluate(f"cvt.{mode}.{target}.f32 %d, %a;", dtype_of(target), a)
    expected = rounded(a, target, mode)
    got = bf16_values(got) if target == "bf16" else got
    np.testing.assert_array_equal(got, expected.astype(got.dtype))


def test_the_nan_of_bfloat16():
    assert evaluate("cvt.rn.bf16.f32 %d, %a;", np.uint16, np.float32(np.nan)).tolist() == [0x7FFF]


def test_halves_to_float32_are_exact():
    half = random_bits(1, np.float16)
    np.testing.assert_array_equal(evaluate("cvt.f32.f16 %d, %a;", np.float32, half), half.astype(np.float32))
    bits = random_bits(1, np.uint16)
    np.testing.assert_array_equal(evaluate("cvt.f32.bf16 %d, %a;", np.float32, bits), bf16_values(bits))


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_pairs_have_the_first_operand_in_the_upper_half(kind):
    a, b = random_floats(1), random_floats(2)
    half = kind[:-2]
    got = evaluate(f"cvt.rn.{kind}.f32 %d, %a, %b;", np.uint32, a, b)
    dtype = np.float16 if half == "f16" else np.uint16
    for part, values in (((got >> 16).astype(np.uint16), a), (got.astype(np.uint16), b)):
        np.testing.assert_array_equal(part.view(dtype), evaluate(f"cvt.rn.{half}.f32 %d, %a;", dtype, values))


def test_whole_numbers_saturation_and_ftz():
    a = np.array([0.5, 1.5, -0.5, 2.7, np.nan, -3], np.float32)
    assert evaluate("cvt.rni.f32.f32 %d, %a;", np.float32, a[:4]).tolist() == [0, 2, 0, 3]
    assert evaluate("cvt.rmi.f32.f32 %d, %a;", np.float32, a[:4]).tolist() == [0, 1, -1, 2]
    assert evaluate("cvt.sat.f32.f32 %d, %a;", np.float32, a).tolist() == [0.5, 1, 0, 1, 0, 0]
    assert evaluate("cvt.ftz.f32.f32 %d, %a;", np.float32, np.float32(1e-40)).tolist() == [0]


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32_has_eleven_bits(mode):
    a = random_floats(1)
    a[:64] = 1 + (np.arange(64) * 2 + 1) * np.float32(2.0**-11)  # ties
    a = a[np.abs(a) < 2.0**127]
    expected = rounded(a, "tf32", mode)
    normal = (np.abs(a) >= 2.0**-126) | (a == 0)
    got = evaluate(f"cvt.{mode}.tf32.f32 %d, %a;", np.float32, a)
    np.testing.assert_array_equal(got[normal], expected[normal].astype(np.float32))
    assert not (got.view(np.uint32) & 0x1FFF)[np.isfinite(got)].any()


def test_bf16_bits_of_the_tests_are_those_of_the_instruction():
    values = bf16_values(random_bits(1, np.uint16))
    values = values[np.isfinite(values)]
    np.testing.assert_array_equal(evaluate("cvt.rn.bf16.f32 %d, %a;", np.uint16, values), bf16_bits(values))
