"""Whether memory that a variant frees stays with the process, or goes back to the system and is faulted in anew."""

import ctypes

import numpy

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_LARGEST = 2**31 - 1
_MORE_THAN_IS_KEPT = 36 << 20  # bytes, by glibc as it is

_kept = False


def keep_freed_memory() -> None:
    """From now on, and for large tensors, too: all variants then work on pages that are there.

    PyTorch's operators allocate more than the fused ones do, so that new pages, a quarter of a microsecond each,
    decide ratios of large tensors.

    Raises:
        OSError: it did not help, as with another allocator than glibc's.
    """
    global _kept
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST)
    before = faults()  # until it has found places that fit
    if faults() > before / 10:
        raise OSError("the allocator, which is not glibc's, cannot be told to keep freed memory")
    _kept = True


def faults() -> int:
    """Pages that ten large tensors, one after another, have faulted in."""
    import resource  # which Windows has not

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        numpy.ones(_MORE_THAN_IS_KEPT, numpy.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def policy() -> str:
    return "freed memory is kept" if _kept else "freed memory as the C library has it"
