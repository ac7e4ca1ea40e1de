"""Bulk copies: PTX ISA, "cp.async.bulk", "cp.async.bulk.tensor", "cp.async.bulk.commit_group", "..wait_group"."""

import numpy as np

from ..bulk import CHUNK
from ..errors import Fault
from ..registry import instruction
from ..tensor_map import TensorMap
from .loads import resolve

_HINTS = "L2::cache_hint"
_LOAD = "shared::cluster shared::cta global mbarrier::complete_tx::bytes"
_STORE = "global shared::cta bulk_group"
_RANKS = "1d 2d 3d 4d 5d tile"


def _is_load(found) -> bool:
    if found.has("mbarrier::complete_tx::bytes") == found.has("bulk_group"):
        raise Fault("a bulk copy completes at an mbarrier or in a bulk group")
    return found.has("mbarrier::complete_tx::bytes")


@instruction("cp.async.bulk.prefetch", "", f"L2 global {_HINTS}")
@instruction("cp.async.bulk.prefetch.tensor", "", f"L2 global {_RANKS} {_HINTS}")
def _prefetch(found, machine):
    return lambda active: None


@instruction("cp.async.bulk.commit_group")
def _commit(found, machine):
    return lambda active: machine.bulk.commit(active)


@instruction("cp.async.bulk.wait_group", "", "read")
def _wait(found, machine):
    """With .read, sources have been read; they are then written as well, which nobody could tell."""
    pending = found.operands[0].value
    return lambda active: machine.bulk.wait(active, pending)


@instruction("cp.async.bulk", "", f"{_LOAD} {_STORE} {_HINTS}")
def _bulk(found, machine):
    loads = _is_load(found)
    write, read = machine.address(found.operands[0]), machine.address(found.operands[1])
    size_of = machine.source(found.operands[2], "u32")
    mbarrier = machine.address(found.operands[3]) if loads else None

    def run(active):
        targets, sources = write(active), read(active)
        sizes = np.broadcast_to(size_of(active), active.count).astype(np.int64)
        shared, outer = (targets, sources) if loads else (sources, targets)
        barriers = mbarrier(active) if loads else shared
        for number, thread in enumerate(active.threads.tolist()):
            one, size = active.only(active.threads == thread), int(sizes[number])
            if size % CHUNK or shared[number] % CHUNK or outer[number] % CHUNK or not size:
                raise Fault(f"a bulk copy of {size} bytes, or one that is not aligned to 16", thread)
            steps = np.arange(0, size, CHUNK)
            machine.observe(found, "shared", one, shared[number : number + 1], size)
            machine.observe(found, "global", one, outer[number : number + 1], size)
            places = machine.shared.range(thread, int(shared[number]), size) + steps
            addresses, threads = outer[number] + steps, np.full(len(steps), thread)
            machine.memory.check(addresses, CHUNK, threads, writes=not loads)
            if loads:
                fetch = _fetch(machine, addresses)
                machine.bulk.load(thread, places, fetch, int(barriers[number]), size)
            else:
                machine.bulk.store(thread, places, _put(machine, addresses))

    return run


def _fetch(machine, addresses):
    return lambda: machine.memory.load(addresses, CHUNK)


def _put(machine, addresses):
    def put(words, poison, thread):
        _refuse(poison, thread)
        machine.memory.store(addresses, words)

    return put


def _refuse(poison, thread):
    if poison is not None and poison.any():
        raise Fault("a bulk copy stores what nothing has written", thread)


@instruction("cp.async.bulk.tensor", "", f"{_RANKS} {_LOAD} {_STORE} {_HINTS}")
def _tensor(found, machine):
    loads, rank = _is_load(found), next(int(each[0]) for each in found.modifiers if each in _RANKS.split()[:5])
    shared_operand, map_operand = found.operands[:2] if loads else found.operands[1::-1]
    where = resolve(machine, found, map_operand._replace(coordinates=None), "generic")
    read = machine.sources(map_operand.coordinates, "s32")
    shared_at = machine.address(shared_operand)
    mbarrier = machine.address(found.operands[2]) if loads else None
    if len(read) != rank:
        raise Fault("cp.async.bulk.tensor has another number of coordinates")

    def run(active):
        space, maps = where(active)
        shared = shared_at(active)
        barriers = mbarrier(active) if loads else shared
        coordinates = np.stack([np.broadcast_to(each(active), active.count) for each in read], axis=1)
        for number, thread in enumerate(active.threads.tolist()):
            one = active.only(active.threads == thread)
            tensor = TensorMap.decode(_map_bytes(machine, space, one, int(maps[number])))
            _one(one, thread, tensor, coordinates[number], int(shared[number]), int(barriers[number]))

    def _one(one, thread, tensor, coordinates, start, barrier):
        if len(tensor.sizes) != rank:
            raise Fault(f"a tensor map of {len(tensor.sizes)} dimensions", thread)
        if start % 128:
            raise Fault(f"a box at {start:#x} of shared memory, which is not aligned to 128 bytes", thread)
        addresses, inside = tensor.elements(coordinates)
        if inside.any():
            threads = np.full(int(inside.sum()), thread)
            machine.memory.check(addresses[inside], tensor.element, threads, writes=not loads)
        base = machine.shared.range(thread, start, tensor.bytes) - start
        places = base + tensor.places(start)
        machine.observe(found, "shared", one, np.array([start]), tensor.bytes)
        if loads:
            machine.bulk.load(thread, places, _fetch_box(machine, tensor, addresses, inside), barrier, tensor.bytes)
        else:
            machine.bulk.store(thread, places, _put_box(machine, tensor, addresses, inside))

    return run


def _map_bytes(machine, space, one, address) -> bytes:
    if space == "global":
        steps = address + np.arange(0, 128, CHUNK)
        machine.memory.check(steps, CHUNK, np.full(len(steps), one.threads[0]))
        return machine.memory.load(steps, CHUNK).tobytes()
    if space != "param":
        raise Fault("a tensor map lies in global memory or in a parameter", one.threads[0])
    return machine.parameters[address : address + 128].tobytes()


def _fetch_box(machine, tensor, addresses, inside):
    def fetch():
        filler = 0xFF if tensor.fill == "nan" else 0
        box = np.full((len(addresses), tensor.element), filler, np.uint8)
        box[inside] = machine.memory.load_bytes(addresses[inside], tensor.element)
        return box.reshape(-1, CHUNK)

    return fetch


def _put_box(machine, tensor, addresses, inside):
    def put(words, poison, thread):
        box = words.reshape(-1, tensor.element)[inside]
        _refuse(None if poison is None else poison.reshape(-1, tensor.element)[inside], thread)
        machine.memory.store(addresses[inside], np.ascontiguousarray(box))

    return put
