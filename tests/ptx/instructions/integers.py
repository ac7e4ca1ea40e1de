"""Integer arithmetic: PTX ISA, "Integer Arithmetic Instructions" and "Extended-Precision Integer Arithmetic"."""

import operator

import numpy as np

from ..formats import BITS, WIDE
from ..registry import instruction

_ALL = "u16 s16 u32 s32 u64 s64"


def elementwise(found, machine, kind, function, operands=None, result=None):
    """d = function(a, b, ...): operands of `kind`, the result of that or of `result`."""
    read = [machine.source(each, kind) for each in found.operands[1:] if operands is None] or operands
    write = machine.destination(found.operands[0], result or kind)
    if len(read) == 1:
        (first,) = read
        return lambda active: write(active, function(first(active)))
    if len(read) == 2:
        first, second = read
        return lambda active: write(active, function(first(active), second(active)))
    return lambda active: write(active, function(*[each(active) for each in read]))


@instruction("add", _ALL, "sat")
def _add(found, machine):
    if found.has("sat"):
        return elementwise(found, machine, "s32", lambda a, b: _saturate(np.add(a, b, dtype=np.int64)))
    return elementwise(found, machine, found.types[0], operator.add)


@instruction("sub", _ALL, "sat")
def _sub(found, machine):
    if found.has("sat"):
        return elementwise(found, machine, "s32", lambda a, b: _saturate(np.subtract(a, b, dtype=np.int64)))
    return elementwise(found, machine, found.types[0], operator.sub)


def _saturate(values):
    return np.clip(values, -(2**31), 2**31 - 1)


@instruction("neg", "s16 s32 s64")
def _neg(found, machine):
    return elementwise(found, machine, found.types[0], operator.neg)


@instruction("abs", "s16 s32 s64")
def _abs(found, machine):
    return elementwise(found, machine, found.types[0], np.abs)


@instruction("min", _ALL)
def _min(found, machine):
    return elementwise(found, machine, found.types[0], np.minimum)


@instruction("max", _ALL)
def _max(found, machine):
    return elementwise(found, machine, found.types[0], np.maximum)


def product(kind: str, part: str):
    """The low or high half of a product, or all of it (wide)."""
    if part == "lo":
        return operator.mul
    if part == "wide":
        wide = _dtype(WIDE[kind])
        return lambda a, b: np.multiply(a, b, dtype=wide)
    if BITS[kind] < 64:
        wide, shift = _dtype(WIDE[kind]), BITS[kind]
        return lambda a, b: (np.multiply(a, b, dtype=wide) >> wide(shift)).astype(_dtype(kind))
    return _high_signed if kind == "s64" else _high_unsigned


def _dtype(kind):
    return getattr(np, {"s": "int", "u": "uint"}[kind[0]] + kind[1:])


def _high_unsigned(a, b):
    a, b = np.asarray(a), np.asarray(b)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> half) + (other >> half)


def _high_signed(a, b):
    a, b = np.asarray(a), np.asarray(b)
    high = _high_unsigned(a.view(np.uint64), b.view(np.uint64)).view(np.int64)
    return high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)


def _part(found):
    return next(each for each in ("lo", "hi", "wide") if found.has(each))


@instruction("mul", _ALL, "lo hi wide")
def _mul(found, machine):
    kind, part = found.types[0], _part(found)
    result = WIDE[kind] if part == "wide" else kind
    return elementwise(found, machine, kind, product(kind, part), result=result)


@instruction("mad", _ALL, "lo hi wide")
def _mad(found, machine):
    kind, part = found.types[0], _part(found)
    result = WIDE[kind] if part == "wide" else kind
    multiply = product(kind, part)
    read = [machine.source(each, kind) for each in found.operands[1:3]] + [machine.source(found.operands[3], result)]
    return elementwise(found, machine, kind, lambda a, b, c: multiply(a, b) + c, read, result)


@instruction("mul24", "u32 s32", "lo")
def _mul24(found, machine):
    shift = np.array(8, _dtype(found.types[0]))
    return elementwise(found, machine, found.types[0], lambda a, b: (a << shift >> shift) * (b << shift >> shift))


@instruction("div", _ALL)
def _div(found, machine):
    kind = found.types[0]
    return elementwise(found, machine, kind, _signed_quotient if kind[0] == "s" else _unsigned_quotient)


@instruction("rem", _ALL)
def _rem(found, machine):
    kind = found.types[0]
    quotient = _signed_quotient if kind[0] == "s" else _unsigned_quotient
    return elementwise(found, machine, kind, lambda a, b: a - quotient(a, b) * b)


def _unsigned_quotient(a, b):
    """Division by zero gives all ones, as GPUs do; PTX leaves it open."""
    zero = np.equal(b, 0)
    ones = ~np.zeros((), np.asarray(b).dtype)
    return np.where(zero, ones, np.floor_divide(a, np.where(zero, np.ones_like(b), b)))


