"""Floating-point arithmetic: PTX ISA, "Floating Point", "Half Precision" and "Mixed Precision" instructions.

Every result is that of exact arithmetic, rounded once as the instruction says. Quotients and roots of float32 are taken
in float64 first, which is as good: none lies nearer to a float32 than by 2^-49, relatively, but where it is one.
"""

import numpy as np

from ..errors import Fault
from ..formats import flush, fused_multiply_add, narrow_bf16, round_float, sum_to_odd, widen_bf16
from ..registry import instruction

_HALVES = "f16 f16x2 bf16 bf16x2"
_ROUNDINGS = "rn rz rm rp"


def packed(kind: str):
    """Halves of a register: functions to widen its bits to [..., parts] float32, and back from float64 or float32."""
    if kind == "bf16":
        return widen_bf16, narrow_bf16
    if kind == "f16":
        return (lambda bits: bits.astype(np.float32)), (lambda values: values.astype(np.float16))
    if kind == "bf16x2":
        return (lambda bits: widen_bf16(_split(bits))), (lambda values: _join(narrow_bf16(values)))
    if kind == "f16x2":
        return (
            lambda bits: _split(bits).view(np.float16).astype(np.float32),
            lambda values: _join(values.astype(np.float16).view(np.uint16)),
        )
    raise Fault(f"{kind} is not packed")


def _split(bits):
    return np.ascontiguousarray(bits).reshape(-1, 1).view(np.uint16)


def _join(halves):
    return np.ascontiguousarray(halves).view(np.uint32)[..., 0]


def rounding(found) -> str:
    return next((mode for mode in _ROUNDINGS.split() if found.has(mode)), "rn")


def saturate(values):
    """NaN becomes 0."""
    return np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype)


def operation(found, machine, exact, nearest=None, operands=None):
    """Binds d = round(exact(a, ...)), exact in float64; `nearest` does the same in the type itself, to nearest."""
    kind, mode = found.types[-1], rounding(found)
    read = [machine.source(each, kind) for each in (operands or found.operands[1:])]
    write = machine.destination(found.operands[0], kind)
    zeros, limited = found.has("ftz"), found.has("sat")
    half = kind not in ("f32", "f64")
    widen, narrow = packed(kind) if half else (None, None)
    relu = found.has("relu")

    def run(active):
        values = [each(active) for each in read]
        if half:
            result = exact(*(widen(each).astype(np.float64) for each in values))
            if limited:
                result = saturate(result)
            if relu:
                result = np.where(np.isnan(result), result, np.maximum(result, 0))
            write(active, narrow(result))
            return
        if zeros:
            values = [flush(each) for each in values]
        if mode == "rn" and nearest:
            result = nearest(*values)
        elif kind == "f64":
            result = exact(*values)
        else:
            wide = [each.astype(np.float64) for each in values]
            result = round_float(np.asarray(_down(exact, wide) if mode == "rm" else exact(*wide)), kind, mode)
        if zeros:
            result = flush(result)
        write(active, saturate(result) if limited else result)

    return run


def _down(exact, values):
    """A sum that is exactly 0 is -0 when rounded down: it is minus the sum of the opposites."""
    if exact is fused_multiply_add:
        return -exact(-values[0], values[1], -values[2])
    return -exact(*(-each for each in values)) if exact in (sum_to_odd, _difference) else exact(*values)


def _difference(a, b):
    return sum_to_odd(a, -b)


@instruction("add", f"f32 f64 {_HALVES}", f"{_ROUNDINGS} ftz sat")
def _add(found, machine):
    return operation(found, machine, sum_to_odd, np.add)


@instruction("sub", f"f32 f64 {_HALVES}", f"{_ROUNDINGS} ftz sat")
def _sub(found, machine):
    return operation(found, machine, _difference, np.subtract)


@instruction("mul", f"f32 f64 {_HALVES}", f"{_ROUNDINGS} ftz sat")
def _mul(found, machine):
    return operation(found, machine, np.multiply, np.multiply)


