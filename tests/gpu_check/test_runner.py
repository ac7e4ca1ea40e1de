"""Tests and cases by a journal: what hangs or crashes costs itself alone, and nothing that ended is run again."""

import sys
import time

import pytest

from benchmarks.gpu_check import runner
from benchmarks.gpu_check.runner import Runner
from benchmarks.report import journal
from tests.conftest import ROOT

SUITE = """
import os, time
import pytest
from benchmarks.gpu_check.journaled import ROWS

@pytest.mark.parametrize("case", ["passes", "hangs", "crashes", "has a fault", "is skipped", "comes last"])
def test_cases(case, request):
    if case == "hangs":
        time.sleep(1000)
    if case == "crashes":
        os._exit(7)
    if case == "is skipped":
        pytest.skip("no need")
    assert case != "has a fault", "CUDA error: of this case"
    request.node.stash[ROWS] = [{"variant": case}]
"""


@pytest.fixture
def make_runner(tmp_path, monkeypatch):
    """Of a small set of tests, one file of which cannot be imported."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # it starts in half the time
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "test_cases.py").write_text(SUITE)
    options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.journaled", f"--rootdir={tmp_path}"]
    command = [sys.executable, "-m", "pytest", str(tmp_path), *options, "--continue-on-collection-errors"]
    return lambda **limits: Runner(tmp_path / "journal", "tests", command, **{"case_seconds": 60} | limits)


def states(one: Runner) -> dict[str, str]:
    return {name.rpartition("[")[2].rstrip("]"): runner.state_of(entry) for name, entry in one.ended.items()}


def test_a_case_that_hangs_or_crashes_costs_itself_alone(make_runner):
    taken = []
    one = make_runner(case_seconds=3, took=taken.append)
    one.run(time.monotonic() + 150)
    assert states(one) == {
        "test_broken.py": "with a fault",
        "passes": "measured",
        "hangs": "timed out",
        "crashes": "crashed",
        "has a fault": "with a fault",
        "is skipped": "skipped",
        "comes last": "measured",
    }
    faults = {state: entry["fault"] for state, entry in zip(states(one).values(), one.ended.values())}
    assert faults["crashed"] == "exit status 7" and "no need" in faults["skipped"]
    assert [row["variant"] for entry in taken for row in entry["rows"]] == ["passes", "comes last"]
    assert one.not_reached == []

    again = make_runner()
    again.run(time.monotonic() + 60)
    assert states(again) == states(one) and again.to_do == []


def test_what_was_not_reached_comes_with_the_next_run(make_runner, tmp_path):
    for case in ("hangs", "crashes", "has a fault"):
        ended = {"state": "ended", "fault": "an earlier one", "rows": [], "seconds": 1.0}
        journal.note(tmp_path / "journal", piece="tests", case=f"test_cases.py::test_cases[{case}]", **ended)
    journal.note(tmp_path / "journal", piece="tests", case="test_cases.py::test_cases[passes]", state="started")
    journal.note(tmp_path / "journal", piece="others", case="test_cases.py::test_cases[comes last]", **ended)
    one = make_runner()
    one.run(time.monotonic() + 60)
    assert states(one)["passes"] == states(one)["comes last"] == "measured"
    assert one.ended["test_cases.py::test_cases[hangs]"]["fault"] == "an earlier one"


def program(tmp_path, *lines: str) -> Runner:
    script = tmp_path / "program.py"
    start = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path"
    script.write_text("\n".join((start, f"folder = Path({str(tmp_path)!r})", *lines)))
    return Runner(tmp_path / "journal", "p", [sys.executable, str(script)], case_seconds=60)


def test_a_program_that_is_killed_before_its_first_check_is_started_again(tmp_path):
    one = program(
        tmp_path,
        "again = folder / 'again'",
        "again.exists() or (again.touch(), os.kill(os.getpid(), 9))",
        "from benchmarks.report import journal",
        "journal.note(folder / 'journal', piece='p', to_do=['a'])",
        "journal.note(folder / 'journal', piece='p', case='a', state='ended', fault=None, rows=[], seconds=0)",
    )
    one.run(time.monotonic() + 60)
    assert list(one.ended) == ["a"] and one.not_reached == []


def test_a_program_that_cannot_begin_is_given_up(tmp_path):
    one = program(tmp_path, "(folder / 'starts').open('a').write('x')", "import no_such_module")
    one.run(time.monotonic() + 60)
    assert one.to_do is None and "no_such_module" in one.finished.log
    assert (tmp_path / "starts").read_text() == "x"


def test_a_journal_is_read_by_offset_and_half_a_line_is_none(tmp_path):
    path = tmp_path / "journal"
    reader = journal.Reader(path)
    assert reader.new() == []
    journal.note(path, case="a")
    with path.open("a") as file:
        file.write('{"case": "cut')
    assert reader.new() == [{"case": "a"}]
    assert reader.new() == []
    journal.note(path, case="b")
    assert reader.new() == [{"case": "b"}]
    assert [entry["case"] for entry in journal.read(path)] == ["a", "b"]
