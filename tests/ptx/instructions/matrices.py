"""Matrix products of a warp: PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions".

Products are exact. A product's sum over k and the accumulator is taken in float64 and rounded once; hardware sums in an
order and with a width that nobody documents, so results differ in the last bits.
"""

import re

import numpy as np

from ..active import WARP
from ..errors import Fault
from ..formats import BITS, widen_bf16
from ..operands import elements
from ..registry import instruction

_GROUP, _IN_GROUP = np.arange(WARP) // 4, np.arange(WARP) % 4


def fragment_a(registers: int, halves: int):
    """[registers, halves, 32] rows and columns of A's elements in the registers of a warp's lanes.

    Registers go over 8 rows first, then over 4 * halves columns (PTX ISA, "Matrix Fragments for mma.m16n8k*").
    """
    register, half = np.arange(registers)[:, None, None], np.arange(halves)[None, :, None]
    rows = _GROUP + 8 * (register % 2) + 0 * half
    columns = _IN_GROUP * halves + half + 4 * halves * (register // 2)
    return rows, columns


def fragment_b(registers: int, halves: int):
    """[registers, halves, 32] rows (of k) and columns of B's elements."""
    register, half = np.arange(registers)[:, None, None], np.arange(halves)[None, :, None]
    return _IN_GROUP * halves + half + 4 * halves * register, _GROUP + 0 * (register + half)


def places(fragment, columns: int) -> np.ndarray:
    """Which of [registers, 32, halves] elements each of a matrix is, row by row."""
    rows, at = (np.moveaxis(each, 1, 2).reshape(-1) for each in np.broadcast_arrays(*fragment))
    return np.argsort(rows * columns + at)


def fragment_d(registers: int):
    """[registers, 32] rows and columns of the accumulators in float32: 8 columns and 16 rows for every 4 registers."""
    register = np.arange(registers)[:, None]
    return _GROUP + 8 * (register // 2 % 2), _IN_GROUP * 2 + register % 2 + 8 * (register // 4)


def gathered(read: list, active) -> np.ndarray:
    """[warps, registers, 32] bits of the registers of whole warps."""
    bits = np.empty((active.count // WARP, len(read), WARP), np.uint32)
    for number, each in enumerate(read):
        values = each(active)
        bits[:, number] = values if values.ndim == 0 else values.reshape(-1, WARP)
    return bits


def to_float(bits: np.ndarray, kind: str) -> np.ndarray:
    """[..., halves] floats of registers' bits."""
    if kind == "tf32":
        return np.ascontiguousarray(bits)[..., None].view(np.float32)
    halves = np.ascontiguousarray(bits)[..., None].view(np.uint16)
    return widen_bf16(halves) if kind == "bf16" else halves.view(np.float16)


def check_tf32(bits: np.ndarray, active) -> None:
    """The lower 13 bits of a tf32 are to be zeros: what hardware does with others is not defined."""
    wrong = (bits & np.uint32(0x1FFF)) != 0
    if wrong.any() and (wrong & ((bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000))).any():
        raise Fault("an operand is not rounded to tf32", active.threads[0])


_SHAPES = {("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "bf16"),
           ("m16n8k8", "tf32"), ("m16n8k4", "tf32")}  # fmt: skip


@instruction("mma.sync.aligned", "f16 bf16 tf32 f32", "m16n8k16 m16n8k8 m16n8k4 row col", collective=True)
def _mma(found, machine):
    shape = found.modifiers[2]
    result, kind, other, accumulator = found.types
    if (shape, kind) not in _SHAPES or other != kind or result != accumulator or found.modifiers[3:5] != ("row", "col"):
        raise Fault(f"mma {shape} of {found.types} is not known")
    depth, halves = int(shape.split("k")[1]), 32 // BITS[kind]
    read_a, read_b = (machine.sources(each, "b32") for each in found.operands[1:3])
    half_result = result == "f16"
    kept = "b32" if half_result else "f32"
    read_c, write_d = machine.sources(found.operands[3], kept), machine.destinations(found.operands[0], kept)
    at_a, at_b = fragment_a(len(read_a), halves), fragment_b(len(read_b), halves)
    at_d = fragment_d(4)
    if depth * 16 != at_a[0].size or depth * 8 != at_b[0].size or len(write_d) != (2 if half_result else 4):
        raise Fault("mma has another number of registers")

    place_a, place_b = places(at_a, depth), places(at_b, 8)
    place_d = at_d[0] * 8 + at_d[1]

    def matrix(active, read, place, shape):
        bits = gathered(read, active)
        if kind == "tf32":
            check_tf32(bits, active)
        return to_float(bits, kind).reshape(len(bits), -1)[:, place].reshape(-1, *shape).astype(np.float64)

    def run(active):
        product = matrix(active, read_a, place_a, (16, depth)) @ matrix(active, read_b, place_b, (depth, 8))
        product = product.reshape(-1, 128)[:, place_d]  # [warps, registers, 32]
        if half_result:
            for pair, (read, write) in enumerate(zip(read_c, write_d)):
                before = to_float(np.broadcast_to(read(active), active.count), "f16").reshape(-1, WARP, 2)
                after = (before + np.moveaxis(product[:, 2 * pair : 2 * pair + 2], 1, 2)).astype(np.float16)
                write(active, after.view(np.uint32).reshape(-1))
            return
        values = [(read(active) + product[:, number].reshape(-1)) for number, read in enumerate(read_c)]
        for value, write in zip(values, write_d):
            write(active, value)

    def spoiled(poison, active, operand):
        """[warps, registers, 32]"""
        names = [getattr(each, "name", None) for each in elements(operand)]
        return np.stack([(poison.bits(name, active) != 0).reshape(-1, WARP) for name in names], axis=1)

    def taint(poison, active):
        """Of the results, those in the rows of A and columns of B in which something is poison."""
        a, b, c = (spoiled(poison, active, each) for each in found.operands[1:4])
        rows, columns = np.zeros((len(a), 16), bool), np.zeros((len(a), 8), bool)
        for half in range(halves):
            for matrix_, part, at in ((rows, a, at_a[0][:, half]), (columns, b, at_b[1][:, half])):
                warp, register, lane = np.nonzero(part)
                matrix_[warp, at[register, lane]] = True
        results = rows[:, at_d[0]] | columns[:, at_d[1]]
        if half_result:
            results = results.reshape(-1, 2, 2, WARP).any(axis=2)
        results |= c
        ones = np.where(results, ~np.uint32(0), np.uint32(0))
        return [(each.name, ones[:, number].reshape(-1)) for number, each in enumerate(elements(found.operands[0]))]

    return run, dict(taint=taint)


def _count(found):
    return next(int(each[1:]) for each in found.modifiers if re.fullmatch(r"x[124]", each))


_MATRIX = "m8n8 x1 x2 x4 trans shared shared::cta"


@instruction("ldmatrix.sync.aligned", "b16", _MATRIX, collective=True)
def _ldmatrix(found, machine):
    """Lane 8 i + j gives the address of row j of matrix i; lane l gets elements 2 (l % 4) and the next of row l / 4."""
    count, transposed = _count(found), found.has("trans")
    names = [each.name for each in elements(found.operands[0])]
    read, write = machine.address(found.operands[1]), machine.destinations(found.operands[0], "b32")
    if len(write) != count:
        raise Fault("ldmatrix has another number of registers")

    def arrange(words):
        """[warps, matrices, 8, 8] elements to [warps, matrices, 32] registers."""
        matrices = words.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        return matrices.reshape(-1, count, WARP, 2).view(np.uint32)[..., 0]

    def run(active):
        using = active.threads.reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        addresses = read(active).reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        chosen = type(active)(machine, using)
        words, poison = machine.load(found, "shared", chosen, addresses, 16, together=True)
        for number, each in enumerate(write):
            each(active, arrange(words)[:, number].reshape(-1))
        if poison is not None:
            spoiled = arrange(poison)
            for number, name in enumerate(names):
                machine.poison.mark(name, active, spoiled[:, number].reshape(-1))

    return run, dict(taint="load")


@instruction("stmatrix.sync.aligned", "b16", _MATRIX, collective=True)
def _stmatrix(found, machine):
    count, transposed = _count(found), found.has("trans")
    names = [getattr(each, "name", None) for each in elements(found.operands[1])]
    write, read = machine.address(found.operands[0]), machine.sources(found.operands[1], "b32")
    if len(read) != count:
        raise Fault("stmatrix has another number of registers")

    def arrange(registers):
        """[threads, matrices] registers to [rows, 8] elements."""
        lanes = np.ascontiguousarray(registers.reshape(-1, WARP, count).swapaxes(1, 2))
        matrices = lanes.view(np.uint16).reshape(-1, count, 8, 8)
        return np.ascontiguousarray(matrices.swapaxes(2, 3) if transposed else matrices).reshape(-1, 8)

    def run(active):
        using = active.threads.reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        addresses = write(active).reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        registers = np.stack([np.broadcast_to(each(active), active.count) for each in read], axis=1)
        poison = machine.poison.of_vector(names, active, np.uint32) if machine.poison else None
        spoiled = None if poison is None else arrange(poison)
        machine.store(found, "shared", type(active)(machine, using), addresses, arrange(registers), spoiled)

    return run, dict(taint="store")


@instruction("movmatrix.sync.aligned", "b16", "m8n8 trans", collective=True)
def _movmatrix(found, machine):
    """The transpose of an 8 x 8 matrix."""
    read, write = machine.source(found.operands[1], "b32"), machine.destination(found.operands[0], "b32")

    def run(active):
        bits = np.array(np.broadcast_to(read(active), active.count))
        matrices = bits[:, None].view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)
        write(active, np.ascontiguousarray(matrices).reshape(-1, 2).view(np.uint32)[:, 0])

    return run
