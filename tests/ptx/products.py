"""wgmma: products of four warps that are under way until they are waited for, in groups that are committed."""

import numpy as np

from .active import WARP, Active
from .errors import Fault

WARPGROUP = 128


class Product:
    """One wgmma.mma_async in some warpgroups: `finish` works it out."""

    def __init__(self, groups: np.ndarray, committed: np.ndarray, finish, registers, places):
        self.groups, self.committed, self.finish = groups, committed, finish
        self.registers, self.places, self.token = registers, places, 0


class Products:
    def __init__(self, machine):
        self.machine = machine
        self.used: dict[str, int] = {}
        self.unfenced = np.zeros((0, machine.room), bool)
        self.clear()

    def clear(self) -> None:
        self.committed = np.zeros(self.machine.room // WARPGROUP, np.int64)
        self.flying: list[Product] = []
        self.unfenced[:] = True

    def groups(self, active: Active) -> np.ndarray:
        """The warpgroups of active threads, all of which are complete."""
        groups = active.threads[::WARPGROUP] // WARPGROUP
        whole = active.count == WARPGROUP * len(groups) and (np.diff(active.threads.reshape(-1, WARPGROUP)) == 1).all()
        if not whole or self.machine.threads_a_block % WARPGROUP:
            raise Fault("divergent: a warpgroup's other threads do not come to this instruction", active.threads[0])
        return groups

    # Registers -------------------------------------------------------------------------------------------------------

    def use(self, names: list[str]) -> np.ndarray:
        """A wgmma of the kernel uses these registers; returns what stands for them."""
        return np.array([self.used.setdefault(name, len(self.used)) for name in names])

    def watch(self, operations: list) -> None:
        """Other instructions that write such registers make a wgmma.fence necessary.

        Moves do not: compilers leave them behind a fence, and ptxas gives both names one register.
        """
        self.unfenced = np.ones((len(self.used), self.machine.room), bool)
        for operation in operations:
            numbers = [self.used[name] for name in operation.writes if name in self.used]
            if numbers and operation.instruction.opcode not in ("wgmma", "mov"):
                operation.run = self._writing(operation.run, numbers)

    def _writing(self, run, numbers):
        def run_and_remember(active):
            result = run(active)
            for number in numbers:
                self.unfenced[number, active.threads] = True
            return result

        return run_and_remember

    def fence(self, active: Active) -> None:
        self.unfenced[:, active.threads] = False

    def check_fenced(self, active: Active, numbers: np.ndarray) -> None:
        self.groups(active)
        wrong = self.unfenced[numbers][:, active.threads].any(axis=0)
        if wrong.any():
            raise Fault("registers of the wgmma were written, and no wgmma.fence came after it",
                        active.threads[np.flatnonzero(wrong)[0]])  # fmt: skip

    # Groups ----------------------------------------------------------------------------------------------------------

    def issue(self, active: Active, finish, registers, places) -> None:
        """`finish(rows)` writes the accumulators of these rows of active warpgroups; `places` is what it reads."""
        groups = self.groups(active)
        product = Product(groups, self.committed[groups].copy(), finish, registers, places)
        if not self.machine.late:
            finish(np.arange(len(groups)))
            return
        product.token = self.machine.shared.read_begins(places)
        self.flying.append(product)
        busy = self.machine.poison.busy
        for name in registers:
            busy.setdefault(name, np.zeros(self.machine.size, bool))[active.threads] = True

    def _have_read(self, product: Product, done: np.ndarray) -> None:
        warps = np.arange(0, WARPGROUP, WARP)
        for places in product.places:
            for warp in warps:  # all four have, as far as a later writer is concerned
                threads = np.repeat(product.groups[done] * WARPGROUP + warp, places[0].size)
                self.machine.shared.races.read_async(places[done].reshape(-1), 16, threads)

    def commit(self, active: Active) -> None:
        self.committed[self.groups(active)] += 1

    def wait(self, active: Active, pending: int) -> None:
        limit = np.full(len(self.committed), -1)
        groups = self.groups(active)
        limit[groups] = self.committed[groups] - pending
        shared, busy = self.machine.shared, self.machine.poison.busy
        left, ended = [], []
        for product in self.flying:
            done = (product.committed < limit[product.groups]) & (product.committed >= 0)
            if done.any():
                product.finish(np.flatnonzero(done))
                self._have_read(product, done)
                product.committed[done] = -1
                ended.append(product.token)
                flying = product.committed >= 0
                product.token = shared.read_begins([each[flying] for each in product.places]) if flying.any() else 0
            if product.token:
                left.append(product)
        if not ended:
            return
        shared.read_ends(ended)
        self.flying = left
        busy.clear()
        for each in left:
            threads = (each.groups[each.committed >= 0][:, None] * WARPGROUP + np.arange(WARPGROUP)).reshape(-1)
            for name in each.registers:
                busy.setdefault(name, np.zeros(self.machine.size, bool))[threads] = True