def _signed_quotient(a, b):
    """Rounded to zero."""
    bits = np.asarray(a).dtype.itemsize * 8
    unsigned = getattr(np, f"uint{bits}")
    magnitude = _unsigned_quotient(np.abs(a).view(unsigned), np.abs(b).view(unsigned)).view(f"int{bits}")
    return np.where((a < 0) != (b < 0), -magnitude, magnitude)


@instruction("add.cc", "u32 s32 u64 s64")
@instruction("addc", "u32 s32 u64 s64", "cc")
def _add_with_carry(found, machine):
    """The carry flag is kept a thread; only these and sub.cc, subc, mad.cc would use it."""
    kind = "u" + found.types[0][1:]
    first, second = (machine.source(each, kind) for each in found.operands[1:])
    write, carry = machine.destination(found.operands[0], kind), machine.carry
    takes, gives = found.opcode == "addc", found.has("cc")

    def run(active):
        a = first(active)
        total = np.asarray(a + second(active))
        over = total < a
        if takes:
            previous = active.of(carry)
            total = total + previous
            over = over | (previous & (total == 0))
        write(active, total)
        if gives:
            carry[active.threads] = over

    return run


@instruction("popc", "b32 b64")
def _popc(found, machine):
    read, write = machine.source(found.operands[1], found.types[0]), machine.destination(found.operands[0], "u32")
    return lambda active: write(active, np.bitwise_count(read(active)))


@instruction("clz", "b32 b64")
def _clz(found, machine):
    bits = BITS[found.types[0]]
    read, write = machine.source(found.operands[1], found.types[0]), machine.destination(found.operands[0], "u32")
    return lambda active: write(active, bits - 1 - _highest(read(active), bits))


def _highest(values, bits):
    """The place of the highest bit that is set, or -1."""
    place = np.full(np.shape(values), -1)
    for bit in range(bits):
        place = np.where(values >> values.dtype.type(bit) & values.dtype.type(1), bit, place)
    return place


@instruction("bfind", "u32 s32 u64 s64", "shiftamt")
def _bfind(found, machine):
    kind = found.types[0]
    bits = BITS[kind]
    read, write = machine.source(found.operands[1], kind), machine.destination(found.operands[0], "u32")
    shift = found.has("shiftamt")

    def run(active):
        values = np.asarray(read(active))
        values = np.where(values < 0, ~values, values).astype(f"u{bits // 8}")
        place = _highest(values, bits)
        write(active, np.where(place < 0, -1, bits - 1 - place if shift else place).astype(np.int32).view(np.uint32))

    return run


@instruction("brev", "b32 b64")
def _brev(found, machine):
    bits = BITS[found.types[0]]

    def reverse(values):
        result = np.zeros_like(values)
        one = values.dtype.type(1)
        for _ in range(bits):
            result = (result << one) | (values & one)
            values = values >> one
        return result

    return elementwise(found, machine, found.types[0], reverse)


@instruction("bfe", "u32 s32 u64 s64")
def _bfe(found, machine):
    kind = found.types[0]
    bits = BITS[kind]
    read = [machine.source(found.operands[1], kind)] + [machine.source(each, "u32") for each in found.operands[2:]]

    def extract(value, position, length):
        position, length = (np.asarray(each).astype(np.int64) & 0xFF for each in (position, length))
        unsigned = np.asarray(value).view(f"u{bits // 8}").astype(np.uint64)
        length_mask = np.where(
            length >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(length, 63).astype(np.uint64)) - np.uint64(1)
        )
        part = (
            np.where(position >= bits, np.uint64(0), unsigned >> np.minimum(position, 63).astype(np.uint64))
            & length_mask
        )
        if kind[0] == "s":
            sign_at = np.minimum(position + length - 1, bits - 1)
            sign = (unsigned >> np.maximum(sign_at, 0).astype(np.uint64)) & np.uint64(1)
            fill = (sign == 1) & (length > 0)
            known = np.clip(np.minimum(length, bits - position), 0, 63).astype(np.uint64)
            part = np.where(fill, part | (~np.uint64(0) << known), part)
        return part.astype(f"u{bits // 8}").view(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")

    return elementwise(found, machine, kind, extract, read)


@instruction("bfi", "b32 b64")
def _bfi(found, machine):
    kind = found.types[0]
    bits = BITS[kind]
    read = [machine.source(each, kind) for each in found.operands[1:3]]
    read += [machine.source(each, "u32") for each in found.operands[3:]]

    def insert(value, into, position, length):
        position, length = (np.asarray(each).astype(np.int64) & 0xFF for each in (position, length))
        last = np.minimum(position + length, bits)
        below = lambda count: np.where(  # noqa: E731
            count >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1)
        )
        mask = below(last) & ~below(np.minimum(position, bits))
        moved = np.asarray(value).astype(np.uint64) << np.minimum(position, 63).astype(np.uint64)
        return ((np.asarray(into).astype(np.uint64) & ~mask) | (moved & mask)).astype(f"u{bits // 8}")

    return elementwise(found, machine, kind, insert, read)
