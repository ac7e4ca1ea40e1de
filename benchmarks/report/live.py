"""What a run shows as it goes: the rows of every case as it ends, how far the run is, and how long it still takes."""

import shutil
import time
from collections.abc import Sequence

import pytest

from benchmarks.report import summary, table

_BAR = 20


class Live:
    """On a terminal the last line says what is being measured; it makes way for the rows when they come.

    items are the cases that will be measured. A module's COST says as how many cases one of its own counts.
    """

    def __init__(self, reporter: pytest.TerminalReporter, items: Sequence[pytest.Item]):
        self._reporter = reporter
        self._costs = {item.nodeid: getattr(item.module, "COST", 1) for item in items}
        self._total = sum(self._costs.values())
        self._count = len(self._costs)
        self._start = time.monotonic()
        self._group = None

    def begins(self, item: pytest.Item) -> None:
        if not self._reporter.isatty or item.nodeid not in self._costs:
            return
        done = self._count - len(self._costs)
        filled = round(_BAR * self._share())
        bar = "#" * filled + "-" * (_BAR - filled)
        words = f"[{bar}] {done + 1}/{self._count}{self._left()}: {item.path.parent.name} {item.name}"
        self._reporter.rewrite(words[: _columns()], erase=True)
        self._reporter.flush()

    def ends(self, item: pytest.Item, rows: list[dict], fault: str | None) -> None:
        if self._costs.pop(item.nodeid, None) is None:
            return  # no case of these
        place = f"{self._count - len(self._costs):>{len(str(self._count))}}/{self._count} "
        if rows and rows[0]["group"] != self._group:
            self._group = rows[0]["group"]
            self._reporter.write_line(f"\n{table.head(self._group)}", bold=True)
        name = table.case_name(rows[0]["case"]) if rows else item.name
        self._reporter.write_line(self._with_time_left(f"{place}{name}"))
        for row in rows:
            for line in (table.line(row), *table.other_lines(row)):
                self._reporter.write_line(line, **_colour(row))
        if fault and not rows:
            self._reporter.write_line(f"  {fault.splitlines()[0]}"[: _columns()], yellow=True)
        self._reporter.flush()

    def makes_way(self) -> None:
        if self._reporter.isatty:
            self._reporter.rewrite("", erase=True)
            self._reporter.rewrite("")

    def progress(self) -> str:
        return f"{self._count - len(self._costs)} of {self._count} cases in {_minutes(time.monotonic() - self._start)}"

    def _share(self) -> float:
        return 1 - sum(self._costs.values()) / self._total

    def _left(self) -> str:
        share = self._share()
        gone = time.monotonic() - self._start
        return f", about {_minutes(gone * (1 - share) / share)} left" if 0 < share < 1 else ""

    def _with_time_left(self, line: str) -> str:
        words = self._left().lstrip(", ")
        fits = words and len(line) + len(words) < table.COLUMNS
        return f"{line}{words:>{table.COLUMNS - len(line)}}" if fits else line


def _colour(row: dict) -> dict[str, bool]:
    """A fault is red, this package's rows are green, or yellow where they lose."""
    if row["fault"]:
        return {"red": True}
    if not row["backend"]:
        return {}
    return {"yellow": True} if summary.loses(row) else {"green": True}


def _columns() -> int:
    """What a line may have, so that no terminal wraps it."""
    return min(shutil.get_terminal_size().columns - 1, table.COLUMNS)


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02}"
