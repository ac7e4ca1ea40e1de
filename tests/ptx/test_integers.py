"""Integer arithmetic against Python's integers."""

import numpy as np
import pytest

from .kernels import evaluate, random_bits

TYPES = {
    f"{letter}{bits}": np.dtype(f"{'int' if letter == 's' else 'uint'}{bits}")
    for letter in "us"
    for bits in (16, 32, 64)
}
SMALL = {name: dtype for name, dtype in TYPES.items() if dtype.itemsize < 8}


def wrapped(values, dtype):
    """Python integers as the type's, modulo 2^bits."""
    bits = dtype.itemsize * 8
    unsigned = np.array([int(value) & ((1 << bits) - 1) for value in values], f"u{dtype.itemsize}")
    return unsigned.view(dtype)


def check(text, dtype, function, *operands, result=None):
    result = result or dtype
    expected = wrapped([function(*map(int, each)) for each in zip(*operands)], np.dtype(result))
    np.testing.assert_array_equal(evaluate(text, np.dtype(result).type, *operands), expected)


def pair(dtype):
    return random_bits(1, dtype), random_bits(2, dtype)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    "opcode, function", [("add", lambda a, b: a + b), ("sub", lambda a, b: a - b), ("mul.lo", lambda a, b: a * b)]
)
def test_arithmetic_is_modulo(name, opcode, function):
    check(f"{opcode}.{name} %d, %a, %b;", TYPES[name], function, *pair(TYPES[name]))


@pytest.mark.parametrize("name", TYPES)
def test_mul_hi_is_the_upper_half_of_the_product(name):
    bits = TYPES[name].itemsize * 8
    check(f"mul.hi.{name} %d, %a, %b;", TYPES[name], lambda a, b: a * b >> bits, *pair(TYPES[name]))


@pytest.mark.parametrize("name", SMALL)
def test_wide_products_are_whole(name):
    dtype = SMALL[name]
    wide = np.dtype(f"{dtype.kind}{dtype.itemsize * 2}")
    check(f"mul.wide.{name} %d, %a, %b;", dtype, lambda a, b: a * b, *pair(dtype), result=wide)
    added = random_bits(3, wide)
    check(f"mad.wide.{name} %d, %a, %b, %c;", dtype, lambda a, b, c: a * b + c, *pair(dtype), added, result=wide)


@pytest.mark.parametrize("name", TYPES)
def test_mad(name):
    dtype, bits = TYPES[name], TYPES[name].itemsize * 8
    operands = (*pair(dtype), random_bits(3, dtype))
    check(f"mad.lo.{name} %d, %a, %b, %c;", dtype, lambda a, b, c: a * b + c, *operands)
    check(f"mad.hi.{name} %d, %a, %b, %c;", dtype, lambda a, b, c: (a * b >> bits) + c, *operands)


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("name", TYPES)
def test_division_rounds_to_zero_and_the_remainder_has_the_dividends_sign(name):
    a, b = pair(TYPES[name])
    b = np.where(b == 0, 7, b).astype(b.dtype)
    check(f"div.{name} %d, %a, %b;", TYPES[name], truncated, a, b)
    check(f"rem.{name} %d, %a, %b;", TYPES[name], lambda a, b: a - truncated(a, b) * b, a, b)


@pytest.mark.parametrize("name", TYPES)
def test_extremes(name):
    check(f"min.{name} %d, %a, %b;", TYPES[name], min, *pair(TYPES[name]))
    check(f"max.{name} %d, %a, %b;", TYPES[name], max, *pair(TYPES[name]))


@pytest.mark.parametrize("name", [name for name in TYPES if name[0] == "s"])
def test_signs(name):
    a = random_bits(1, TYPES[name])
    check(f"neg.{name} %d, %a;", TYPES[name], lambda a: -a, a)
    check(f"abs.{name} %d, %a;", TYPES[name], abs, a)


@pytest.mark.parametrize("opcode, sign", [("add", 1), ("sub", -1)])
def test_saturation(opcode, sign):
    limited = lambda a, b: max(-(2**31), min(2**31 - 1, a + sign * b))  # noqa: E731
    check(f"{opcode}.sat.s32 %d, %a, %b;", np.dtype(np.int32), limited, *pair(np.int32))


def test_carries_chain():
    """128 bits from four registers of 32."""
    a, b = random_bits(1, np.uint64), random_bits(2, np.uint64)
    text = """
        mov.b64 {%r10, %r11}, %a; mov.b64 {%r12, %r13}, %b;
        add.cc.u32 %r14, %r10, %r12; addc.cc.u32 %r15, %r11, %r13; addc.u32 %d, 0, 0;
    """
    check(text, np.dtype(np.uint32), lambda a, b: a + b >> 64, a, b)


@pytest.mark.parametrize("bits", [32, 64])
def test_counts_of_bits(bits):
    dtype = np.dtype(f"u{bits // 8}")
    a = random_bits(1, dtype)
    small = a >> (random_bits(2, dtype) % bits)
    out = np.dtype(np.uint32)
    check(f"popc.b{bits} %d, %a;", dtype, lambda a: a.bit_count(), a, result=out)
    check(f"clz.b{bits} %d, %a;", dtype, lambda a: bits - a.bit_length(), small, result=out)
    check(f"bfind.u{bits} %d, %a;", dtype, lambda a: a.bit_length() - 1, small, result=out)
    check(f"brev.b{bits} %d, %a;", dtype, lambda a: int(f"{a:0{bits}b}"[::-1], 2), a)
    signed = small.view(f"i{bits // 8}")
    found = lambda a: (~a if a < 0 else a).bit_length() - 1  # noqa: E731
    check(f"bfind.s{bits} %d, %a;", dtype, found, signed, result=out)


@pytest.mark.parametrize("name", ["u32", "s32", "u64", "s64"])
def test_bfe_takes_a_field_and_extends_its_sign(name):
    dtype = TYPES[name]
    bits = dtype.itemsize * 8
    a = random_bits(1, dtype)
    position, length = (np.random.default_rng(seed).integers(0, 80, len(a)).astype(np.uint32) for seed in (3, 4))

    def field(a, position, length):
        """From the definition in the PTX ISA: bits beyond the operand are copies of the field's sign."""
        a &= (1 << bits) - 1
        at = lambda place: a >> place & 1  # noqa: E731
        sign = 0 if name[0] == "u" or length == 0 else at(min(position + length - 1, bits - 1))
        return sum(
            (at(place + position) if place < length and place + position < bits else sign) << place
            for place in range(bits)
        )

    check(f"bfe.{name} %d, %a, %b, %c;", dtype, field, a, position, length)


@pytest.mark.parametrize("bits", [32, 64])
def test_bfi_replaces_a_field(bits):
    dtype = np.dtype(f"u{bits // 8}")
    a, b = pair(dtype)
    position, length = (np.random.default_rng(seed).integers(0, 80, len(a)).astype(np.uint32) for seed in (3, 4))

    def insert(a, b, position, length):
        for place in range(length):
            if position + place < bits and place < bits:
                b = b & ~(1 << position + place) | (a >> place & 1) << position + place
        return b

    check(f"bfi.b{bits} %d, %a, %b, %c, %e;", dtype, insert, a, b, position, length)
