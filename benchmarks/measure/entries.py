"""What pytest-benchmark gets of a case: an entry for each variant, so that its table, JSON and comparisons have all.

The variants of a case were timed in turn, which its fixture cannot do; it is shown their samples afterwards.
"""

import copy

from benchmarks.measure.harness import Measured
from benchmarks.report import table

_now = 0.0


def clock() -> float:
    """pytest-benchmark's timer: it stands still but for samples that are shown to it."""
    return _now


def _passes(seconds: float) -> None:
    global _now
    _now += seconds


def enter(benchmark, measured: Measured) -> None:
    """Groups are cases and names are variants; the rows of a record are in extra_info."""
    timed = [row for row in measured.rows if row["variant"] in measured.samples]
    case = benchmark.fullname
    for row, entry in zip(timed, [benchmark, *(copy.copy(benchmark) for _ in timed[1:])], strict=True):
        entry.group, entry.name, entry.fullname = table.short_name(row), row["variant"], f"{case} {row['variant']}"
        entry.extra_info = {"row": row}
        samples = iter(measured.samples[row["variant"]])
        entry.pedantic(lambda samples=samples: _passes(next(samples)), rounds=row["rounds"])
