"""Whether memory that a variant frees stays with the process, or goes back to the system and is faulted in anew."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_LARGEST = 2**31 - 1

_kept = False


def keep_freed_memory() -> None:
    """From now on, and for large tensors, too: all variants then work on pages that are there.

    PyTorch's operators allocate more than the fused ones do, so that new pages, a quarter of a microsecond each,
    decide ratios of large tensors.

    Raises:
        OSError: the C library has no such switch.
    """
    global _kept
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _LARGEST)):
        raise OSError("the C library's allocator, which is not glibc's, cannot be told to keep freed memory")
    _kept = True


def policy() -> str:
    return "freed memory is kept" if _kept else "freed memory as the C library has it"
