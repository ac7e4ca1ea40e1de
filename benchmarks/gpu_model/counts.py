"""What a launch issues and moves, counted while the interpreter of PTX runs some of its blocks."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.gpu_model import access
from tests.ptx.observe import Observer
from tests.ptx.parse import Instruction, Vector

_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)$")
_WARPGROUP = 4  # warps that issue a wgmma together
_APART = 1 << 38  # tensors begin at a line here, as on a GPU, whose allocator aligns to 512 bytes


@dataclass
class Traffic:
    """Of the accesses of warps through one instruction, or through several."""

    accesses: float = 0  # of warps
    sectors: float = 0  # of 32 bytes; partial ones among them are written in part
    partial: float = 0
    lines: float = 0  # of 128 bytes
    useful: float = 0  # bytes
    wavefronts: float = 0
    without_conflicts: float = 0

    def add(self, other: "Traffic", weight: float = 1) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + weight * value)


@dataclass
class Counts:
    """Sums over the warps of a launch."""

    lines: Counter = field(default_factory=Counter)  # of the PTX: warps that issued it
    opcodes: dict[int, str] = field(default_factory=dict)  # what stands there, with its state space
    # ("global" or "shared", "load", "store", "copy" from the one to the other, or what a "product" reads)
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    storages: Counter = field(default_factory=Counter)  # (storage, "load" or "store"): bytes of the sectors
    flops: Counter = field(default_factory=Counter)  # of matrix products, by instruction
    through_l1: float = 0  # sectors that blocks load by way of L1, each once a block
    past_l1: float = 0  # those that L1 has no part in, each time

    def add(self, other: "Counts", weight: float) -> None:
        self.opcodes |= other.opcodes
        for name in ("lines", "storages", "flops"):
            for key, value in getattr(other, name).items():
                getattr(self, name)[key] += weight * value
        for key, traffic in other.traffic.items():
            self.traffic[key].add(traffic, weight)
        self.through_l1 += weight * other.through_l1
        self.past_l1 += weight * other.past_l1

    def of(self, space: str, way: str | None = None) -> Traffic:
        total = Traffic()
        for (other_space, other_way), traffic in self.traffic.items():
            if space == other_space and way in (None, other_way):
                total.add(traffic)
        return total


class Counting(Observer):
    """Of the first blocks of one batch. storages: (first address, bytes) of what a kernel may access, ascending."""

    def __init__(self, storages: Sequence[tuple[int, int]], warps_a_block: int, blocks: int):
        self.counts = Counts()
        self._warps_a_block, self._warps = warps_a_block, warps_a_block * max(0, blocks)
        self._loaded: list[np.ndarray] = []
        self._starts = np.array([first for first, _ in storages], np.int64)

    def issued(self, instruction: Instruction, warps: np.ndarray) -> None:
        count = int(np.count_nonzero(warps < self._warps))
        counts, line = self.counts, instruction.line
        if line not in counts.opcodes:
            counts.opcodes[line] = name_of(instruction)
        counts.lines[line] += count
        if instruction.opcode in ("mma", "wgmma") and counts.opcodes[line] != "wgmma":
            self._product(instruction, count)

    def _product(self, instruction: Instruction, warps: int) -> None:
        m, n, k = (
            int(size) for each in instruction.modifiers if (found := _SHAPE.match(each)) for size in found.groups()
        )
        name = self.counts.opcodes[instruction.line]
        products = warps / (_WARPGROUP if name == "wgmma.mma_async" else 1)
        self.counts.flops[name] += 2 * m * n * k * products
        if name == "wgmma.mma_async":  # its operands come from shared memory without conflicts, 128 bytes a clock
            rows = n if isinstance(instruction.operands[1], Vector) else m + n
            read = 2 * k * rows * products / access.LINE
            self.counts.traffic["shared", "product"].add(Traffic(wavefronts=read, without_conflicts=read))

    def accessed(
        self, instruction: Instruction, space: str, addresses: np.ndarray, width: int, threads: np.ndarray
    ) -> None:
        counted = access.warps_of(threads) < self._warps
        if not counted.any():
            return
        addresses, threads = addresses[counted].astype(np.int64), threads[counted]
        opcode = instruction.opcode
        way = "copy" if opcode == "cp" else "store" if opcode.startswith("st") else "load"
        if space == "shared":
            found = Traffic(
                accesses=access.count_warps(threads),
                wavefronts=access.wavefronts(addresses, width, threads),
                without_conflicts=access.fewest_wavefronts(width, threads),
            )
        else:
            found = self._global(instruction, way, addresses, width, threads)
        self.counts.traffic[space, way].add(found)

    def _global(self, instruction: Instruction, way: str, addresses, width: int, threads) -> Traffic:
        places = np.searchsorted(self._starts, addresses, "right") - 1
        addresses = addresses - self._starts[places] + places * _APART
        sectors, useful = access.sectors(addresses, threads), access.useful(addresses, width, threads)
        if way == "load" or "ca" in instruction.modifiers:
            self._loaded.append(access.of_blocks(sectors, self._warps_a_block))
        else:
            self.counts.past_l1 += len(sectors)
        for place, count in enumerate(access.places_of(sectors, _APART)):
            if count:
                self.counts.storages[place, "store" if way == "store" else "load"] += access.SECTOR * int(count)
        return Traffic(
            accesses=access.warps_in(sectors),
            sectors=len(sectors),
            partial=access.partial(useful, width) if way == "store" else 0,
            lines=access.lines_of(sectors),
            useful=width * len(useful),
        )

    def finished(self) -> Counts:
        if self._loaded:
            self.counts.through_l1 = len(np.unique(np.concatenate(self._loaded)))
        return self.counts


def name_of(instruction: Instruction) -> str:
    """An opcode with what tells apart what it becomes: "ld.shared", "cp.async", "wgmma.mma_async"."""
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode in ("ld", "st", "atom", "red"):
        space = next((m.split("::")[0] for m in modifiers if m.split("::")[0] in ("shared", "global", "param")), "")
        return f"{opcode}.{space}" if space else opcode
    if opcode == "cp" and "async" in modifiers and not {"commit_group", "wait_group", "wait_all"} & {*modifiers}:
        return "cp.async"
    if opcode == "wgmma" and "mma_async" in modifiers:
        return "wgmma.mma_async"
    return opcode
