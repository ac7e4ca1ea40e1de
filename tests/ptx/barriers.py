"""bar and barrier: the threads that have come to one, in all blocks of the batch."""

import numpy as np

from .active import Active
from .errors import Fault
from .machine import Machine


class Waiting:
    """A barrier's threads, in all blocks."""

    def __init__(self, blocks: int):
        self.arrived, self.wanted = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
        self.members: list[tuple[int, Active]] = []
        self.arrivals: list[tuple[Active, bool]] = []

    def add(self, machine: Machine, active: Active, counts: np.ndarray | None, waits: bool) -> None:
        blocks = machine.block_of[active.threads]
        self.arrived += np.bincount(blocks, minlength=machine.blocks)
        self.arrivals.append((active, waits))
        given = 0 if counts is None else counts
        before = self.wanted[blocks]
        if ((before != given) & (before != 0)).any():
            raise Fault("threads disagree about how many the barrier waits for", active.threads[0])
        self.wanted[blocks] = given
        if (self.wanted[blocks] != given).any():
            raise Fault("threads disagree about how many the barrier waits for", active.threads[0])

    def reset(self, machine: Machine, ready: np.ndarray) -> None:
        self.arrived[ready] = 0
        self.wanted[ready] = 0
        left = [(each, waits, ~ready[machine.block_of[each.threads]]) for each, waits in self.arrivals]
        self.arrivals = [(each.only(mask), waits) for each, waits, mask in left if mask.any()]
