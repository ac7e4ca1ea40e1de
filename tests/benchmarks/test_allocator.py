"""Freed memory that stays with the process."""

import subprocess
import sys

import pytest

from benchmarks.measure import allocator

FAULTS = """
import resource, numpy
from benchmarks.measure import allocator
if {kept}:
    allocator.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):  # enough for the allocator to find places that fit
        numpy.ones(9 << 20, numpy.float32)  # 36 MiB: more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults(), allocator.policy(), sep=",")
"""


def faults(kept: bool) -> tuple[int, str]:
    found = subprocess.check_output([sys.executable, "-c", FAULTS.format(kept=kept)], text=True)
    count, policy = found.strip().split(",")
    return int(count), policy


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_variant_faults_nothing_in_once_memory_is_kept():
    fresh, as_it_is = faults(kept=False)
    kept, changed = faults(kept=True)
    assert fresh > 50 and kept < fresh / 10
    assert as_it_is != changed


def test_another_c_library_is_an_error(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    with pytest.raises(OSError, match="cannot be told"):
        allocator.keep_freed_memory()
    assert allocator.policy() == "freed memory as the C library has it"
