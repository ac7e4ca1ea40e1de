"""Memory that addresses lead to: the process's own as global memory, and windows of bytes for each block or thread."""

import ctypes
from bisect import bisect_right

import numpy as np
import torch

from .errors import Fault

_PAGE = 4096


class Memory:
    """Global memory is the memory of this process; kernels may touch the storages of tensors that are allowed."""

    def __init__(self):
        self._storages: dict[int, tuple[int, bool, torch.UntypedStorage]] = {}
        self._starts, self._ends, self._writable = [], [], []
        self._origin = 0
        self._bytes = np.zeros(0, np.uint8)

    def allow(self, tensor: torch.Tensor, writable: bool = True) -> int:
        """Registers the tensor's storage, and keeps it alive; returns the tensor's address."""
        whole = tensor.untyped_storage()
        if whole.nbytes():
            previous = self._storages.get(whole.data_ptr(), (0, False, None))
            self._storages[whole.data_ptr()] = whole.nbytes(), writable or previous[1], whole
            self._map()
        return tensor.data_ptr()

    def _map(self) -> None:
        found = sorted((start, start + size, writable) for start, (size, writable, _) in self._storages.items())
        self._starts, self._ends, self._writable = (list(each) for each in zip(*found))
        self._origin = self._starts[0] // _PAGE * _PAGE
        size = -(-max(self._ends) // _PAGE) * _PAGE - self._origin
        self._bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(self._origin), np.uint8)
        self._start_array, self._end_array = np.array(self._starts), np.array(self._ends)
        self._writable_array = np.array(self._writable)

    @property
    def storages(self) -> list[tuple[int, int]]:
        """(first address, bytes) of each, in ascending order."""
        return [(start, end - start) for start, end in zip(self._starts, self._ends)]

    def check(self, addresses: np.ndarray, width: int, threads: np.ndarray, writes=False, aligned=False) -> None:
        """Each access of so many bytes lies inside one storage and is aligned to its width (or known to be aligned)."""
        if not aligned:
            check_alignment(addresses, width, threads)
        low, high = int(addresses.min()), int(addresses.max())
        first = bisect_right(self._starts, low) - 1
        if first < 0 or high + width > self._ends[first] or (writes and not self._writable[first]):
            self._check_each(addresses, width, threads, writes)

    def check_parts(self, addresses: np.ndarray, width: int, sizes: np.ndarray, threads: np.ndarray) -> None:
        """As `check`, where only the first `sizes` bytes of each `width` are accessed."""
        check_alignment(addresses, width, threads)
        for size in np.unique(sizes):
            some = sizes == size
            self.check(addresses[some], int(size), threads[some], aligned=True)

    def _check_each(self, addresses, width, threads, writes):
        if not self._starts:
            raise Fault("no memory is allowed", threads[0])
        found = np.searchsorted(self._start_array, addresses, side="right") - 1
        bad = (found < 0) | (addresses + width > self._end_array[found])
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise Fault(f"{int(bad.sum())} of {len(bad)} threads access global memory outside of every tensor: "
                        f"{width} bytes at {int(addresses[first]):#x}, {self._nearest(int(addresses[first]))}",
                        threads[first])  # fmt: skip
        if writes:
            locked = ~self._writable_array[found]
            if locked.any():
                raise Fault("a store to a tensor that is only read", threads[np.flatnonzero(locked)[0]])

    def _nearest(self, address: int) -> str:
        number = max(0, bisect_right(self._starts, address) - 1)
        start, size = self._starts[number], self._ends[number] - self._starts[number]
        return f"offset {address - start} of a storage of {size} bytes"

    def load(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """[accesses, width] bytes, or as words; the accesses were checked."""
        return gather(self._bytes, addresses - self._origin, width)

    def load_bytes(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """[accesses, size] bytes, of any number and alignment."""
        return self._bytes[(addresses - self._origin)[:, None] + np.arange(size)]

    def store(self, addresses: np.ndarray, words: np.ndarray) -> None:
        """Words as `load` gives them; of several stores to one place, the last thread's stays."""
        scatter(self._bytes, addresses - self._origin, words)


def check_alignment(addresses: np.ndarray, width: int, threads: np.ndarray) -> None:
    if width > 1:
        low = addresses & (width - 1)
        if low.any():
            first = int(np.flatnonzero(low)[0])
            raise Fault(f"{width} bytes at {int(addresses[first]):#x} are misaligned", threads[first])


_WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def gather(data: np.ndarray, places: np.ndarray, width: int) -> np.ndarray:
    """Aligned accesses as [accesses, words], words being as wide as possible."""
    if width <= 8:
        return data.view(_WORD[width]).take(places >> (width.bit_length() - 1)).reshape(-1, 1)
    return data.view(np.uint64).reshape(-1, width // 8).take(places >> (width.bit_length() - 1), axis=0)


def scatter(data: np.ndarray, places: np.ndarray, words: np.ndarray) -> None:
    """The inverse of `gather`; words [accesses, n] of any type."""
    width = words.shape[1] * words.dtype.itemsize
    shift = width.bit_length() - 1
    if width <= 8:
        data.view(_WORD[width])[places >> shift] = words.view(_WORD[width])[:, 0]
    else:
        data.view(np.uint64).reshape(-1, width // 8)[places >> shift] = words.view(np.uint64)


class Window:
    """Memory of which each thread has `size` bytes of its own; bytes that it has not written are poison."""

    def __init__(self, name: str, size: int, owners: np.ndarray):
        self.name, self.size = name, size
        self.pitch = -(-size // 16) * 16
        self.data = np.zeros(len(owners) * self.pitch, np.uint8)
        self.poison = np.zeros_like(self.data)
        self.base = owners * self.pitch

    def clear(self) -> None:
        self.data[:] = 0xFF
        self.poison[:] = 0xFF

    def _places(self, active, addresses, width):
        check_alignment(addresses, width, active.threads)
        bad = (addresses < 0) | (addresses + width > self.size)
        if bad.any():
            raise Fault(f"{self.name} memory of {self.size} bytes ends before {int(addresses[bad][0]):#x}",
                        active.threads[np.flatnonzero(bad)[0]])  # fmt: skip
        return addresses + active.of(self.base)

    def load(self, active, addresses, width) -> tuple[np.ndarray, np.ndarray | None]:
        places = self._places(active, addresses, width)
        poison = gather(self.poison, places, width)
        return gather(self.data, places, width), poison if poison.any() else None

    def store(self, active, addresses, words, poison) -> None:
        places = self._places(active, addresses, words.shape[1] * words.dtype.itemsize)
        scatter(self.data, places, words)
        scatter(self.poison, places, np.zeros_like(words) if poison is None else poison)
