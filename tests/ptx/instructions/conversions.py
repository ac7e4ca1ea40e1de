"""Conversions: PTX ISA, "Data Movement and Conversion Instructions: cvt"."""

import numpy as np

from ..errors import Fault
from ..formats import BITS, VALUES, flush, round_float, widen_bf16
from ..registry import instruction
from .floating import packed, saturate

_INTEGERS = "u8 s8 u16 s16 u32 s32 u64 s64"
_FLOATS = "f16 bf16 f32 f64"
_TO_INTEGER = dict(rni=np.rint, rzi=np.trunc, rmi=np.floor, rpi=np.ceil)


@instruction("cvt", _INTEGERS, "sat")
def _between_integers(found, machine):
    target, source = found.types
    read, write = machine.source(found.operands[1], source), machine.destination(found.operands[0], target)
    if found.has("sat"):
        low, high = np.iinfo(VALUES[target]).min, np.iinfo(VALUES[target]).max
        source_range = np.iinfo(VALUES[source])
        low, high = max(low, source_range.min), min(high, source_range.max)
        return lambda active: write(active, np.clip(read(active), low, high).astype(VALUES[target]))
    return lambda active: write(active, np.asarray(read(active)).astype(VALUES[target]))


@instruction("cvt", f"{_INTEGERS} {_FLOATS}", "rn rz rm rp rni rzi rmi rpi ftz sat relu")
def _cvt(found, machine):
    target, source = found.types
    if source[0] in "us":
        return _from_integer(found, machine, target, source)
    if target[0] in "us":
        return _to_integer(found, machine, target, source)
    return _between_floats(found, machine, target, source)


def _mode(found):
    return next((mode for mode in ("rn", "rz", "rm", "rp") if found.has(mode)), "rn")


def _from_integer(found, machine, target, source):
    read, write = machine.source(found.operands[1], source), machine.destination(found.operands[0], target)
    mode = _mode(found)
    if BITS[source] == 64 and mode != "rn":
        raise Fault("a directed rounding from 64 bits is not known")

    def run(active):
        values = np.asarray(read(active))
        if mode == "rn" and target in ("f32", "f64"):
            result = values.astype(VALUES[target])
        elif BITS[source] == 64:
            raise Fault(f"{source} to {target} is not known")
        else:
            result = round_float(values.astype(np.float64), target, mode)
        write(active, saturate(result) if found.has("sat") else result)

    return run


def _widened(machine, operand, kind):
    read = machine.source(operand, kind)
    return (lambda active: widen_bf16(read(active))) if kind == "bf16" else read


def _to_integer(found, machine, target, source):
    """Out of range gives the nearest integer of the range; NaN gives 0, which PTX promises for 32 bits and fewer."""
    read, write = _widened(machine, found.operands[1], source), machine.destination(found.operands[0], target)
    whole = next(function for name, function in _TO_INTEGER.items() if found.has(name))
    information, zeros = np.iinfo(VALUES[target]), found.has("ftz")
    top = float(information.max) + 1

    def run(active):
        values = np.asarray(read(active))
        if zeros:
            values = flush(values)
        values = whole(values.astype(np.float64))
        inside = np.where((values >= float(information.min)) & (values < top), values, 0).astype(VALUES[target])
        result = np.where(
            values >= top, information.max, np.where(values < float(information.min), information.min, inside)
        )
        write(active, result.astype(VALUES[target]))

    return run


def _between_floats(found, machine, target, source):
    read, write = _widened(machine, found.operands[1], source), machine.destination(found.operands[0], target)
    mode, zeros = _mode(found), found.has("ftz")
    whole = next((function for name, function in _TO_INTEGER.items() if found.has(name)), None)
    limited, relu = found.has("sat"), found.has("relu")

    def run(active):
        values = np.asarray(read(active))
        if zeros:
            values = flush(values.astype(np.float32, copy=False))
        values = values.astype(np.float64)
        if whole:
            values = whole(values)
        if relu:
            values = np.where(np.isnan(values), values, np.maximum(values, 0))
        if limited:
            values = saturate(values)
        result = round_float(values, target, mode)
        write(active, flush(result) if zeros and target == "f32" else result)

    return run


@instruction("cvt", "f16x2 bf16x2 f32", "rn rz relu satfinite")
def _pack(found, machine):
    """Two float32 to halves of a register: the first operand to the upper one."""
    kind, mode = found.types[0], _mode(found)
    upper, lower = (machine.source(each, "f32") for each in found.operands[1:])
    write = machine.destination(found.operands[0], kind)
    half = kind[:-2]
    _, narrow = packed(kind)
    if found.has("satfinite"):
        raise Fault(".satfinite is not known")

    def run(active):
        values = np.stack(np.broadcast_arrays(lower(active), upper(active)), axis=-1)
        if found.has("relu"):
            values = np.where(np.isnan(values), values, np.maximum(values, 0))
        if mode == "rn":
            write(active, narrow(values))
        else:
            bits = round_float(values.astype(np.float64), half, mode).view(np.uint16)
            write(active, np.ascontiguousarray(bits).view(np.uint32)[..., 0])

    return run


@instruction("cvt.rna", "tf32 f32")
@instruction("cvt.rn", "tf32 f32")
@instruction("cvt.rz", "tf32 f32")
def _to_tf32(found, machine):
    """float32 with 10 bits of mantissa, the other 13 being zeros; .rna rounds ties away from zero."""
    read, write = machine.source(found.operands[1], "b32"), machine.destination(found.operands[0], "b32")
    mode = found.modifiers[0]

    def run(active):
        bits = np.asarray(read(active))
        half = np.uint32(0x1000) if mode == "rna" else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        rounded = bits if mode == "rz" else bits + half
        finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
        write(active, np.where(finite, rounded & np.uint32(0xFFFFE000), bits))

    return run
