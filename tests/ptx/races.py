"""Which threads know of which others' accesses to shared memory: vector clocks, one a warp.

A warp's clock advances with every barrier. Each place in shared memory remembers who wrote it last, and each warp's
last read of it, with the clock of then. An access that meets one that its warp has not been told of, by a barrier, an
mbarrier or bar.warp.sync, is a race, in whatever order the warps happen to run. Within a warp, lanes know of each other
by bar.warp.sync and by barriers alone: other collectives order no memory accesses (PTX ISA, "Memory
Consistency Model").
"""

import numpy as np

from .active import WARP
from .errors import Fault

_LANES_ALL = 63  # several lanes read
_CODES, _LANES = 11, 6  # bits of a thread of the block, or of a lane and one, below the clock


class Races:
    def __init__(self, machine, granule: int, pitch: int):
        blocks, self.warps = machine.blocks, machine.warps_a_block
        self.machine, self.granule = machine, granule
        self.engine_code = self.warps * WARP
        count = blocks * pitch // granule
        self.written = np.zeros(count, np.int32)
        self.read = np.zeros((count, self.warps), np.int32)
        self.clock = np.ones(blocks * self.warps, np.int32)
        self.known = np.zeros((blocks * self.warps, self.warps + 1), np.int32)
        self.engine = np.zeros(blocks, np.int32)  # copies of the asynchronous proxy that are done
        self.safe = 0

    def clear(self) -> None:
        for each in (self.written, self.read, self.known, self.engine):
            each[:] = 0
        self.clock[:] = 1
        self.safe = 0

    def _granules(self, places: np.ndarray, width: int) -> np.ndarray:
        first = places // self.granule
        return first[:, None] + np.arange(width // self.granule) if width > self.granule else first[:, None]

    # Accesses --------------------------------------------------------------------------------------------------------

    def reads(self, places: np.ndarray, width: int, threads: np.ndarray, together: bool = False) -> None:
        """`together`: the warps of these threads read as a whole (ldmatrix)."""
        granules = self._granules(places, width)
        self._check_written(granules, threads, -1 if together else threads % (self.warps * WARP), "reads")
        self._remember(granules, threads, together)

    def reads_async(self, places: np.ndarray, width: int, threads: np.ndarray) -> None:
        """The asynchronous proxy begins to read for these threads, whose own warps' writes a fence has to show it."""
        granules = self._granules(places, width)
        self._check_written(granules, threads, None, "lets an asynchronous operation read")

    def read_async(self, places: np.ndarray, width: int, threads: np.ndarray) -> None:
        """It has read by now."""
        self._remember(self._granules(places, width), threads, True)

    def _remember(self, granules, threads, together):
        warp = threads // WARP
        lane = _LANES_ALL if together else threads % WARP + 1
        stamps = np.broadcast_to(((self.clock[warp] << _LANES) | lane)[:, None], granules.shape)
        flat = self.read.reshape(-1)
        places = granules * self.warps + (warp % self.warps)[:, None]
        if not together:
            before = flat.take(places)
            meets = ((before ^ stamps) >> _LANES == 0) & (before != stamps)
            flat[places] = stamps
            meets |= flat.take(places) != stamps
            if not meets.any():
                return
            stamps = stamps[meets] | _LANES_ALL
            places = places[meets]
        flat[places] = stamps

    def check_writes(self, places: np.ndarray, width: int, threads: np.ndarray, same=None) -> None:
        """`same()` tells which accesses leave memory as it was: these may meet other writes."""
        granules = self._granules(places, width)
        self._check_written(granules, threads, threads % (self.warps * WARP), "overwrites", same)
        stamps = self.read.take(granules, axis=0)  # [accesses, granules, warps]
        if int(stamps.max()) >> _LANES <= self.safe:
            return
        warp = threads // WARP
        unknown = (stamps >> _LANES) > self.known[warp, None, :-1]
        rows = np.arange(len(threads))
        own = stamps[rows, :, warp % self.warps]
        unknown[rows, :, warp % self.warps] &= (own & _LANES_ALL) != (threads % WARP + 1)[:, None]
        if unknown.any():
            access, _, reader = np.argwhere(unknown)[0]
            raise Fault(
                f"a race: overwrites shared memory that warp {reader} has read, with no barrier in between",
                threads[access],
            )

    def writes(self, places: np.ndarray, width: int, threads: np.ndarray) -> None:
        granules = self._granules(places, width)
        stamps = (self.clock[threads // WARP] << _CODES) | (threads % (self.warps * WARP))
        self.written[granules] = stamps[:, None]

    def writes_async(self, places: np.ndarray, width: int, block: int) -> None:
        """The asynchronous proxy has written; who waits for it learns `engine` of the block."""
        self.written[self._granules(places, width)] = (self.engine[block] << _CODES) | self.engine_code

    def _check_written(self, granules, threads, code, what, same=None):
        stamps = self.written.take(granules)
        if int(stamps.max()) >> _CODES <= self.safe and not self.engine.any():
            return
        writer = stamps & ((1 << _CODES) - 1)
        warp = threads // WARP
        unknown = (stamps >> _CODES) > self.known[warp[:, None], writer // WARP]
        if code is None:
            unknown &= writer // WARP != (warp % self.warps)[:, None]
        else:
            unknown &= writer != (code if isinstance(code, int) else code[:, None])
        if unknown.any() and same is not None:
            unknown &= ~same()[:, None]
        if unknown.any():
            access, granule = np.argwhere(unknown)[0]
            who = int(writer[access, granule])
            by = "an asynchronous copy" if who == self.engine_code else f"thread {who}"
            raise Fault(
                f"a race: {what} shared memory that {by} has written, with no barrier in between", threads[access]
            )

    def written_before(self, block: int, places: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Which bytes of the block were written last by one of these warps or by threads that one of them knows of."""
        stamps = self.written.reshape(self.machine.blocks, -1)[block, places // self.granule]
        writer = (stamps & ((1 << _CODES) - 1)) // WARP
        seen = np.isin(writer, warps % self.warps)
        for warp in warps:
            seen |= (stamps >> _CODES) <= self.known[warp, writer]
        return seen

    # Synchronisation -------------------------------------------------------------------------------------------------

    def barrier(self, ready: np.ndarray, arrivals: list) -> None:
        """In these blocks, the warps of `arrivals` (threads, whether they wait) have met."""
        warps = np.zeros((2, len(self.clock)), bool)
        for active, waits in arrivals:
            warps[0, active.warps] = True
            if waits:
                warps[1, active.warps] = True
        warps &= np.repeat(ready, self.warps)
        if warps.all():
            self._meet_all()
        else:
            for block in np.flatnonzero(ready):
                part = slice(block * self.warps, (block + 1) * self.warps)
                self._meet(block, *(np.flatnonzero(each[part]) for each in warps))
        self.advance(np.flatnonzero(warps[0]))

    def _meet_all(self) -> None:
        clocks = self.clock.reshape(-1, self.warps)
        known = self.known.reshape(-1, self.warps, self.warps + 1)
        known[:, :, :-1] = clocks[:, None, :]
        known[:, :, -1] = known[:, :, -1].max(axis=1, keepdims=True)

    def _meet(self, block: int, arriving: np.ndarray, waiting: np.ndarray) -> None:
        if not len(arriving):
            return
        first = block * self.warps
        self.acquire(first + waiting, self.release(first + arriving))

    def release(self, warps: np.ndarray) -> np.ndarray:
        """What these warps of a block know and have done, to be acquired by others."""
        known = self.known[warps].max(axis=0)
        known[warps % self.warps] = self.clock[warps]
        return known

    def acquire(self, warps: np.ndarray, known: np.ndarray) -> None:
        self.known[warps] = np.maximum(self.known[warps], known)
        self._refresh()

    def advance(self, warps: np.ndarray) -> None:
        """What these warps do from now on is later than what they have released."""
        self.clock[warps] += 1
        self._refresh()

    def _refresh(self) -> None:
        """What every warp knows of every other is at least this."""
        self.safe = int(self.known[:, :-1].min())

    def warp_barrier(self, warps: np.ndarray) -> None:
        self.known[warps, warps % self.warps] = self.clock[warps]
        self.advance(warps)
