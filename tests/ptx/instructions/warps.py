"""What the threads of a warp do together: PTX ISA, "shfl.sync, vote.sync, match, redux, activemask, elect"."""

import numpy as np

from ..active import WARP
from ..errors import Fault
from ..operands import Pair
from ..registry import instruction

_LANES = np.arange(WARP)
_BIT = np.uint32(1) << _LANES.astype(np.uint32)


def membermask(machine, operand):
    """For each warp of active threads, the mask that its threads give; they have to agree."""
    read = machine.source(operand, "u32")

    def members(active):
        masks = read(active)
        if masks.ndim == 0:
            return np.full(len(active.warps), masks)
        first = np.searchsorted(active.threads // WARP, active.warps)
        if (masks != masks[first].repeat(np.diff(np.append(first, active.count)))).any():
            raise Fault("threads of a warp give different membermasks", active.threads[0])
        return masks[first]

    return members


@instruction("shfl.sync", "b32", "bfly idx up down", collective=True)
def _shfl(found, machine):
    mode = found.modifiers[1]
    target = found.operands[0]
    pair = target if isinstance(target, Pair) else None
    write = machine.destination(pair.first if pair else target, "b32")
    valid = machine.destination(pair.second, "pred") if pair else None
    read, by, clamp = (machine.source(each, "u32") for each in found.operands[1:4])
    members = membermask(machine, found.operands[4])

    def source_lanes(active):
        b, c = (each(active).astype(np.int64) for each in (by, clamp))
        lane, b = active.threads % WARP, b & 31
        segment = (c >> 8) & 31
        last = (lane & segment) | (c & 31 & ~segment)
        if mode == "idx":
            lanes = (lane & segment) | (b & ~segment)
        else:
            lanes = {"bfly": lane ^ b, "up": lane - b, "down": lane + b}[mode]
        inside = lanes >= last if mode == "up" else lanes <= last
        return np.where(inside, lanes, lane), inside

    def places_of(active):
        lanes, inside = source_lanes(active)
        warps = active.threads // WARP
        if active.full:
            places = np.repeat(np.arange(len(active.warps)) * WARP, WARP) + lanes
        else:
            wanted = warps * WARP + lanes
            places = np.minimum(np.searchsorted(active.threads, wanted), active.count - 1)
            missing = active.threads[places] != wanted
            if missing.any():
                raise Fault("shfl reads a lane that does not take part", active.threads[np.flatnonzero(missing)[0]])
        return places, inside

    def run(active):
        places, inside = places_of(active)
        write(active, np.broadcast_to(read(active), active.count)[places])
        if valid:
            valid(active, inside)

    def taint(poison, active):
        places, _ = places_of(active)
        name = getattr(found.operands[1], "name", None)
        return [((pair.first if pair else target).name, poison.bits(name, active)[places])]

    return run, dict(members=members, taint=taint)


def _grid(active, values, empty):
    """[warps, 32] of values, lanes that are not active having `empty`."""
    values = np.broadcast_to(values, active.count)
    if active.full:
        return values.reshape(-1, WARP)
    grid = np.full((len(active.warps), WARP), empty, values.dtype)
    grid[np.searchsorted(active.warps, active.threads // WARP), active.threads % WARP] = values
    return grid


def _spread(active, each_warp):
    """A value a warp to its active threads."""
    if active.full:
        return np.repeat(each_warp, WARP)
    return each_warp[np.searchsorted(active.warps, active.threads // WARP)]


@instruction("vote.sync", "b32 pred", "any all uni ballot", collective=True)
def _vote(found, machine):
    mode = found.modifiers[1]
    read = machine.source(found.operands[1], "pred")
    write = machine.destination(found.operands[0], "b32" if mode == "ballot" else "pred")
    members = membermask(machine, found.operands[2])

    def run(active):
        values = read(active)
        some = _grid(active, values, False)
        every = _grid(active, values, True)
        if mode == "ballot":
            result = (some * _BIT).sum(axis=1, dtype=np.uint32)
        elif mode == "any":
            result = some.any(axis=1)
        elif mode == "all":
            result = every.all(axis=1)
        else:
            result = every.all(axis=1) | ~some.any(axis=1)
        write(active, _spread(active, result))

    return run, dict(members=members)


@instruction("redux.sync", "b32 u32 s32 f32", "add min max and or xor abs NaN", collective=True)
def _redux(found, machine):
    kind, name = found.types[-1], found.modifiers[1]
    if kind == "f32":
        raise Fault("redux.sync.f32 is not known")
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    function = reduce.get(name, np.bitwise_xor)
    read, write = machine.source(found.operands[1], kind), machine.destination(found.operands[0], kind)
    members = membermask(machine, found.operands[2])

    def run(active):
        values = np.broadcast_to(read(active), active.count)
        starts = np.searchsorted(active.threads // WARP, active.warps)
        write(active, _spread(active, function.reduceat(values, starts, dtype=values.dtype)))

    return run, dict(members=members)


@instruction("elect.sync", collective=True)
def _elect(found, machine):
    """The lowest lane of the membermask is elected."""
    pair = found.operands[0]
    write, elected = machine.destination(pair.first, "b32"), machine.destination(pair.second, "pred")
    members = membermask(machine, found.operands[1])

    def run(active):
        masks = members(active)
        masks = masks.astype(np.int64)
        lowest = _spread(active, np.bitwise_count((masks & -masks) - 1).astype(np.int64))
        write(active, lowest.astype(np.uint32))
        elected(active, active.threads % WARP == lowest)

    return run, dict(members=members)


@instruction("activemask", "b32")
def _activemask(found, machine):
    write = machine.destination(found.operands[0], "b32")

    def run(active):
        lanes = _grid(active, np.ones(active.count, bool), False)
        write(active, _spread(active, (lanes * _BIT).sum(axis=1, dtype=np.uint32)))

    return run


@instruction("bar.warp.sync", collective=True)
def _bar_warp(found, machine):
    members = membermask(machine, found.operands[0])
    return (lambda active: machine.warp_synchronised(active)), dict(members=members)
