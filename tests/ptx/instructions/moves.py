"""Moves: PTX ISA, "Data Movement and Conversion Instructions: mov, cvta, isspacep"."""

import numpy as np

from ..formats import BITS, VALUES
from ..machine import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW
from ..operands import Vector
from ..registry import instruction


@instruction("mov", "pred b16 b32 b64 u16 u32 u64 s16 s32 s64 f32 f64")
def _mov(found, machine):
    kind = found.types[0]
    target, source = found.operands
    if isinstance(target, Vector):
        return _unpack(machine, target, source, kind)
    if isinstance(source, Vector):
        return _pack(machine, target, source, kind)
    read, write = machine.source(source, kind), machine.destination(target, kind)
    moved = getattr(source, "name", None)
    taint = lambda poison, active: [(target.name, poison.bits(moved, active))]  # noqa: E731
    return (lambda active: write(active, read(active))), dict(taint=taint)


def _pack(machine, target, source, kind):
    """The first element is the least significant."""
    part = f"b{BITS[kind] // len(source.elements)}"
    read, write = machine.sources(source, part), machine.destination(target, kind)
    dtype = VALUES[kind]

    def run(active):
        parts = np.empty((active.count, len(read)), VALUES[part])
        for number, each in enumerate(read):
            parts[:, number] = each(active)
        write(active, parts.view(dtype)[:, 0])

    def taint(poison, active):
        names = [getattr(each, "name", None) for each in source.elements]
        spoiled = np.stack([poison.bits(name, active).astype(VALUES[part]) for name in names], axis=1)
        return [(target.name, spoiled.view(dtype)[:, 0])]

    return run, dict(taint=taint)


def _unpack(machine, target, source, kind):
    part = f"b{BITS[kind] // len(target.elements)}"
    read, write = machine.source(source, kind), machine.destinations(target, part)
    dtype = VALUES[part]

    def run(active):
        parts = np.array(np.broadcast_to(read(active), active.count)).reshape(-1, 1).view(dtype)
        for number, each in enumerate(write):
            each(active, parts[:, number])

    def taint(poison, active):
        spoiled = poison.bits(getattr(source, "name", None), active).astype(VALUES[kind])[:, None].view(dtype)
        return [(each.name, spoiled[:, number]) for number, each in enumerate(target.elements)]

    return run, dict(taint=taint)


_WINDOWS = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0, "param": 0}


@instruction("cvta", "u32 u64", "to shared shared::cta global local param const")
def _cvta(found, machine):
    """Addresses in a parameter are those of its window already."""
    window = np.uint64(next((offset for name, offset in _WINDOWS.items() if found.has(name)), 0))
    read, write = machine.source(found.operands[1], "u64"), machine.destination(found.operands[0], "u64")
    if found.has("to"):
        return lambda active: write(active, read(active) - window)
    return lambda active: write(active, read(active) + window)


@instruction("isspacep", "", "shared shared::cta global local param")
def _isspacep(found, machine):
    read, write = machine.source(found.operands[1], "u64"), machine.destination(found.operands[0], "pred")
    windows = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAMETER_WINDOW}
    window = windows.get(found.modifiers[0], 0)
    return lambda active: write(active, (read(active) >> np.uint64(56)) == np.uint64(window >> 56))
