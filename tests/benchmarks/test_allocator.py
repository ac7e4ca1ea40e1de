"""Freed memory that stays with the process."""

import sys

import pytest

from benchmarks.measure import allocator

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")


def test_a_variant_faults_nothing_in_once_memory_is_kept(run_python):
    run_python(
        """
        from benchmarks.measure import allocator

        as_it_is = allocator.policy()
        assert min(allocator.faults() for _ in range(3)) > 10 * 32
        allocator.keep_freed_memory()
        assert allocator.faults() < 32
        assert allocator.policy() != as_it_is
        """
    )


def test_an_allocator_that_keeps_nothing_is_an_error(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(allocator, "faults", lambda: 1000)
    with pytest.raises(OSError, match="cannot be told"):
        allocator.keep_freed_memory()
    assert allocator.policy() == "freed memory as the C library has it"
