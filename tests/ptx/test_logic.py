"""Logic, shifts, comparisons and selections."""

import operator

import numpy as np
import pytest

from .kernels import evaluate, random_bits, random_floats


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("opcode, function", [("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)])
def test_bitwise(bits, opcode, function):
    dtype = np.dtype(f"u{bits // 8}").type
    a, b = random_bits(1, dtype), random_bits(2, dtype)
    np.testing.assert_array_equal(evaluate(f"{opcode}.b{bits} %d, %a, %b;", dtype, a, b), function(a, b))


def test_predicates():
    a, b = np.array([0, 0, 1, 1], bool), np.array([0, 1, 0, 1], bool)
    assert evaluate("and.pred %d, %a, %b;", bool, a, b).tolist() == [False, False, False, True]
    assert evaluate("or.pred %d, %a, %b;", bool, a, b).tolist() == [False, True, True, True]
    assert evaluate("xor.pred %d, %a, %b;", bool, a, b).tolist() == [False, True, True, False]
    assert evaluate("not.pred %d, %a;", bool, a).tolist() == [True, True, False, False]
    assert evaluate("and.pred %d, !%a, %b;", bool, a, b).tolist() == [False, True, False, False]


def test_not_and_cnot():
    a = random_bits(1, np.uint32)
    np.testing.assert_array_equal(evaluate("not.b32 %d, %a;", np.uint32, a), a ^ np.uint32(0xFFFFFFFF))
    np.testing.assert_array_equal(evaluate("cnot.b32 %d, %a;", np.uint32, a), (a == 0).astype(np.uint32))


SHIFTS = np.array([0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200, 0xFFFFFFFF], np.uint32)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_beyond_the_width_give_zeros_or_the_sign(bits):
    dtype = np.dtype(f"u{bits // 8}").type
    a = random_bits(1, dtype)
    by = np.resize(SHIFTS, len(a))
    mask = (1 << bits) - 1
    left = np.array([int(x) << min(int(s), bits) & mask for x, s in zip(a, by)], dtype)
    np.testing.assert_array_equal(evaluate(f"shl.b{bits} %d, %a, %b;", dtype, a, by), left)
    right = np.array([int(x) >> min(int(s), bits) for x, s in zip(a, by)], dtype)
    np.testing.assert_array_equal(evaluate(f"shr.u{bits} %d, %a, %b;", dtype, a, by), right)
    signed = a.view(f"i{bits // 8}")
    arithmetic = np.array([int(x) >> min(int(s), bits) for x, s in zip(signed, by)], signed.dtype)
    np.testing.assert_array_equal(evaluate(f"shr.s{bits} %d, %a, %b;", signed.dtype.type, signed, by), arithmetic)


@pytest.mark.parametrize("by", [0, 3, 31, 32, 40])
def test_shifts_by_a_constant(by):
    a = random_bits(1, np.int32)
    expected = [int(x) >> by for x in a]
    np.testing.assert_array_equal(evaluate(f"shr.s32 %d, %a, {by};", np.int32, a), expected)
    expected = [int(x) << by & 0xFFFFFFFF for x in a.view(np.uint32)]
    np.testing.assert_array_equal(evaluate(f"shl.b32 %d, %a, {by};", np.uint32, a.view(np.uint32)), expected)


@pytest.mark.parametrize("mode, limit", [("wrap", lambda s: s & 31), ("clamp", lambda s: min(s, 32))])
def test_funnel_shifts(mode, limit):
    low, high = random_bits(1, np.uint32), random_bits(2, np.uint32)
    by = np.resize(SHIFTS, len(low))
    both = [int(h) << 32 | int(x) for x, h in zip(low, high)]
    left = [value << limit(int(s)) >> 32 & 0xFFFFFFFF for value, s in zip(both, by)]
    right = [value >> limit(int(s)) & 0xFFFFFFFF for value, s in zip(both, by)]
    np.testing.assert_array_equal(evaluate(f"shf.l.{mode}.b32 %d, %a, %b, %c;", np.uint32, low, high, by), left)
    np.testing.assert_array_equal(evaluate(f"shf.r.{mode}.b32 %d, %a, %b, %c;", np.uint32, low, high, by), right)


@pytest.mark.parametrize("table", [0x00, 0x80, 0xFE, 0x96, 0xE8, 0x1D, 0xFF])
def test_lop3_is_its_table_of_truth(table):
    a, b, c = (random_bits(seed, np.uint32) for seed in (1, 2, 3))
    expected = np.zeros_like(a)
    for bit in range(32):
        case = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        expected |= (np.uint32(table) >> case & 1) << np.uint32(bit)
    np.testing.assert_array_equal(evaluate(f"lop3.b32 %d, %a, %b, %c, {table:#x};", np.uint32, a, b, c), expected)


def test_prmt_picks_bytes_and_replicates_signs():
    a, b, selector = (random_bits(seed, np.uint32) for seed in (1, 2, 3))
    expected = []
    for x, y, s in zip(a, b, selector):
        source = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
        picked = [source[int(s) >> 4 * n & 7] for n in range(4)]
        signs = [int(s) >> 4 * n & 8 for n in range(4)]
        result = [(0xFF if value & 0x80 else 0) if sign else value for value, sign in zip(picked, signs)]
        expected.append(int.from_bytes(bytes(result), "little"))
    np.testing.assert_array_equal(evaluate("prmt.b32 %d, %a, %b, %c;", np.uint32, a, b, selector), expected)


def test_selp():
    a, b, p = random_bits(1, np.uint64), random_bits(2, np.uint64), random_bits(3, np.uint8) > 127
    np.testing.assert_array_equal(evaluate("selp.b64 %d, %a, %b, %c;", np.uint64, a, b, p), np.where(p, a, b))


ORDERS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@pytest.mark.parametrize("name", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("order", ORDERS)
def test_comparisons_of_integers(name, order):
    dtype = np.dtype(f"{'i' if name[0] == 's' else 'u'}{int(name[1:]) // 8}").type
    a, b = random_bits(1, dtype), random_bits(2, dtype)
    b[::3] = a[::3]
    expected = [ORDERS[order](int(x), int(y)) for x, y in zip(a, b)]
    assert evaluate(f"setp.{order}.{name} %d, %a, %b;", bool, a, b).tolist() == expected


@pytest.mark.parametrize("short, order", [("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")])
def test_unsigned_comparisons(short, order):
    a, b = random_bits(1, np.uint32), random_bits(2, np.uint32)
    assert evaluate(f"setp.{short}.u32 %d, %a, %b;", bool, a, b).tolist() == ORDERS[order](a, b).tolist()


@pytest.mark.parametrize("dtype, name", [(np.float32, "f32"), (np.float64, "f64"), (np.float16, "f16")])
@pytest.mark.parametrize("order", ORDERS)
def test_comparisons_with_nan_are_false_or_with_u_true(dtype, name, order):
    a, b = random_floats(1, dtype), random_floats(2, dtype)
    b[::3] = a[::3]
    unordered = np.isnan(a) | np.isnan(b)
    assert unordered.any()
    plain = ORDERS[order](a, b)
    assert evaluate(f"setp.{order}.{name} %d, %a, %b;", bool, a, b).tolist() == (plain & ~unordered).tolist()
    assert evaluate(f"setp.{order}u.{name} %d, %a, %b;", bool, a, b).tolist() == (plain | unordered).tolist()
    assert evaluate(f"setp.num.{name} %d, %a, %b;", bool, a, b).tolist() == (~unordered).tolist()
    assert evaluate(f"setp.nan.{name} %d, %a, %b;", bool, a, b).tolist() == unordered.tolist()


def test_setp_of_subnormals_with_ftz():
    a = np.array([1e-40, -1e-40, 1e-30], np.float32)
    assert evaluate("setp.gt.f32 %d, %a, 0f00000000;", bool, a).tolist() == [True, False, True]
    assert evaluate("setp.gt.ftz.f32 %d, %a, 0f00000000;", bool, a).tolist() == [False, False, True]


def test_setp_combines_and_gives_the_opposite():
    a, p = np.array([1, 1, 5, 5], np.int32), np.array([0, 1, 0, 1], bool)
    assert evaluate("setp.lt.and.s32 %d, %a, 3, %b;", bool, a, p).tolist() == [False, True, False, False]
    assert evaluate("setp.lt.or.s32 %d, %a, 3, !%b;", bool, a, p).tolist() == [True, True, True, False]
    assert evaluate("setp.lt.xor.s32 %d, %a, 3, %b;", bool, a, p).tolist() == [True, False, False, True]
    text = "setp.lt.and.s32 %p1|%p2, %a, 3, %b; selp.b32 %r9, 1, 0, %p1; selp.b32 %d, 2, %r9, %p2;"
    assert evaluate(text, np.int32, a, p).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_setp_of_halves(kind):
    ones = {"f16x2": 0x3C00, "bf16x2": 0x3F80}[kind]
    a = np.array([0, ones, ones << 16, ones << 16 | ones, 0x7FFF << 16], np.uint32)  # the last with a NaN
    both = "%p1|%p2, %a, {0}; selp.b32 %r9, 1, 0, %p1; selp.b32 %r10, 2, 0, %p2; add.s32 %d, %r9, %r10;"
    half = np.full(5, (ones - 0x80) << 16 | ones - 0x80, np.uint32)
    assert evaluate(f"setp.lt.{kind} " + both.format("%b"), np.int32, a, half).tolist() == [3, 2, 1, 0, 1]
    assert evaluate(f"setp.ltu.{kind} " + both.format("%b"), np.int32, a, half).tolist() == [3, 2, 1, 0, 3]
    p = np.array([1, 0, 1, 0, 1], bool)
    text = f"setp.lt.and.{kind} " + both.format("%b, %c")
    assert evaluate(text, np.int32, a, half, p).tolist() == [3, 0, 1, 0, 1]
