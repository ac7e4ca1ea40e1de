"""Products of a warpgroup: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".

Products are exact; the sum over k and the accumulator is taken in float64 and rounded once (see matrices.py).
"""

import re

import numpy as np

from ..active import WARP, Active
from ..errors import Fault
from ..formats import BITS
from ..operands import Vector, elements
from ..products import WARPGROUP
from ..registry import instruction
from .matrices import check_tf32, fragment_a, to_float

_CHUNK = 16  # bytes that lie together whatever the swizzle
_SWIZZLED_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}


class Descriptor:
    """The matrix descriptor's fields (PTX ISA, "Matrix Descriptor Format"), one a warpgroup."""

    def __init__(self, values: np.ndarray, active):
        values = values.reshape(-1, WARPGROUP)
        if (values != values[:, :1]).any():
            raise Fault("threads of a warpgroup give different descriptors", active.threads[0])
        values = values[:, 0].astype(np.uint64)

        def field(first, count):
            return ((values >> np.uint64(first)) & np.uint64((1 << count) - 1)).astype(np.int64)

        self.start, self.leading, self.stride = field(0, 14) << 4, field(16, 14) << 4, field(32, 14) << 4
        modes = np.unique(field(62, 2))
        if field(49, 3).any() or len(modes) > 1:
            raise Fault("a descriptor with a base offset, or of several swizzles, is not known", active.threads[0])
        self.row = _SWIZZLED_BYTES[int(modes[0])]

    def chunks(self, count: int, transposed: bool) -> np.ndarray:
        """[warpgroups, ...] addresses of the operand's 16-byte chunks, `count` being its extent outside of k.

        K-major: [.., count, 2], a chunk going along k. MN-major: [.., count / 8, 16], a chunk going along the other
        axis. Eight rows of `row` bytes lie one after another; within them the swizzle exchanges chunks.
        """
        start, leading, stride = (each[:, None, None] for each in (self.start, self.leading, self.stride))
        if transposed:
            outer, k = np.arange(count // 8)[:, None], np.arange(16)
            if self.row == _CHUNK:
                places = start + outer * stride + k // 8 * leading + k % 8 * _CHUNK
            else:
                wide = self.row // _CHUNK
                places = start + outer // wide * leading + k // 8 * stride + k % 8 * self.row + outer % wide * _CHUNK
        else:
            outer, chunk = np.arange(count)[:, None], np.arange(2)
            step = leading if self.row == _CHUNK else _CHUNK
            places = start + outer // 8 * stride + outer % 8 * self.row + chunk * step
        return places ^ (((places >> 7) & (self.row // _CHUNK - 1)) << 4)


class _SharedOperand:
    def __init__(self, machine, operand, count: int, kind: str, transposed: bool):
        self.machine, self.count, self.kind, self.transposed = machine, count, kind, transposed
        self.read = machine.source(operand, "b64")

    def places(self, active) -> np.ndarray:
        """[warpgroups, chunks, ..] checked places in shared memory."""
        values = np.broadcast_to(self.read(active), active.count)
        chunks = Descriptor(values, active).chunks(self.count, self.transposed)
        shared = self.machine.shared
        if int(chunks.max()) + _CHUNK > shared.size:
            raise Fault(f"wgmma reads at {int(chunks.max()):#x}, beyond {shared.size} bytes", active.threads[0])
        leaders = active.threads[::WARPGROUP]
        places = chunks + shared.base[leaders][:, None, None]
        shared.check_async(places.reshape(-1), _CHUNK, np.repeat(leaders, places[0].size))
        return places

    def values(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """[warpgroups, count, k] floats, and [warpgroups, count] of those that are poison."""
        words, poison = self.machine.shared.load_async(places.reshape(-1), _CHUNK)
        spoiled = None if poison is None else self._arrange(poison.view(self._bits())).any(axis=2)
        return to_float(np.ascontiguousarray(self._arrange(words.view(self._bits()))), self.kind)[..., 0], spoiled

    def _bits(self):
        return f"u{BITS[self.kind] // 8}"

    def _arrange(self, items: np.ndarray) -> np.ndarray:
        if self.transposed:
            return items.reshape(-1, self.count // 8, 16, 8).swapaxes(2, 3).reshape(-1, self.count, 16)
        return items.reshape(-1, self.count, 32 // items.itemsize)


_KINDS = {"f16": 16, "bf16": 16, "tf32": 8}
_SIZES = " ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16))


@instruction("wgmma.mma_async.sync.aligned", "f16 bf16 tf32 f32", _SIZES, collective=WARPGROUP // WARP)
def _mma_async(found, machine):
    result, kind, other = found.types
    columns, depth = (int(each) for each in re.fullmatch(r"m64n(\d+)k(\d+)", found.modifiers[3]).groups())
    if result != "f32" or other != kind or _KINDS.get(kind) != depth:
        raise Fault(f"wgmma of {found.types} and {found.modifiers[3]} is not known")
    target, a, b, scale, *flags = found.operands
    flags = [each.value for each in flags]
    from_registers = isinstance(a, Vector)
    if flags[:2] != [1, 1]:
        raise Fault("wgmma with a scale of -1 is not known")
    transposed = [bool(each) for each in flags[2:]]
    names = [each.name for each in elements(target)]
    inputs = [each.name for each in elements(a)] if from_registers else []
    if len(names) != columns // 2 or (inputs and len(inputs) != 4):
        raise Fault("wgmma has another number of registers")
    keep = machine.source(scale, "pred")
    arrays = [machine.register(name).view(np.float32) for name in names]
    machine.sources(target, "f32"), machine.destinations(target, "f32")
    read_a = machine.sources(a, "b32") if from_registers else None
    shared_a = None if from_registers else _SharedOperand(machine, a, 64, kind, bool(transposed and transposed.pop(0)))
    shared_b = _SharedOperand(machine, b, columns, kind, bool(transposed and transposed.pop(0)))
    lanes = np.arange(WARPGROUP)
    number = np.arange(len(names))[:, None]
    rows = lanes // WARP * 16 + lanes % WARP // 4 + 8 * (number // 2 % 2)
    of_columns = 8 * (number // 4) + lanes % 4 * 2 + number % 2

    used = machine.products.use(names + inputs)

    def run(active):
        machine.products.check_fenced(active, used)
        threads = active.threads.reshape(-1, WARPGROUP)
        add = np.broadcast_to(keep(active), active.count).reshape(-1, WARPGROUP).copy()
        if (add != add[:, :1]).any():
            raise Fault("threads of a warpgroup disagree about scale-d", active.threads[0])
        places_b = shared_b.places(active)
        places_a = None if from_registers else shared_a.places(active)
        fixed = _from_registers(read_a, active, kind) if from_registers else None

        def finish(groups):
            left, spoiled_left = (fixed[groups], None) if from_registers else shared_a.values(places_a[groups])
            right, spoiled_right = shared_b.values(places_b[groups])
            product = left.astype(np.float64) @ right.astype(np.float64).swapaxes(1, 2)
            product = product[:, rows, of_columns]  # [groups, registers, 128]
            chosen, kept = threads[groups], add[groups]
            for index, array in enumerate(arrays):
                array[chosen] = np.where(kept, array[chosen] + product[:, index], product[:, index])
            if spoiled_left is not None or spoiled_right is not None or machine.poison:
                _spoil(machine, names, chosen, kept, spoiled_left, spoiled_right, rows, of_columns)

        places = [each for each in (places_a, places_b) if each is not None]
        machine.products.issue(active, finish, names + inputs, places)

    return run, dict(taint="wgmma")


def _from_registers(read, active, kind):
    """[warpgroups, 64, k] of A in registers, 16 rows a warp."""
    halves = 32 // BITS[kind]
    bits = np.stack([np.broadcast_to(each(active), active.count).reshape(-1, WARP) for each in read], axis=1)
    if kind == "tf32":
        check_tf32(bits, active)
    rows, columns = fragment_a(4, halves)
    full = np.empty((len(bits), 16, 8 * halves))
    full[:, rows, columns] = np.moveaxis(to_float(bits, kind), -1, 2)
    return full.reshape(-1, 64, 8 * halves)


def _spoil(machine, names, threads, kept, left, right, rows, columns):
    active = Active(machine, threads.reshape(-1))
    for index, name in enumerate(names):
        spoiled = (machine.poison.bits(name, active) != 0).reshape(threads.shape) & kept
        if left is not None:
            spoiled = spoiled | left[:, rows[index]]
        if right is not None:
            spoiled = spoiled | right[:, columns[index]]
        machine.poison.mark(name, active, np.where(spoiled.reshape(-1), ~np.uint32(0), np.uint32(0)))


@instruction("wgmma.fence.sync.aligned", collective=WARPGROUP // WARP)
def _fence(found, machine):
    return lambda active: machine.products.fence(active)


@instruction("wgmma.commit_group.sync.aligned", collective=WARPGROUP // WARP)
def _commit(found, machine):
    return lambda active: machine.products.commit(active)


@instruction("wgmma.wait_group.sync.aligned", collective=WARPGROUP // WARP)
def _wait(found, machine):
    pending = found.operands[0].value
    return lambda active: machine.products.wait(active, pending)
