"""PTX types as numpy's, and the roundings between floating-point formats."""

import numpy as np

BITS = {
    **{name: int(name[1:]) for name in "b8 u8 s8 b16 u16 s16 f16 b32 u32 s32 f32 b64 u64 s64 f64".split()},
    **{"bf16": 16, "f16x2": 32, "bf16x2": 32, "tf32": 32},
}
TYPES = frozenset(BITS) | {"pred", "b128"}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
VALUES = {
    "pred": np.bool_,
    "f16": np.float16,
    "f32": np.float32,
    "tf32": np.float32,
    "f64": np.float64,
    **{f"s{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"{letter}{bits}": dtype for letter in "ub" for bits, dtype in UNSIGNED.items()},
    **{"bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32},
}
WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def storage(name: str) -> type:
    """What a register of this type is kept as."""
    return np.bool_ if name == "pred" else UNSIGNED[BITS[name]]


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16, given as its bits, as float32: exact."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even; float64 is rounded once. NaN becomes 0x7FFF, as in PTX."""
    values = np.asarray(values)
    single = to_odd_float32(values) if values.dtype == np.float64 else values.astype(np.float32, copy=False)
    bits = np.ascontiguousarray(single).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(single), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_odd_float32(values: np.ndarray) -> np.ndarray:
    """float64 to float32, inexact values to the odd one of their neighbours: rounding that again is rounding once."""
    near = values.astype(np.float32)
    back = near.astype(np.float64)
    even = (near.view(np.uint32) & np.uint32(1)) == 0
    other = np.nextafter(near, np.where(values > back, np.float32(np.inf), np.float32(-np.inf)))
    return np.where((back != values) & even & np.isfinite(values), other, near)


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float16, bfloat16 or float32 values in float64, such that rounding to any of them is rounding once.

    The product is exact. The sum is rounded to odd wherever rounding it twice could differ from rounding it once.
    """
    product = np.multiply(a, b, dtype=np.float64)
    return sum_to_odd(product, np.asarray(c, dtype=np.float64))


def sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd where it matters for a later rounding to 24 bits or fewer."""
    total = np.asarray(a + b)
    bits = total.view(np.int64)
    # A tie of a shorter format ends in zeros: 28 of them for float32, and more for the rest and never fewer but where
    # the result is subnormal there.
    suspicious = (bits & 0xFFFFFFF) == 0
    suspicious |= np.abs(total) < 2.0**-125
    if not suspicious.any():
        return total
    back = total - a
    error = (a - (total - back)) + (b - back)
    odd = suspicious & (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
    return np.where(odd, (bits + np.where((error > 0) == (total > 0), 1, -1)).view(np.float64), total)


def round_float(values: np.ndarray, name: str, mode: str = "rn") -> np.ndarray:
    """float64 to f16, f32 or f64 (values) or bf16 (bits): to nearest even, or to zero (rz), down (rm) or up (rp)."""
    if name == "f64":
        return values
    if name == "bf16":
        near = narrow_bf16(values)
        if mode == "rn":
            return near
        return (_directed(values, to_odd_float32(values), mode).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    near = values.astype(VALUES[name])
    return near if mode == "rn" else _step_back(values, near, mode)


def _step_back(values, near, mode):
    back = near.astype(np.float64)
    down, up = near.dtype.type(-np.inf), near.dtype.type(np.inf)
    above, below = back > values, back < values
    if mode in ("rm", "rz"):
        near = np.where(above & ((mode == "rm") | (values > 0)), np.nextafter(near, down), near)
    if mode in ("rp", "rz"):
        near = np.where(below & ((mode == "rp") | (values < 0)), np.nextafter(near, up), near)
    return near


def _directed(values, odd, mode):
    """float32 whose upper half is the bfloat16 asked for: cut off, after a step away from zero if needed."""
    bits = np.ascontiguousarray(odd).view(np.uint32)
    inexact = (bits & np.uint32(0xFFFF)) != 0
    away = inexact & (((mode == "rp") & (values > 0)) | ((mode == "rm") & (values < 0)))
    return np.where(away, bits + np.uint32(0x10000), bits).view(np.float32)


def flush(values: np.ndarray) -> np.ndarray:
    """.ftz: subnormal float32 values become zeros of their sign."""
    small = np.abs(values) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), values), values) if small.any() else values
