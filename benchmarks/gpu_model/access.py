"""What the memory of a GPU makes of the addresses of a warp's access: sectors, lines, wavefronts. Pure arithmetic.

Arrays have an element for each thread that takes part; `threads` numbers them over several warps and blocks.
"""

import numpy as np

SECTOR, LINE = 32, 128  # bytes: what L2 moves, and what L1 looks up at once
BANKS, BANK = 32, 4
_KEY = 1 << 43  # above every address / SECTOR


def warps_of(threads: np.ndarray) -> np.ndarray:
    return threads // 32


def distinct(groups: np.ndarray, values: np.ndarray) -> int:
    """How many different values there are in each group, summed over the groups."""
    return len(np.unique(groups.astype(np.int64) * _KEY + values))


def sectors(addresses: np.ndarray, width: int, threads: np.ndarray) -> int:
    return _pieces(addresses, width, threads, SECTOR)


def sectors_of_blocks(addresses: np.ndarray, threads: np.ndarray, threads_a_block: int) -> np.ndarray:
    """Keys of the different sectors in each block, to be put together with those of other accesses."""
    return np.unique((threads // threads_a_block).astype(np.int64) * _KEY + addresses.astype(np.int64) // SECTOR)


def lines(addresses: np.ndarray, width: int, threads: np.ndarray) -> int:
    return _pieces(addresses, width, threads, LINE)


def useful(addresses: np.ndarray, width: int, threads: np.ndarray) -> int:
    """Bytes asked for, those that several lanes ask for once. Lanes that overlap in part do not occur: all align."""
    return width * distinct(warps_of(threads), addresses.astype(np.int64) // width)


def partial(addresses: np.ndarray, width: int, threads: np.ndarray) -> int:
    """Sectors of which a warp's access covers a part."""
    keys = np.unique(warps_of(threads).astype(np.int64) * _KEY + addresses.astype(np.int64) // width)
    per_sector = SECTOR // width
    _, counts = np.unique(keys // _KEY * _KEY + keys % _KEY // per_sector, return_counts=True)
    return int((counts < per_sector).sum())


def _pieces(addresses: np.ndarray, width: int, threads: np.ndarray, size: int) -> int:
    """An aligned access lies in one piece, as no access is wider than one."""
    assert width <= size
    return distinct(warps_of(threads), addresses.astype(np.int64) // size)


def wavefronts(addresses: np.ndarray, width: int, threads: np.ndarray) -> int:
    """Clocks that shared memory is busy: of 32 lanes, of 16 for 8 bytes and of 8 for 16 bytes at a time.

    In each such phase, the most different words that lie in one bank; lanes that want the same word share it.
    """
    lanes = min(32, 32 * BANK // width)
    words = max(1, width // BANK)
    phases = np.repeat(threads.astype(np.int64) // lanes, words)
    first = addresses.astype(np.int64) // BANK
    wanted = (first[:, None] + np.arange(words)).reshape(-1)
    pairs = np.unique(phases * _KEY + wanted)
    banks, counts = np.unique(pairs // _KEY * BANKS + pairs % _KEY % BANKS, return_counts=True)
    starts = np.flatnonzero(np.diff(banks // BANKS, prepend=-1))
    return int(np.maximum.reduceat(counts, starts).sum())


def fewest_wavefronts(addresses: np.ndarray, width: int, threads: np.ndarray) -> int:
    """The same without conflicts: the different words of a phase, 32 a clock."""
    lanes = min(32, 32 * BANK // width)
    return len(np.unique(threads // lanes))
