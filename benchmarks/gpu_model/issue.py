"""How often each instruction of the machine code is issued, from how often each line of the PTX was.

A block of machine code runs as often as what in it stems from PTX that becomes one instruction whatever the optimiser
does: products, loads, stores, barriers, shuffles, branches. Where a loop was unrolled, the copies share the count.
"""

import re
import statistics
from collections import Counter
from collections.abc import Mapping

from benchmarks.gpu_model.machine_code import Block, MachineCode

_BECOMES = {
    "mma": "[HID]MMA",
    "wgmma.mma_async": "HGMMA",
    "ld.shared": "LDS",
    "st.shared": "STS",
    "ldmatrix": "LDSM",
    "stmatrix": "STSM",
    "ld.global": "LDG",
    "st.global": "STG",
    "cp.async": "LDGSTS",
    "shfl": "SHFL",
    "bar": "BAR",
    "barrier": "BAR",
    "ex2": "MUFU",
    "bra": "BRA",
}
_PATTERNS = {opcode: re.compile(rf"(?:{becomes})\b") for opcode, becomes in _BECOMES.items()}


def issued(code: MachineCode, lines: Mapping[int, float], opcodes: Mapping[int, str]) -> Counter[str]:
    """Warp instructions by kind. lines: how many warps issued a line of the PTX; opcodes: what stands there."""
    counts: Counter[str] = Counter()
    for block, times in zip(code.blocks, executions(code, lines, opcodes), strict=True):
        for instruction in block:
            counts[instruction.kind] += times
    return counts


def executions(code: MachineCode, lines: Mapping[int, float], opcodes: Mapping[int, str]) -> list[float]:
    """How many warps run each block."""

    def becomes(line: int, opcode: str) -> bool:
        pattern = _PATTERNS.get(opcodes.get(line, ""))
        return pattern is not None and pattern.match(opcode) is not None

    copies = Counter(each.line for each in code.instructions if becomes(each.line, each.opcode))

    def times(block: Block) -> float:
        known = [lines.get(each.line, 0) / copies[each.line] for each in block if becomes(each.line, each.opcode)]
        guessed = [lines[each.line] for each in block if each.line in lines]
        return statistics.median_low(known or guessed or [0])

    return [times(block) for block in code.blocks]
