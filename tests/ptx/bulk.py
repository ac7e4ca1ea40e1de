"""Copies of the asynchronous proxy: cp.async.bulk and cp.async.bulk.tensor, under way until something waits."""

from dataclasses import dataclass

import numpy as np

from .errors import Fault

CHUNK = 16


@dataclass(eq=False)
class Load:
    """Global to shared; an mbarrier is told of `size` bytes. `fetch` gives [n, 16] bytes for `places`."""

    thread: int
    block: int
    places: np.ndarray
    fetch: object
    mbarrier: int
    size: int


@dataclass(eq=False)
class Store:
    """Shared to global, in a bulk group of the thread. `put` takes the [n, 16] bytes of `places`."""

    thread: int
    places: np.ndarray
    put: object
    group: int
    token: int


class Bulk:
    def __init__(self, machine):
        self.machine = machine
        self.loads: list[Load] = []
        self.stores: list[Store] = []
        self.arrivals: list = []  # of cp.async.mbarrier.arrive
        self.committed: dict[int, int] = {}
        self.random = np.random.default_rng(machine.seed)

    # Loads -----------------------------------------------------------------------------------------------------------

    def load(self, thread: int, places: np.ndarray, fetch, mbarrier: int, size: int) -> None:
        machine = self.machine
        machine.shared.copy_begins(places, CHUNK, np.full(len(places), thread))
        load = Load(thread, int(machine.block_of[thread]), places, fetch, mbarrier, size)
        if machine.late:
            self.loads.append(load)
        else:
            self._finish(load)

    def _finish(self, load: Load) -> None:
        machine = self.machine
        machine.shared.copy_ends(load.places, load.fetch(), None)
        machine.shared.races.engine[load.block] += 1
        machine.shared.races.writes_async(load.places, CHUNK, load.block)
        machine.mbarriers.transferred(load.block, load.mbarrier, load.size)

    def deliver(self) -> bool:
        """One copy comes to its end, if any is under way: any of them may be the first to."""
        if self.arrivals:
            self.arrivals.pop(0)()
            return True
        if self.loads:
            self._finish(self.loads.pop(int(self.random.integers(len(self.loads)))))
            return True
        return False

    # Stores ----------------------------------------------------------------------------------------------------------

    def store(self, thread: int, places: np.ndarray, put) -> None:
        machine = self.machine
        machine.shared.check_async(places, CHUNK, np.full(len(places), thread))
        token = machine.shared.read_begins([places])
        store = Store(thread, places, put, self.committed.get(thread, 0), token)
        self.stores.append(store)
        if not machine.late:
            self._write([store])

    def commit(self, active) -> None:
        for thread in active.threads.tolist():
            self.committed[thread] = self.committed.get(thread, 0) + 1

    def wait(self, active, pending: int) -> None:
        """All but these threads' last `pending` groups are done."""
        limits = {thread: self.committed.get(thread, 0) - pending for thread in active.threads.tolist()}
        done = [each for each in self.stores if each.group < limits.get(each.thread, 0)]
        if done:
            self.stores = [each for each in self.stores if each not in done]
            self._write([each for each in done if each.token])
            for each in done:
                self.machine.shared.races.read_async(each.places, CHUNK, np.full(len(each.places), each.thread))

    def _write(self, stores: list[Store]) -> None:
        shared = self.machine.shared
        for each in stores:
            words, poison = shared.load_async(each.places, CHUNK)
            each.put(words.view(np.uint8), None if poison is None else poison.view(np.uint8), each.thread)
        shared.read_ends([each.token for each in stores])
        for each in stores:
            each.token = 0

    def finish(self) -> None:
        """A block must not end while its shared memory is being read or written."""
        if self.stores:
            raise Fault("a thread ends without having waited for its bulk stores", self.stores[0].thread)
        if self.loads:
            raise Fault("a block ends without having waited for a bulk copy", self.loads[0].thread)
