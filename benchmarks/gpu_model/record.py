"""Launches as the model needs them, from what hosts launch: some of the blocks run in the interpreter of PTX."""

import re
from collections.abc import Callable
from unittest import mock

import numpy as np

from benchmarks.gpu_model import issue, machine_code, sampling
from benchmarks.gpu_model.counts import Counting, Counts
from benchmarks.gpu_model.limits import Launch
from tests.ptx import shared as shared_memory
from tests.ptx.launch import launch
from tests.ptx.memory import Memory
from tests.ptx.observe import Observer
from tests.ptx.parse import Instruction, Kernel
from tests.ptx.races import Races

_WARP = 32
_THREADS_AT_ONCE = 4096  # of blocks that are told apart: the interpreter takes as many in one batch


class _Unchecked(Races):
    """Whether accesses race is for tests, which take their time over it."""

    def _nothing(self, *_, **__) -> None:
        pass

    reads = reads_async = read_async = writes = writes_async = check_writes = barrier = warp_barrier = _nothing

    def written_before(self, block: int, places: np.ndarray, warps: np.ndarray) -> np.ndarray:
        return np.ones(len(places), bool)


class Costs(Observer):
    """Instructions of each block of a batch."""

    def __init__(self, blocks: int, warps: int):
        self._warps = warps
        self.of_block = np.zeros(blocks)

    def issued(self, instruction: Instruction, warps: np.ndarray) -> None:
        self.of_block += np.bincount(warps // self._warps, minlength=len(self.of_block))


class Recorder:
    """Takes the place of tests.ptx.launch.launch. assemble: the machine code of a kernel."""

    def __init__(self, assemble: Callable[[Kernel], machine_code.MachineCode]):
        self._assemble = assemble
        self.launches: list[Launch] = []

    def __call__(self, kernel: Kernel, arguments, grid, block, *, memory: Memory, shared: int = 0, **options) -> None:
        grid = tuple(grid) + (1,) * (3 - len(grid))
        warps = -(-int(np.prod(block)) // _WARP)

        storages, at_once = memory.storages, max(1, _THREADS_AT_ONCE // (_WARP * warps))

        def measure(blocks: list[int], beside: list[int]) -> tuple[Counts, list[float]]:
            counts, costs, every = Counts(), [], [*blocks, *beside]
            for first in range(0, len(every), at_once):
                some = every[first : first + at_once]
                counting, cost = Counting(storages, warps, len(blocks) - first), Costs(len(some), warps)
                places = [_place(number, grid) for number in some]
                how = dict(memory=memory, shared=shared, late=False, blocks=places, observers=[counting, cost])
                with mock.patch.object(shared_memory, "Races", _Unchecked):
                    launch(kernel, arguments, grid, block, **how)
                assert cost.of_block.all(), "they did not run in one batch"
                counts.add(counting.finished(), 1)
                costs += cost.of_block.tolist()
            return counts, costs

        counts = Counts()
        for some, weight in sampling.strata(grid, measure):
            counts.add(some, weight)
        code = self._assemble(kernel)
        self.launches.append(_described(kernel, code, counts, int(np.prod(grid)), warps, shared, storages))


def _place(number: int, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    rest, x = divmod(number, grid[0])
    z, y = divmod(rest, grid[1])
    return x, y, z


def _short(name: str) -> str:
    """Of a mangled name what the source has."""
    mangled = re.search(r"\d([a-z][a-z_]*_kernel)I", name)
    return mangled[1] if mangled else name


def _described(kernel, code, counts: Counts, blocks: int, warps: int, shared: int, storages) -> Launch:
    moved = {"load": 0.0, "store": 0.0}
    for (place, way), count in counts.storages.items():
        moved[way] += min(count, storages[place][1])
    accesses, stores, on_chip = counts.of("global"), counts.of("global", "store"), counts.of("shared")
    return Launch(
        kernel=_short(kernel.name),
        read=moved["load"],
        written=moved["store"],
        blocks=blocks,
        warps=warps,
        registers=code.registers,
        spilled=code.spilled,
        shared=shared + code.shared,
        instructions=dict(issue.issued(code, counts.lines, counts.opcodes)),
        ptx=sum(count for line, count in counts.lines.items() if counts.opcodes[line] not in ("mov", "cvta")),
        accesses=accesses.accesses,
        sectors=accesses.sectors,
        through_l2=counts.through_l1 + counts.past_l1,
        partial=stores.partial,
        useful=accesses.useful,
        lines=accesses.lines,
        copied_lines=counts.of("global", "copy").lines,
        wavefronts=on_chip.wavefronts,
        without_conflicts=on_chip.without_conflicts,
        flops=dict(counts.flops),
    )
