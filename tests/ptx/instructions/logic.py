"""Logic, shifts, comparisons and selections: PTX ISA, "Logic and Shift", "Comparison and Selection Instructions"."""

import operator

import numpy as np

from ..formats import BITS, VALUES, flush, widen_bf16
from ..operands import Pair
from ..registry import instruction
from .floating import packed
from .integers import elementwise

_BITS = "pred b16 b32 b64"


@instruction("and", _BITS)
def _and(found, machine):
    return elementwise(found, machine, found.types[0], operator.and_)


@instruction("or", _BITS)
def _or(found, machine):
    return elementwise(found, machine, found.types[0], operator.or_)


@instruction("xor", _BITS)
def _xor(found, machine):
    return elementwise(found, machine, found.types[0], operator.xor)


@instruction("not", _BITS)
def _not(found, machine):
    return elementwise(found, machine, found.types[0], operator.invert)


@instruction("cnot", "b16 b32 b64")
def _cnot(found, machine):
    return elementwise(found, machine, found.types[0], lambda a: np.equal(a, 0))


@instruction("shl", "b16 b32 b64")
def _shl(found, machine):
    kind = found.types[0]
    bits = BITS[kind]
    read = [machine.source(found.operands[1], kind), machine.source(found.operands[2], "u32")]

    def shift(value, by):
        if np.ndim(by) == 0:
            return value << value.dtype.type(by) if by < bits else np.zeros_like(value)
        moved = value << np.minimum(by, bits - 1).astype(f"u{bits // 8}")
        return np.where(by >= bits, moved.dtype.type(0), moved)

    return elementwise(found, machine, kind, shift, read)


@instruction("shr", "b16 b32 b64 u16 u32 u64 s16 s32 s64")
def _shr(found, machine):
    kind = found.types[0]
    bits, signed = BITS[kind], kind[0] == "s"
    read = [machine.source(found.operands[1], kind), machine.source(found.operands[2], "u32")]

    def shift(value, by):
        dtype = value.dtype
        if np.ndim(by) == 0 and (by < bits or signed):
            return value >> dtype.type(min(by, bits - 1))
        moved = value >> np.minimum(by, bits - 1).astype(dtype)
        return moved if signed else np.where(by >= bits, dtype.type(0), moved)

    return elementwise(found, machine, kind, shift, read)


@instruction("shf", "b32", "l r wrap clamp")
def _shf(found, machine):
    left, wrap = found.has("l"), found.has("wrap")
    read = [machine.source(each, "u32") for each in found.operands[1:]]

    def shift(low, high, by):
        by = (by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32))).astype(np.uint64)
        both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | np.asarray(low).astype(np.uint64)
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return elementwise(found, machine, "b32", shift, read)


@instruction("lop3", "b32")
def _lop3(found, machine):
    table = found.operands[4].value
    read = [machine.source(each, "b32") for each in found.operands[1:4]]

    def look_up(a, b, c):
        result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
        for case in range(8):
            if table >> case & 1:
                result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        return result

    return elementwise(found, machine, "b32", look_up, read)


@instruction("prmt", "b32")
def _prmt(found, machine):
    """The default mode: four selectors of four bits, of which the highest replicates the sign."""

    def permute(a, b, selector):
        a, b, selector = np.broadcast_arrays(a, b, selector)
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.zeros(both.shape, np.uint32)
        for byte in range(4):
            chosen = (selector >> np.uint32(4 * byte)) & np.uint32(15)
            value = ((both >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)).astype(
                np.uint32
            )
            sign = np.where(value & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
            result |= np.where(chosen & np.uint32(8), sign, value) << np.uint32(8 * byte)
        return result

    return elementwise(found, machine, "b32", permute)


@instruction("selp", "b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64")
def _selp(found, machine):
    kind = "b" + found.types[0][1:]
    read = [machine.source(found.operands[3], "pred")] + [machine.source(each, kind) for each in found.operands[1:3]]
    chosen = [getattr(each, "name", None) for each in found.operands[1:3]]
    condition = found.operands[3].name

    def taint(poison, active):
        either = np.where(read[0](active), *(poison.bits(name, active).astype(VALUES[kind]) for name in chosen))
        return [(found.operands[0].name, np.where(poison.bits(condition, active), ~VALUES[kind](0), either))]

    return elementwise(found, machine, kind, np.where, read), dict(taint=taint)


_COMPARE = dict(eq=np.equal, ne=np.not_equal, lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal)
_UNSIGNED = dict(lo="lt", ls="le", hi="gt", hs="ge")
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(name: str, floating: bool):
    """NaN compares false, or true where the name ends in u: equ, neu, ltu, leu, gtu, geu."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name[:-1] in _COMPARE:
        compare = _COMPARE[name[:-1]]
        return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
    compare = _COMPARE[_UNSIGNED.get(name, name)]
    if floating and name == "ne":
        return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))
    return compare


_NAMES = " ".join([*_COMPARE, *_UNSIGNED, *(name + "u" for name in _COMPARE), "num", "nan", *_COMBINE, "ftz"])


@instruction("setp", "b16 b32 b64 u16 u32 u64 s16 s32 s64 f16 bf16 f32 f64", _NAMES)
def _setp(found, machine):
    name, kind = found.modifiers[0], found.types[-1]
    compare = comparison(name, kind[0] == "f" or kind == "bf16")
    first, second = (machine.source(each, kind) for each in found.operands[1:3])
    if kind == "bf16":
        narrow_first, narrow_second = first, second
        first, second = (
            lambda active: widen_bf16(narrow_first(active)),
            lambda active: widen_bf16(narrow_second(active)),
        )
    if found.has("ftz"):
        whole_first, whole_second = first, second
        first, second = lambda active: flush(whole_first(active)), lambda active: flush(whole_second(active))
    combine = next((function for word, function in _COMBINE.items() if found.has(word)), None)
    third = machine.source(found.operands[3], "pred") if combine else None
    target = found.operands[0]
    write = machine.destination(target.first if isinstance(target, Pair) else target, "pred")
    write_other = machine.destination(target.second, "pred") if isinstance(target, Pair) else None

    def run(active):
        result = compare(first(active), second(active))
        other = ~result
        if combine:
            given = third(active)
            result, other = combine(result, given), combine(other, given)
        write(active, result)
        if write_other:
            write_other(active, other)

    return run


@instruction("setp", "f16x2 bf16x2", _NAMES)
def _setp_packed(found, machine):
    """p|q of the lower and of the upper halves."""
    kind = found.types[-1]
    compare, (widen, _) = comparison(found.modifiers[0], True), packed(kind)
    first, second = (machine.source(each, kind) for each in found.operands[1:3])
    combine = next((function for word, function in _COMBINE.items() if found.has(word)), None)
    third = machine.source(found.operands[3], "pred") if combine else None
    target = found.operands[0]
    targets = (target.first, target.second) if isinstance(target, Pair) else (target,)
    writes = [machine.destination(each, "pred") for each in targets]

    def run(active):
        halves = [widen(np.broadcast_to(each(active), active.count)) for each in (first, second)]
        if found.has("ftz"):
            halves = [flush(each) for each in halves]
        results = compare(*halves)
        for half, write in enumerate(writes):
            result = results[:, half]
            write(active, combine(result, third(active)) if combine else result)

    return run