@instruction("fma", f"f32 f64 {_HALVES}", f"{_ROUNDINGS} ftz sat relu")
def _fma(found, machine):
    if found.types[-1] == "f64":
        raise Fault("fma.f64 is not known")
    return operation(found, machine, fused_multiply_add)


@instruction("mad", "f32", f"{_ROUNDINGS} ftz sat")
def _mad(found, machine):
    """On sm_20 and later the same as fma."""
    return operation(found, machine, fused_multiply_add)


@instruction("div", "f32", f"{_ROUNDINGS} ftz")
def _div(found, machine):
    return operation(found, machine, np.divide, np.divide)


@instruction("rcp", "f32", f"{_ROUNDINGS} ftz")
def _rcp(found, machine):
    return operation(found, machine, np.reciprocal, lambda a: np.float32(1) / a)


@instruction("sqrt", "f32", f"{_ROUNDINGS} ftz")
def _sqrt(found, machine):
    return operation(found, machine, np.sqrt, np.sqrt)


def _bits(found, machine, function):
    """Sign manipulation by bits, as neg and abs do it, also to NaN."""
    kind = found.types[-1]
    bits = {"f32": "b32", "f64": "b64", "f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}[kind]
    mask = {"f32": 1 << 31, "f64": 1 << 63, "f16": 1 << 15, "bf16": 1 << 15}.get(kind, 0x80008000)
    read, write = machine.source(found.operands[1], bits), machine.destination(found.operands[0], bits)
    zeros = found.has("ftz")
    if zeros and kind != "f32":
        raise Fault(".ftz of halves is not known")

    def run(active):
        values = read(active)
        if zeros:
            values = flush(values.view(np.float32)).view(np.uint32)
        write(active, function(values, values.dtype.type(mask)))

    return run


@instruction("neg", f"f32 f64 {_HALVES}", "ftz")
def _neg(found, machine):
    return _bits(found, machine, lambda bits, sign: bits ^ sign)


@instruction("abs", f"f32 f64 {_HALVES}", "ftz")
def _abs(found, machine):
    return _bits(found, machine, lambda bits, sign: bits & ~sign)


@instruction("copysign", "f32 f64")
def _copysign(found, machine):
    """The sign of the first operand with the magnitude of the second."""
    return operation(found, machine, None, lambda a, b: np.copysign(b, a))


@instruction("testp", "f32 f64", "finite infinite number notanumber normal subnormal")
def _testp(found, machine):
    kind = found.types[-1]
    tiny = np.finfo(np.float32 if kind == "f32" else np.float64).tiny
    test = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }[found.modifiers[0]]
    read, write = machine.source(found.operands[1], kind), machine.destination(found.operands[0], "pred")
    return lambda active: write(active, test(read(active)))


def _extreme(found, machine, quiet, strict, sign):
    """NaN where one operand is NaN if .NaN, else the other one; -0 is less than +0."""
    if found.has("xorsign", "abs"):
        raise Fault(".xorsign.abs is not known")
    choose = strict if found.has("NaN") else quiet

    def two(a, b):
        result = choose(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            negative = np.signbit(a) & np.signbit(b) if sign > 0 else np.signbit(a) | np.signbit(b)
            result = np.where(zeros, np.where(negative, -0.0, 0.0).astype(result.dtype), result)
        return result

    def function(a, b, *more):
        return two(two(a, b), *more) if more else two(a, b)

    return operation(found, machine, function, function)


@instruction("max", f"f32 f64 {_HALVES}", "ftz NaN xorsign abs")
def _max(found, machine):
    return _extreme(found, machine, np.fmax, np.maximum, 1)


@instruction("min", f"f32 f64 {_HALVES}", "ftz NaN xorsign abs")
def _min(found, machine):
    return _extreme(found, machine, np.fmin, np.minimum, -1)
