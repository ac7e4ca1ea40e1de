"""A plugin of pytest (-p benchmarks.gpu_check.journaled): each test as it starts and ends goes into a journal.

Tests that ended in an earlier process are left out. After an error that leaves CUDA unusable the session ends, for the
rest to be run by a fresh process.
"""

import time
from pathlib import Path

import pytest

from benchmarks.gpu_check.program import is_unsound
from benchmarks.gpu_check.runner import SKIPS, settled
from benchmarks.report import journal

ROWS = pytest.StashKey[list]()  # what a benchmark measured
_FAULT = pytest.StashKey[str]()
_MOST_WORDS = 2000  # characters of a fault


def pytest_addoption(parser):
    group = parser.getgroup("tokenfusion")
    group.addoption("--journal", type=Path, metavar="FILE", required=True, help="keep each test as it ends")
    group.addoption("--piece", required=True, help="under this name")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    known = settled(config.option.journal, config.option.piece)
    items[:] = [item for item in items if item.nodeid not in known]
    _note(config, to_do=[item.nodeid for item in items])


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.failed:
        _note_end(collector.config, report.nodeid, str(report.longrepr), 0.0)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    start = time.monotonic()
    _note(item.config, case=item.nodeid, state="started")
    result = yield
    fault = item.stash.get(_FAULT, None)
    _note_end(item.config, item.nodeid, fault, time.monotonic() - start, item.stash.get(ROWS, []))
    if is_unsound(fault) or any("not_captured" in row for row in item.stash.get(ROWS, [])):
        item.session.shouldstop = "the rest is for a fresh process"
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and _FAULT not in item.stash:
        item.stash[_FAULT] = str(call.excinfo.value) or call.excinfo.typename
    elif report.skipped:
        item.stash[_FAULT] = f"{SKIPS}{call.excinfo.value}"
    return report


def _note(config, **entry) -> None:
    journal.note(config.option.journal, piece=config.option.piece, **entry)


def _note_end(config, name: str, fault: str | None, seconds: float, rows: list | tuple = ()) -> None:
    words = fault and fault[-_MOST_WORDS:]
    _note(config, case=name, state="ended", fault=words, rows=list(rows), seconds=round(seconds, 2))
