"""Loads and stores: PTX ISA, "Data Movement and Conversion Instructions: ld, ldu, st, prefetch, atom, red"."""

import numpy as np

from ..errors import Fault
from ..formats import BITS, VALUES
from ..machine import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW
from ..operands import elements
from ..registry import instruction

_TYPES = "b8 u8 s8 b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64"
_SPACES = "global shared shared::cta local param param::entry"
_ORDERS = "weak relaxed acquire release volatile cta cluster gpu sys mmio"
_CACHES = (
    "ca cg cs lu cv wb wt nc v2 v4 v8 unified L1::evict_last L1::evict_first L1::evict_normal L1::evict_unchanged "
    "L1::no_allocate L2::64B L2::128B L2::256B L2::cache_hint L2::evict_last L2::evict_first L2::evict_normal"
)


def _shape(found):
    """Type and number of elements, and bytes of them all."""
    kind = found.types[-1]
    count = next((int(each[1:]) for each in found.modifiers if each in ("v2", "v4", "v8")), 1)
    return kind, count, BITS[kind] // 8 * count


def _space(found):
    return next((each.split("::")[0] for each in found.modifiers if each in _SPACES.split()), "generic")


def resolve(machine, found, operand, space: str):
    """A function that gives the space in which active threads' addresses lie, and the addresses in it."""
    read = machine.address(operand)
    if space != "generic":
        window = PARAMETER_WINDOW if space == "param" else 0
        return lambda active: (space, read(active) - window if window else read(active))

    def run(active):
        addresses = read(active)
        window = addresses >> 56
        if (window != window[0]).any():
            raise Fault("generic addresses of several state spaces", active.threads[0])
        start = int(window[0]) << 56
        names = {0: "global", SHARED_WINDOW: "shared", LOCAL_WINDOW: "local", PARAMETER_WINDOW: "param"}
        if start not in names:
            raise Fault(f"{int(addresses[0]):#x} is no generic address", active.threads[0])
        return names[start], addresses - start

    return run


@instruction("ld", _TYPES, f"{_SPACES} {_ORDERS} {_CACHES}")
@instruction("ldu", _TYPES, f"{_SPACES} {_CACHES}")
def _ld(found, machine):
    kind, count, width = _shape(found)
    where = resolve(machine, found, found.operands[1], _space(found))
    write = machine.destinations(found.operands[0], kind)
    names = [each.name for each in elements(found.operands[0])]
    dtype = VALUES[kind]

    def run(active):
        space, addresses = where(active)
        words, poison = machine.load(found, space, active, addresses, width)
        values = words.view(dtype)
        for number, each in enumerate(write):
            each(active, values[:, number])
        if poison is not None:
            parts = poison.view(f"u{dtype().itemsize}")
            for number, name in enumerate(names):
                machine.poison.mark(name, active, parts[:, number])

    return run, dict(taint="load")


@instruction("st", _TYPES, f"{_SPACES} {_ORDERS} {_CACHES}")
def _st(found, machine):
    kind, count, width = _shape(found)
    bits = f"b{BITS[kind]}"
    where = resolve(machine, found, found.operands[0], _space(found))
    read = machine.sources(found.operands[1], bits)
    names = [getattr(each, "name", None) for each in elements(found.operands[1])]

    def run(active):
        space, addresses = where(active)
        values = np.empty((active.count, count), VALUES[bits])
        for number, each in enumerate(read):
            values[:, number] = each(active)
        poison = machine.poison.of_vector(names, active, VALUES[bits]) if machine.poison else None
        machine.store(found, space, active, addresses, values, poison)

    return run, dict(taint="store")


@instruction("prefetch", "", "global L1 L2 L2::evict_last L2::evict_normal")
@instruction("prefetchu", "", "L1")
@instruction("applypriority", "", "global L2::evict_normal")
def _prefetch(found, machine):
    return lambda active: None


@instruction("createpolicy", "b64", "fractional L2::evict_last L2::evict_first L2::evict_normal L2::evict_unchanged")
def _createpolicy(found, machine):
    write = machine.destination(found.operands[0], "b64")
    return lambda active: write(active, np.uint64(0))


_REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, new: new,
}  # fmt: skip


def _atomic(found, machine, address, operand, result):
    kind = found.types[-1]
    name = next((each for each in _REDUCE if found.has(each)), None)
    if name is None:
        raise Fault(f"atomic {'.'.join(found.modifiers)} is not known")
    function, width = _REDUCE[name], BITS[kind] // 8
    where, read = resolve(machine, found, address, _space(found)), machine.source(operand, kind)
    write = machine.destination(result, kind) if result else None

    def run(active):
        space, addresses = where(active)
        values = np.broadcast_to(read(active), active.count)
        before = np.empty(active.count, VALUES[kind])
        for number in range(active.count):  # one thread after another, as these may meet
            one, place = active.only(np.arange(active.count) == number), addresses[number : number + 1]
            words, poison = machine.load(found, space, one, place, width)
            if poison is not None:
                raise Fault("an atomic operation on memory that nothing has written", one.threads[0])
            before[number] = words.view(VALUES[kind])[0, 0]
            after = np.array([[function(before[number], values[number])]], VALUES[kind])
            machine.store(found, space, one, place, after, None)
        if write:
            write(active, before)

    return run


_ATOMIC = "global shared shared::cta relaxed acquire release acq_rel gpu cta sys noftz " + " ".join(_REDUCE)


@instruction("atom", "b32 b64 u32 u64 s32 s64 f32 f64", _ATOMIC)
def _atom(found, machine):
    return _atomic(found, machine, found.operands[1], found.operands[2], found.operands[0])


@instruction("red", "b32 b64 u32 u64 s32 s64 f32 f64", _ATOMIC)
def _red(found, machine):
    return _atomic(found, machine, found.operands[0], found.operands[1], None)
