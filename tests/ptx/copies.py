"""cp.async: copies that each thread waits for in groups of its own."""

import numpy as np


class _Copy:
    __slots__ = ("number", "threads", "group", "places", "addresses", "width", "size")

    def __init__(self, number, threads, group, places, addresses, width, size):
        self.number, self.threads, self.group, self.places, self.addresses = number, threads, group, places, addresses
        self.width, self.size = width, size

    def only(self, mask):
        parts = (each[mask] for each in (self.threads, self.group, self.places, self.addresses))
        return _Copy(self.number, *parts, self.width, self.size[mask])


class Copies:
    def __init__(self, machine):
        self.machine = machine
        self.committed = np.zeros(machine.size, np.int64)
        self.flying: list[_Copy] = []
        self.issued = 0

    def issue(self, active, places, addresses, width, size) -> None:
        """`size` bytes of `width` come from global memory, the rest are zeros. Bounds were checked."""
        copy = _Copy(self.issued, active.threads, active.of(self.committed).copy(), places, addresses, width, size)
        self.machine.shared.copy_begins(places, width, active.threads)
        self.issued += 1
        if self.machine.late:
            self.flying.append(copy)
        else:
            self._finish(copy)

    def commit(self, active) -> None:
        self.committed[active.threads] += 1

    def wait(self, active, pending: int) -> None:
        """All but each thread's last `pending` groups are done."""
        limit = np.full(self.machine.size, -1)
        limit[active.threads] = active.of(self.committed) - pending
        self._finish_where(lambda copy: copy.group < limit[copy.threads])

    def wait_all(self, active, before: int | None = None) -> None:
        """These threads' copies are done, or those among the first `before` that were issued."""
        here = np.zeros(self.machine.size, bool)
        here[active.threads] = True
        limit = self.issued if before is None else before
        self._finish_where(lambda copy: here[copy.threads] & (copy.number < limit))

    def _finish_where(self, test) -> None:
        left = []
        for copy in self.flying:
            done = test(copy)
            if done.all():
                self._finish(copy)
            elif done.any():
                self._finish(copy.only(done))
                left.append(copy.only(~done))
            else:
                left.append(copy)
        self.flying = left

    def _finish(self, copy: _Copy) -> None:
        machine = self.machine
        if (copy.size == copy.width).all():
            words = machine.memory.load(copy.addresses, copy.width)
        else:
            words = np.zeros((len(copy.threads), copy.width), np.uint8)
            for size in np.unique(copy.size[copy.size > 0]):
                some = copy.size == size
                rows = np.flatnonzero(some)[:, None]
                words[rows, np.arange(size)] = machine.memory.load_bytes(copy.addresses[some], int(size))
        machine.shared.copy_ends(copy.places, words, copy.threads)
