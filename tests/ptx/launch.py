"""Runs a kernel on a grid."""

import functools
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from . import instructions  # noqa: F401
from .active import WARP
from .errors import Fault, PtxError
from .formats import VALUES
from .machine import Machine, Operation
from .memory import Memory
from .observe import Observer
from .parse import Kernel
from .registry import bind, check
from .schedule import Order, Scheduler

_THREADS_A_BATCH = 4096
_KERNELS_KEPT = 16  # bound to their machines


def launch(
    kernel: Kernel,
    arguments: Sequence,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    *,
    memory: Memory,
    shared: int = 0,
    late: bool = True,
    order: Order | int = Order.ROUND_ROBIN,
    approximate: bool = False,
    blocks: Iterable[tuple[int, int, int]] | None = None,
    observers: Sequence[Observer] = (),
) -> None:
    """Runs `kernel` on the tensors that `memory` allows.

    arguments: an int, a float or, for a structure, its bytes for each of kernel.parameters. shared: bytes of dynamic
    shared memory. late: copies and products that are asynchronous happen when they are waited for, else at once.
    approximate: ex2.approx and its like are as wrong as they may be. blocks: which (x, y, z) of the grid, default all.
    """
    grid, block = _three(grid), _three(block)
    if kernel.reqntid and _three(kernel.reqntid) != block:
        raise PtxError(f"the kernel is for blocks of {kernel.reqntid} threads, not {block}", kernel.name)
    machine, operations = _bound(kernel)
    chosen = list(blocks) if blocks is not None else _every(grid)
    parameters = _pack(kernel, arguments)
    at_once = max(1, _THREADS_A_BATCH // (-(-block[0] * block[1] * block[2] // WARP) * WARP))
    machine.begin(block, grid, memory, shared, parameters)
    machine.late, machine.approximate, machine.observers = late, approximate, tuple(observers)
    machine.seed = order if isinstance(order, int) else order.value
    machine.first_lane_stays = order is Order.REVERSED
    try:
        with np.errstate(all="ignore"):
            for start in range(0, len(chosen), at_once):
                machine.place(np.array(chosen[start : start + at_once], np.uint32))
                _run(kernel, machine, operations, order)
    finally:
        machine.end()


def _three(size) -> tuple[int, int, int]:
    size = (size,) if isinstance(size, int) else tuple(size)
    return (*size, 1, 1)[:3]


def _every(grid):
    return [(x, y, z) for z, y, x in itertools.product(*(range(each) for each in reversed(grid)))]


def _pack(kernel: Kernel, arguments: Sequence) -> np.ndarray:
    """The bytes of the parameters."""
    if len(arguments) != len(kernel.parameters):
        raise PtxError(f"{len(arguments)} arguments for {len(kernel.parameters)} parameters", kernel.name)
    end = max((each.offset + each.bytes for each in kernel.parameters), default=0)
    packed = np.zeros(-(-end // 16) * 16 + 16, np.uint8)
    for parameter, value in zip(kernel.parameters, arguments):
        if isinstance(value, float):
            dtype = VALUES[parameter.type] if parameter.type[0] == "f" else f"f{parameter.bytes}"
            value = np.array(value, dtype).tobytes()
        elif not isinstance(value, bytes):
            value = (int(value) & ((1 << 8 * parameter.bytes) - 1)).to_bytes(parameter.bytes, "little")
        if len(value) != parameter.bytes:
            raise PtxError(f"{len(value)} bytes for {parameter.bytes} of {parameter.name}", kernel.name)
        packed[parameter.offset : parameter.offset + parameter.bytes] = np.frombuffer(value, np.uint8)
    return packed


@functools.lru_cache(maxsize=_KERNELS_KEPT)
def _bound(kernel: Kernel) -> tuple[Machine, list[Operation]]:
    """A machine for all launches of the kernel, one after another, and the kernel's instructions bound to it."""
    for unknown, reason in check(kernel):
        raise PtxError(reason, kernel.name, unknown.line, unknown.text)
    machine = Machine(kernel, _THREADS_A_BATCH)
    operations = []
    for each in kernel.instructions:
        try:
            operations.append(bind(each, machine))
        except Fault as fault:
            raise PtxError(fault.message, kernel.name, each.line, each.text) from None
    machine.products.watch(operations)
    return machine, operations


def _run(kernel: Kernel, machine: Machine, operations: list, order) -> None:
    scheduler = Scheduler(machine, operations, order)
    try:
        scheduler.run()
        machine.finish()
    except Fault as fault:
        found = scheduler.current[0].instruction
        block = thread = None
        if fault.thread is not None:
            number, thread = divmod(fault.thread, machine.threads_a_block)
            block = tuple(int(each) for each in machine.block_index[number])
        raise PtxError(fault.message, kernel.name, found.line, found.text, block, thread) from None
