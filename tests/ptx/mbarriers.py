"""mbarrier objects: arrivals, bytes that are still to come, and phases (PTX ISA, "mbarrier").

An object is opaque in shared memory; its state is kept here, by address, for all blocks of the batch.
"""

import numpy as np

from .active import WARP
from .errors import Fault


class Mbarrier:
    def __init__(self, blocks: int, warps: int):
        self.valid = np.zeros(blocks, bool)
        self.expected, self.pending, self.bytes, self.phase = (np.zeros(blocks, np.int64) for _ in range(4))
        self.coming = np.zeros((blocks, warps + 1), np.int32)  # what those who arrived in this phase know
        self.published = np.zeros_like(self.coming)  # and in the phases that are complete


class Mbarriers:
    def __init__(self, machine):
        self.machine = machine
        self.objects: dict[int, Mbarrier] = {}

    def each(self, active, addresses: np.ndarray):
        """(object, address, active threads) for every address among these threads' addresses."""
        self.machine.shared.places(active, addresses, 8)
        for address in np.unique(addresses):
            chosen = addresses == address
            part = active if chosen.all() else active.only(chosen)
            yield self.objects.get(int(address)), int(address), part, chosen

    def init(self, active, addresses: np.ndarray, counts: np.ndarray) -> None:
        races = self.machine.shared.races
        for found, address, part, chosen in self.each(active, addresses):
            if found is None:
                found = self.objects[address] = Mbarrier(self.machine.blocks, races.warps)
            blocks = self.machine.block_of[part.threads]
            if found.valid[blocks].any() or len(np.unique(blocks)) < len(blocks):
                raise Fault("an mbarrier is initialised twice", part.threads[0])
            given = counts[chosen]
            if (given < 1).any() or (given >= 1 << 20).any():
                raise Fault("an mbarrier of such a count", part.threads[0])
            found.valid[blocks] = True
            found.expected[blocks] = found.pending[blocks] = given
            found.bytes[blocks] = found.phase[blocks] = 0
            found.coming[blocks] = found.published[blocks] = 0

    def invalidate(self, active, addresses) -> None:
        for found, address, part, _ in self.each(active, addresses):
            self._valid(found, address, part)
            found.valid[self.machine.block_of[part.threads]] = False

    def _valid(self, found, address: int, part) -> np.ndarray:
        """The blocks of these threads, whose object there is initialised."""
        blocks = self.machine.block_of[part.threads]
        if found is None or not found.valid[blocks].all():
            raise Fault(f"no mbarrier is initialised at {address:#x}", part.threads[0])
        return blocks

    def arrive(self, active, addresses, counts: np.ndarray, expected_bytes=None) -> np.ndarray:
        """Returns the phase in which each thread arrives."""
        races = self.machine.shared.races
        phases = np.empty(active.count, np.int64)
        for found, address, part, chosen in self.each(active, addresses):
            blocks = self._valid(found, address, part)
            phases[chosen] = found.phase[blocks]
            if expected_bytes is not None:
                np.add.at(found.bytes, blocks, expected_bytes[chosen])
            warps = part.threads // WARP
            for warp in np.unique(warps):
                block = warp // races.warps
                np.maximum(found.coming[block], races.release(np.array([warp])), out=found.coming[block])
            np.subtract.at(found.pending, blocks, counts[chosen])
            if (found.pending < 0).any():
                raise Fault(f"more arrivals at the mbarrier at {address:#x} than it waits for", part.threads[0])
            races.advance(np.unique(warps))
            self._complete(found)
        return phases

    def expect(self, active, addresses, sizes) -> None:
        for found, address, part, chosen in self.each(active, addresses):
            np.add.at(found.bytes, self._valid(found, address, part), sizes[chosen])

    def transferred(self, block: int, address: int, size: int) -> None:
        """The asynchronous proxy has moved so many bytes."""
        found = self.objects.get(address)
        if found is None or not found.valid[block]:
            raise Fault(f"a copy completes at {address:#x}, where no mbarrier is initialised")
        found.bytes[block] -= size
        found.coming[block, -1] = max(found.coming[block, -1], self.machine.shared.races.engine[block])
        self._complete(found)

    def _complete(self, found: Mbarrier) -> None:
        done = found.valid & (found.pending == 0) & (found.bytes == 0)
        if done.any():
            found.phase[done] += 1
            found.pending[done] = found.expected[done]
            found.published[done] = np.maximum(found.published[done], found.coming[done])
            found.coming[done] = 0

    def test(self, active, addresses, phases: np.ndarray, parity: bool) -> np.ndarray:
        """Whether the phase, or the one with that parity, is complete; what was done before it is then known."""
        races = self.machine.shared.races
        result = np.empty(active.count, bool)
        for found, address, part, chosen in self.each(active, addresses):
            blocks = self._valid(found, address, part)
            now = found.phase[blocks]
            passed = (now & 1 != phases[chosen]) if parity else now > phases[chosen]
            result[chosen] = passed
            for warp in np.unique(part.threads[passed] // WARP):
                races.acquire(np.array([warp]), found.published[warp // races.warps])
        return result

    def describe(self) -> str:
        lines = []
        for address, found in self.objects.items():
            for block in np.flatnonzero(found.valid)[:1]:
                lines.append(
                    f"the mbarrier at {address:#x} of block {self.machine.block_index[block].tolist()} is in phase "
                    f"{found.phase[block]}, {found.pending[block]} arrivals and {found.bytes[block]} bytes are missing"
                )
        return "; ".join(lines)
