"""What the memory of a GPU makes of the addresses of a warp's access: sectors, lines, wavefronts. Pure arithmetic.

Arrays have an element for each thread that takes part; `threads` numbers them over several warps and blocks.
"""

import numpy as np

SECTOR, LINE = 32, 128  # bytes: what L2 moves, and what L1 looks up at once
BANKS, BANK = 32, 4
_KEY = 1 << 43  # above every address / SECTOR


def warps_of(threads: np.ndarray) -> np.ndarray:
    return threads // 32


def sectors(addresses: np.ndarray, threads: np.ndarray) -> np.ndarray:
    """Keys of the sectors that each warp touches, in ascending order. No aligned access lies in two."""
    return _unique(warps_of(threads).astype(np.int64) * _KEY + addresses.astype(np.int64) // SECTOR)


def count_warps(threads: np.ndarray) -> int:
    return len(_unique(warps_of(threads)))


def warps_in(keys: np.ndarray) -> int:
    """How many warps have keys among these, which ascend."""
    return _different(keys // _KEY)


def lines_of(sectors: np.ndarray) -> int:
    return _different(sectors // (LINE // SECTOR))


def of_blocks(sectors: np.ndarray, warps_a_block: int) -> np.ndarray:
    """Keys of sectors by block instead of warp, to be put together with those of other accesses."""
    return sectors // _KEY // warps_a_block * _KEY + sectors % _KEY


def places_of(sectors: np.ndarray, apart: int) -> np.ndarray:
    """How many sectors lie in each part of the memory, which are `apart` bytes each."""
    return np.bincount(sectors % _KEY // (apart // SECTOR))


def useful(addresses: np.ndarray, width: int, threads: np.ndarray) -> np.ndarray:
    """Keys of the pieces of `width` bytes that each warp asks for, in ascending order; lanes may share one."""
    return _unique(warps_of(threads).astype(np.int64) * _KEY * SECTOR + addresses.astype(np.int64) // width)


def partial(useful: np.ndarray, width: int) -> int:
    """Sectors of which a warp's access covers a part."""
    starts = _starts(useful // (SECTOR // width))
    return int(np.count_nonzero(np.diff(starts, append=len(useful)) < SECTOR // width))


def _different(ascending: np.ndarray) -> int:
    return len(_starts(ascending))


def _starts(ascending: np.ndarray) -> np.ndarray:
    """Where each different value begins."""
    return np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))


def _unique(keys: np.ndarray) -> np.ndarray:
    """As np.unique, which is slow on few."""
    ascending = np.sort(keys)
    return ascending[_starts(ascending)]


def wavefronts(addresses: np.ndarray, width: int, threads: np.ndarray) -> int:
    """Clocks that shared memory is busy: of 32 lanes, of 16 for 8 bytes and of 8 for 16 bytes at a time.

    In each such phase, the most different words that lie in one bank; lanes that want the same word share it.
    """
    lanes, words = min(32, 32 * BANK // width), max(1, width // BANK)
    phases = np.repeat(threads.astype(np.int64) // lanes, words)
    wanted = (addresses.astype(np.int64)[:, None] // BANK + np.arange(words)).reshape(-1)
    different = _unique((phases * BANKS + wanted % BANKS) * _KEY + wanted) // _KEY
    starts = _starts(different)
    of_bank = np.diff(starts, append=len(different))
    return int(np.maximum.reduceat(of_bank, _starts(different[starts] // BANKS)).sum())


def fewest_wavefronts(width: int, threads: np.ndarray) -> int:
    """The same without conflicts: one for each phase."""
    return len(_unique(threads // min(32, 32 * BANK // width)))
