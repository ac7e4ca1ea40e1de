"""The threads that execute an instruction together."""

import numpy as np

WARP = 32


class Active:
    """Threads that execute an instruction together: `index` into the batch in ascending order, or None for all.

    `at` selects them from an array over the batch: a slice where they are neighbours, which copies nothing.
    """

    __slots__ = ("machine", "index", "at", "_warps", "_full")

    def __init__(self, machine, index: np.ndarray | None):
        self.machine, self.index, self.at = machine, index, index
        if index is None:
            self.at = slice(0, machine.size)
        elif len(index) and index[-1] - index[0] == len(index) - 1:
            self.at = slice(int(index[0]), int(index[-1]) + 1)
        self._warps = self._full = None

    @property
    def threads(self) -> np.ndarray:
        return self.machine.threads if self.index is None else self.index

    @property
    def count(self) -> int:
        return self.machine.size if self.index is None else len(self.index)

    @property
    def warps(self) -> np.ndarray:
        """The warps that these threads belong to: block * warps a block + warp."""
        if self._warps is None:
            if self.index is None:
                self._warps = np.arange(self.machine.size // WARP)
            else:
                numbers = self.index // WARP
                first = np.ones(len(numbers), bool)
                np.not_equal(numbers[1:], numbers[:-1], out=first[1:])
                self._warps = numbers[first]
        return self._warps

    @property
    def full(self) -> bool:
        """Every thread of every warp is here."""
        if self._full is None:
            self._full = self.count == WARP * len(self.warps)
        return self._full

    def only(self, mask: np.ndarray) -> "Active":
        return Active(self.machine, np.flatnonzero(mask) if self.index is None else self.index[mask])

    def of(self, values: np.ndarray) -> np.ndarray:
        """These threads' part of an array over the batch."""
        return values[self.at]

    def by_warp(self, values: np.ndarray) -> np.ndarray:
        """[warps, 32] of an array over the batch; all warps are full."""
        return self.of(values).reshape(-1, WARP)
