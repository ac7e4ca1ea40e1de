"""Rounding to floating-point formats by fractions, for tests to compare with."""

from fractions import Fraction

import numpy as np

# Bits of mantissa with the leading one, and the exponent of the smallest normal number.
FORMATS = {"f16": (11, -14), "bf16": (8, -126), "f32": (24, -126), "f64": (53, -1022), "tf32": (11, -126)}
_LARGEST = {"f16": 15, "bf16": 127, "f32": 127, "f64": 1023, "tf32": 127}


def round_fraction(value: Fraction, name: str, mode: str = "rn") -> float:
    """The number of the format that the exact value is rounded to; not for zeros, of which it knows no sign."""
    precision, smallest = FORMATS[name]
    magnitude = abs(value)
    exponent = max(_floor_log2(magnitude), smallest)
    unit = Fraction(2) ** (exponent - precision + 1)
    whole, rest = divmod(magnitude, unit)
    negative = value < 0
    if mode == "rn":
        up = rest * 2 > unit or (rest * 2 == unit and whole % 2)
    elif mode == "rna":
        up = rest * 2 >= unit
    else:
        up = bool(rest) and (mode == "rm" if negative else mode == "rp")
    result = (whole + bool(up)) * unit
    if result >= Fraction(2) ** (_LARGEST[name] + 1):
        to_infinity = mode in ("rn", "rna") or (mode == "rm" if negative else mode == "rp")
        largest = (Fraction(2) - Fraction(2) ** (1 - precision)) * Fraction(2) ** _LARGEST[name]
        result = np.inf if to_infinity else largest
    return -float(result) if negative else float(result)


def _floor_log2(value: Fraction) -> int:
    if not value:
        return -10_000
    estimate = value.numerator.bit_length() - value.denominator.bit_length()
    return estimate if value >= Fraction(2) ** estimate else estimate - 1


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """bfloat16 given as bits, as float32."""
    return np.array([int(each) << 16 for each in bits], np.uint32).view(np.float32)


def bf16_bits(values) -> np.ndarray:
    """Values that are bfloat16 numbers, as bits."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
