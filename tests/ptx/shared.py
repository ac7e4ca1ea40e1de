"""Shared memory of a batch of blocks, and what is known of each byte."""

import numpy as np

from .errors import Fault
from .memory import check_alignment, gather, scatter

# States of a byte; 0: written by a thread, and visible to everything.
UNWRITTEN, WRITING, READING, UNFENCED = 1, 2, 4, 8
_POISON = 0xFF  # a NaN in every floating-point format, an address nowhere
_ROOM = 1024


class SharedMemory:
    def __init__(self, blocks: int, size: int, block_of: np.ndarray):
        self.size = size
        self.pitch = -(-max(size, 1) // _ROOM) * _ROOM
        self.data = np.full(blocks * self.pitch, _POISON, np.uint8)
        self.state = np.full(blocks * self.pitch, UNWRITTEN, np.uint8)
        self.base = block_of * self.pitch
        self.races = None

    def clear(self) -> None:
        self.data[:] = _POISON
        self.state[:] = UNWRITTEN

    def places(self, active, addresses: np.ndarray, width: int) -> np.ndarray:
        """Where checked accesses of active threads lie in `data`."""
        check_alignment(addresses, width, active.threads)
        if int(addresses.min()) < 0 or int(addresses.max()) + width > self.size:
            bad = np.flatnonzero((addresses < 0) | (addresses + width > self.size))
            raise Fault(f"{len(bad)} of {len(addresses)} threads access shared memory beyond its {self.size} bytes: "
                        f"{width} bytes at {int(addresses[bad[0]]):#x}", active.threads[bad[0]])  # fmt: skip
        return addresses + active.of(self.base)

    def load(self, places: np.ndarray, width: int, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Words, and which of their bits are poison (None: none)."""
        words = gather(self.data, places, width)
        state = gather(self.state, places, width)
        unready = state & _each_byte(UNWRITTEN | WRITING, state.dtype)
        if not unready.any():
            return words, None
        flying = unready & _each_byte(WRITING, state.dtype)
        if flying.any():
            first = int(np.flatnonzero(flying.any(axis=1))[0])
            raise Fault("reads shared memory while an asynchronous copy may be writing it", threads[first])
        return words, unready * unready.dtype.type(0xFF)

    def store(self, places: np.ndarray, words: np.ndarray, threads: np.ndarray, poison=None, mark=UNFENCED) -> None:
        width = words.shape[1] * words.dtype.itemsize
        state = gather(self.state, places, width)
        busy = state & _each_byte(WRITING | READING, state.dtype)
        if busy.any():
            first = int(np.flatnonzero(busy.any(axis=1))[0])
            flying = (
                "copy may be writing" if (busy & _each_byte(WRITING, state.dtype)).any() else "operation may be reading"
            )
            raise Fault(f"writes shared memory while an asynchronous {flying} it", threads[first])
        scatter(self.data, places, words)
        marks = np.full(state.shape, _each_byte(mark, state.dtype))
        if poison is not None:
            marks |= poison.view(state.dtype) & _each_byte(UNWRITTEN, state.dtype)
        scatter(self.state, places, marks)

    def begin(self, places: np.ndarray, width: int, threads: np.ndarray, what: int) -> None:
        """An asynchronous operation begins to write or read (WRITING, READING) these bytes."""
        state = gather(self.state, places, width)
        other = state & _each_byte(WRITING | (READING if what == WRITING else 0), state.dtype)
        if other.any():
            first = int(np.flatnonzero(other.any(axis=1))[0])
            raise Fault("two asynchronous operations meet in shared memory", threads[first])
        scatter(self.state, places, state | _each_byte(what, state.dtype))

    def end(self, places: np.ndarray, words: np.ndarray) -> None:
        """An asynchronous operation has written these bytes."""
        scatter(self.data, places, words)
        scatter(self.state, places, np.zeros_like(words))

    def load_async(self, places: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """As `load`, by the asynchronous proxy."""
        state = gather(self.state, places, width)
        if (state & _each_byte(WRITING, state.dtype)).any():
            raise Fault("an asynchronous operation reads shared memory while another may be writing it")
        unready = state & _each_byte(UNWRITTEN, state.dtype)
        return gather(self.data, places, width), unready * unready.dtype.type(0xFF) if unready.any() else None

    def read_begins(self, places: list[np.ndarray]) -> None:
        """Asynchronous operations will read these 16-byte chunks."""
        for each in places:
            chunks = self.state.view(np.uint64).reshape(-1, 2)
            chunks[each.reshape(-1) >> 4] |= _each_byte(READING, np.dtype(np.uint64))

    def reads_are(self, places: list[np.ndarray]) -> None:
        """What is still being read are these chunks."""
        self.state &= np.uint8(0xFF ^ READING)
        self.read_begins(places)


def _each_byte(value: int, dtype: np.dtype):
    return np.dtype(dtype).type(int.from_bytes(bytes([value]) * dtype.itemsize, "little"))
