"""Whether memory that a variant frees stays with the process, or goes back to the system and is faulted in anew."""

import contextlib
import ctypes
from collections.abc import Iterator

import numpy

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of malloc.h
_LARGEST = 2**31 - 1
# glibc's own, once a process has freed large memory: its thresholds grow to these.
_USUAL = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20}
_KEPT = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _LARGEST}
_MORE_THAN_IS_KEPT = 36 << 20  # bytes, by glibc as it is


@contextlib.contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Freed memory stays, that of large tensors, too: all variants then work on pages that are there.

    PyTorch's operators allocate more than the fused ones do, so that new pages, a quarter of a microsecond each,
    decide ratios of large tensors. Afterwards the allocator does what glibc's does in a process that works with such
    tensors.

    Raises:
        OSError: it did not help, as with another allocator than glibc's.
    """
    libc = ctypes.CDLL(None)
    _set(libc, _KEPT)
    try:
        before = faults()  # until it has found places that fit
        if faults() > before / 10:
            raise OSError("the allocator, which is not glibc's, cannot be told to keep freed memory")
        yield
    finally:
        _set(libc, _USUAL)
        getattr(libc, "malloc_trim", lambda kept: 0)(0)


def _set(libc: ctypes.CDLL, options: dict[int, int]) -> None:
    for option in options.items():
        getattr(libc, "mallopt", lambda *option: 0)(*option)


def faults() -> int:
    """Pages that ten large tensors, one after another, have faulted in."""
    import resource  # which Windows has not

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        numpy.ones(_MORE_THAN_IS_KEPT, numpy.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
