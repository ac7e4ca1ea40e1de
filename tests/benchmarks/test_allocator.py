"""Freed memory that stays with the process, for a while."""

import sys

import pytest

from benchmarks.measure import allocator

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")


def test_nothing_is_faulted_in_while_memory_is_kept_and_all_is_afterwards(run_python):
    run_python(
        """
        from benchmarks.measure import allocator

        for _ in range(2):  # of ten tensors in 18 huge pages each, or in many more small ones
            assert min(allocator.faults() for _ in range(3)) > 100
            with allocator.keeping_freed_memory():
                assert allocator.faults() < 32
        assert min(allocator.faults() for _ in range(3)) > 100
        """
    )


def test_an_allocator_that_keeps_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(allocator, "faults", lambda: 1000)
    with pytest.raises(OSError, match="cannot be told"), allocator.keeping_freed_memory():
        pass
