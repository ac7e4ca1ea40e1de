"""Shared memory of a batch of blocks, and what is known of each byte."""

import numpy as np

from .active import WARP
from .errors import Fault
from .formats import BITS
from .memory import check_alignment, gather, scatter
from .parse import Kernel
from .races import Races

# What is so of a byte. UNWRITTEN: nothing has given it a value. WRITING, READING: an asynchronous operation is at it.
# UNFENCED: a thread has written it, and no fence.proxy.async has made it visible to asynchronous operations.
UNWRITTEN, WRITING, READING, UNFENCED = 1, 2, 4, 8
_POISON = 0xFF  # a NaN in every floating-point format, an address nowhere
_ROOM = 1024
_CHUNK = 16


class SharedMemory:
    def __init__(self, machine, size: int, narrowest: int, uses_async_proxy: bool):
        """narrowest: bytes of the narrowest access that the kernel makes."""
        self.machine, self.size = machine, size
        self.pitch = -(-max(size, 1) // _ROOM) * _ROOM
        self.data = np.empty(machine.blocks * self.pitch, np.uint8)
        self.state = np.empty(machine.blocks * self.pitch, np.uint8)
        self.base = machine.block_of * self.pitch
        self.races = Races(machine, narrowest, self.pitch)
        self.mark = UNFENCED if uses_async_proxy else 0
        self.clear()

    def clear(self) -> None:
        self.data[:] = _POISON
        self.state[:] = UNWRITTEN
        self.races.clear()
        self._reading: dict[int, list[np.ndarray]] = {}
        self._reads_begun = 0

    def places(self, active, addresses: np.ndarray, width: int) -> np.ndarray:
        """Where checked accesses of active threads lie in `data`."""
        check_alignment(addresses, width, active.threads)
        if int(addresses.min()) < 0 or int(addresses.max()) + width > self.size:
            bad = np.flatnonzero((addresses < 0) | (addresses + width > self.size))
            raise Fault(f"{len(bad)} of {len(addresses)} threads access shared memory beyond its {self.size} bytes: "
                        f"{width} bytes at {int(addresses[bad[0]]):#x}", active.threads[bad[0]])  # fmt: skip
        return addresses + active.of(self.base)

    def range(self, thread: int, address: int, size: int) -> int:
        """Where the bytes from this address on lie, of the thread's block; all have to."""
        if address < 0 or address + size > self.size:
            raise Fault(f"{size} bytes at {address:#x} reach beyond {self.size} bytes of shared memory", thread)
        return address + int(self.base[thread])

    # Threads ---------------------------------------------------------------------------------------------------------

    def load(self, places: np.ndarray, width: int, threads: np.ndarray, together: bool = False):
        """Words, and which of their bits are poison (None: none)."""
        self.races.reads(places, width, threads, together)
        words, state = gather(self.data, places, width), gather(self.state, places, width)
        unready = state & _each_byte(UNWRITTEN | WRITING, state.dtype)
        if not unready.any():
            return words, None
        self._refuse(unready, WRITING, threads, "reads shared memory while an asynchronous copy may be writing it")
        return words, unready * unready.dtype.type(0xFF)

    def store(self, places: np.ndarray, words: np.ndarray, threads: np.ndarray, poison: np.ndarray | None) -> None:
        width = words.shape[1] * words.dtype.itemsize
        before, state = gather(self.data, places, width), gather(self.state, places, width)
        self._refuse(state, WRITING, threads, "writes shared memory while an asynchronous copy may be writing it")
        self._refuse(state, READING, threads, "writes shared memory while an asynchronous operation may be reading it")
        words = words.view(before.dtype)
        self.races.check_writes(places, width, threads, lambda: (before == words).all(axis=1))
        across = slice(None, None, -1 if self.machine.first_lane_stays else 1)
        scatter(self.data, places[across], words[across])
        lost = (gather(self.data, places, width) != words).any(axis=1)
        if lost.any():
            _refuse_several_warps(places, lost, threads)
        marks = np.full(state.shape, _each_byte(self.mark, state.dtype))
        if poison is not None:
            marks |= poison.view(state.dtype) & _each_byte(UNWRITTEN, state.dtype)
        scatter(self.state, places, marks)
        self.races.writes(places, width, threads)

    def update(self, places: np.ndarray, width: int, function) -> np.ndarray:
        """An atomic operation, which no other access meets: `function` gives words for words, and returns the old."""
        if (gather(self.state, places, width) & np.uint8(UNWRITTEN)).any():
            raise Fault("an atomic operation on shared memory that nothing has written")
        before = gather(self.data, places, width)
        scatter(self.data, places, function(before))
        return before

    # Asynchronous operations -----------------------------------------------------------------------------------------

    def copy_begins(self, places: np.ndarray, width: int, threads: np.ndarray) -> None:
        """These threads let bytes be written."""
        state = gather(self.state, places, width)
        self._refuse(state, WRITING | READING, threads, "lets shared memory be written that another operation is at")
        self.races.check_writes(places, width, threads)
        scatter(self.state, places, state | _each_byte(WRITING, state.dtype))

    def copy_ends(self, places: np.ndarray, words: np.ndarray, threads: np.ndarray | None) -> None:
        """The bytes are there: as if these threads had written them, or (None) by the asynchronous proxy."""
        scatter(self.data, places, words)
        scatter(self.state, places, np.zeros_like(words))
        if threads is not None:
            self.races.writes(places, words.shape[1] * words.dtype.itemsize, threads)

    def load_async(self, places: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """As `load`, by the asynchronous proxy; `check_async` came before."""
        state = gather(self.state, places, width)
        unready = state & _each_byte(UNWRITTEN, state.dtype)
        return gather(self.data, places, width), unready * unready.dtype.type(0xFF) if unready.any() else None

    def check_async(self, places: np.ndarray, width: int, threads: np.ndarray) -> None:
        """The asynchronous proxy may read these bytes for these threads."""
        state = gather(self.state, places, width)
        self._refuse(state, WRITING, threads, "an asynchronous operation reads what another may be writing")
        self._refuse(
            state,
            UNFENCED,
            threads,
            "an asynchronous operation reads what threads have written without fence.proxy.async",
        )
        self.races.reads_async(places, width, threads)

    def read_begins(self, places: list[np.ndarray]) -> int:
        """An asynchronous operation will read these 16-byte chunks; returns what its end is told by."""
        self._reads_begun += 1
        self._reading[self._reads_begun] = places
        self._mark_reading(places)
        return self._reads_begun

    def read_ends(self, begun: list[int]) -> None:
        for each in begun:
            del self._reading[each]
        if begun:
            self.state &= np.uint8(0xFF ^ READING)
            for places in self._reading.values():
                self._mark_reading(places)

    def _mark_reading(self, places: list[np.ndarray]) -> None:
        chunks = self.state.view(np.uint64).reshape(-1, 2)
        for each in places:
            chunks[each.reshape(-1) // _CHUNK] |= _each_byte(READING, np.dtype(np.uint64))

    def fence(self, active) -> None:
        """fence.proxy.async: what these threads have written or know of becomes visible to asynchronous operations."""
        warps, count = active.warps, self.races.warps
        state = self.state.reshape(self.machine.blocks, -1)
        for block in np.unique(warps // count):
            mine = warps[warps // count == block]
            if len(mine) == count:
                state[block] &= np.uint8(0xFF ^ UNFENCED)
                continue
            unfenced = np.flatnonzero(state[block] & np.uint8(UNFENCED))
            seen = self.races.written_before(block, unfenced, mine)
            state[block, unfenced[seen]] &= np.uint8(0xFF ^ UNFENCED)

    def _refuse(self, state: np.ndarray, bits: int, threads: np.ndarray, message: str) -> None:
        found = state & _each_byte(bits, state.dtype)
        if found.any():
            raise Fault(message, threads[np.flatnonzero(found.any(axis=1))[0]])


def _refuse_several_warps(places: np.ndarray, lost: np.ndarray, threads: np.ndarray) -> None:
    """Which of a warp's lanes stores last to a place is not defined, but one does; of several warps it is a race."""
    meet = np.flatnonzero(np.isin(places, places[lost]))
    _, place = np.unique(places[meet], return_inverse=True)
    warps = threads[meet] // WARP
    first = np.full(place.max() + 1, warps.max())
    np.minimum.at(first, place, warps)
    others = warps != first[place]
    if others.any():
        raise Fault("a race: warps store different values to one place at once", threads[meet[others][0]])


def _each_byte(value: int, dtype: np.dtype):
    return np.dtype(dtype).type(int.from_bytes(bytes([value]) * np.dtype(dtype).itemsize, "little"))


def uses_async_proxy(kernel: Kernel) -> bool:
    return any(each.opcode == "wgmma" or each.has("bulk") for each in kernel.instructions)


def narrowest_access(kernel: Kernel) -> int:
    """Bytes of the narrowest access to shared memory that the kernel makes."""
    widths = [_CHUNK]
    for each in kernel.instructions:
        if each.opcode in ("ld", "st", "atom", "red") and not each.has("global", "param", "local", "const"):
            count = next((int(name[1:]) for name in each.modifiers if name in ("v2", "v4", "v8")), 1)
            widths.append(BITS[each.types[-1]] // 8 * count)
        elif each.opcode == "cp" and len(each.operands) > 2 and not each.has("bulk"):
            widths.append(each.operands[2].value)
    return min(widths)
