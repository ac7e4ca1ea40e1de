"""What a terminal shows while benchmarks run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.report import live, table


class Terminal:
    """Stands in for pytest's reporter on a terminal; `shown` is what is to be read when each line is complete."""

    isatty = True

    def __init__(self):
        self.shown, self.last = [], ""

    def rewrite(self, line: str, **markup) -> None:
        self.last = line

    def write_line(self, line: str, **markup) -> None:
        assert self.last == "", "the status line is in the way"
        self.shown += line.splitlines()

    def flush(self) -> None:
        pass


def item(name: str, cost: int) -> SimpleNamespace:
    return SimpleNamespace(nodeid=name, name=name, module=SimpleNamespace(COST=cost), path=Path("some_op/test_op.py"))


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock.now)
    return clock


def test_the_last_line_says_how_far_it_is_and_how_long_it_takes(clock):
    terminal, first, second = Terminal(), item("first", 1), item("second" * 30, 3)
    shown = live.Live(terminal, [first, second])
    shown.begins(first)
    assert terminal.last == "[--------------------] 1/2: some_op first"
    clock.now += 30
    shown.makes_way()
    shown.ends(first, [], "skipped: no need\nmore")
    assert terminal.shown == [f"{'1/2 first':<{table.COLUMNS - 15}}about 1:30 left", "  skipped: no need"]
    shown.begins(second)
    assert terminal.last.startswith("[#####---------------] 2/2, about 1:30 left: some_op secondsecond")
    assert len(terminal.last) <= table.COLUMNS
    shown.makes_way()
    shown.ends(second, [], None)
    assert shown.progress() == "2 of 2 cases in 0:30"


def test_rows_stand_below_their_group_and_faults_are_said(clock):
    terminal, only = Terminal(), item("only", 1)
    row = {"group": "g " * 80, "case": {"B": 1}, "variant": "v" * 50, "backend": None, "peak_bytes": None}
    shown = live.Live(terminal, [only])
    shown.ends(only, [row | {"fault": "RuntimeError: out of luck " + "x" * 90}], "v: RuntimeError")
    assert max(map(len, terminal.shown)) <= table.COLUMNS
    assert terminal.shown[-2] == "1/1 B 1" and "FAILED: RuntimeError: out of luck" in terminal.shown[-1]


def test_another_time_of_a_row_stands_below_it(clock):
    terminal, only = Terminal(), item("only", 1)
    row = {"group": "g", "case": {"B": 1}, "variant": "v", "backend": None, "peak_bytes": None, "fault": None}
    row |= {"seconds": 2.0, "times_eager": 3.0, "times_compiled": None, "bytes_per_second": 1e9, "error": None}
    row |= {"share_of_ceiling": 0.5, "kept_seconds": 1.0, "kept_times_eager": 2.5, "kept_times_compiled": None}
    live.Live(terminal, [only]).ends(only, [row], None)
    first, second = terminal.shown[-2:]
    assert second.split() == ["memory", "kept", "1", "s", "2.50x", "-"]
    assert second.index("2.50x") == first.index("3.00x")
