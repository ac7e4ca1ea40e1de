"""wgmma: products of four warps that are under way until they are waited for, in groups that are committed."""

import numpy as np

from .active import Active
from .errors import Fault

WARPGROUP = 128


class Product:
    """One wgmma.mma_async in some warpgroups: `finish` works it out."""

    def __init__(self, groups: np.ndarray, committed: np.ndarray, finish, registers, places):
        self.groups, self.committed, self.finish, self.registers, self.places = (
            groups,
            committed,
            finish,
            registers,
            places,
        )


class Products:
    def __init__(self, machine):
        self.machine = machine
        self.committed = np.zeros(-(-machine.size // WARPGROUP), np.int64)
        self.flying: list[Product] = []

    def groups(self, active: Active) -> np.ndarray:
        """The warpgroups of active threads, all of which are complete."""
        groups = active.threads[::WARPGROUP] // WARPGROUP
        whole = active.count == WARPGROUP * len(groups) and (np.diff(active.threads.reshape(-1, WARPGROUP)) == 1).all()
        if not whole or self.machine.threads_a_block % WARPGROUP:
            raise Fault("divergent: a warpgroup's other threads do not come to this instruction", active.threads[0])
        return groups

    def issue(self, active: Active, finish, registers, places) -> None:
        """`finish(rows)` writes the accumulators of these rows of active warpgroups; `places` is what it reads."""
        groups = self.groups(active)
        product = Product(groups, self.committed[groups].copy(), finish, registers, places)
        if not self.machine.late:
            finish(np.arange(len(groups)))
            return
        self.machine.shared.read_begins(places)
        self.flying.append(product)
        busy = self.machine.poison.busy
        for name in registers:
            busy.setdefault(name, np.zeros(self.machine.size, bool))[active.threads] = True

    def commit(self, active: Active) -> None:
        self.committed[self.groups(active)] += 1

    def wait(self, active: Active, pending: int) -> None:
        limit = np.full(len(self.committed), -1)
        groups = self.groups(active)
        limit[groups] = self.committed[groups] - pending
        left = []
        for product in self.flying:
            done = (product.committed < limit[product.groups]) & (product.committed >= 0)
            if done.any():
                product.finish(np.flatnonzero(done))
                product.committed[done] = -1
            if (product.committed >= 0).any():
                left.append(product)
        if len(left) == len(self.flying) and not any((each.committed < 0).any() for each in left):
            return
        self.flying = left
        shared, busy = self.machine.shared, self.machine.poison.busy
        shared.reads_are([places[each.committed >= 0] for each in left for places in each.places])
        busy.clear()
        for each in left:
            threads = (each.groups[each.committed >= 0][:, None] * WARPGROUP + np.arange(WARPGROUP)).reshape(-1)
            for name in each.registers:
                busy.setdefault(name, np.zeros(self.machine.size, bool))[threads] = True
