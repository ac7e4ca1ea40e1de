"""Options, the fixture that measures, and the table after the run."""

from pathlib import Path

import pytest

from benchmarks import harness, record, table

EFFORTS = {
    "smoke": harness.Effort(seconds=0.05, fewest=3, most=5),
    "quick": harness.Effort(seconds=2, fewest=7, most=41),
    "full": harness.Effort(seconds=8, fewest=15, most=101),
}
_ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("tokenfusion")
    group.addoption("--profile", choices=EFFORTS, default="quick", help="which cases to measure (default: quick)")
    group.addoption("--record", type=Path, metavar="FILE", help="where the record goes (default: benchmarks/results/)")


def pytest_configure(config):
    config.option.benchmark_quiet = True
    config.option.showcapture = "no"  # torch.compile's trace would fill screens
    config.stash[_ROWS] = []


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.module.CASES[metafunc.config.option.profile], ids=str)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=harness.CLOCK, disable_gc=True))


@pytest.fixture
def run(benchmark, request):
    """Measures a problem and adds its rows to the record; fails where a variant has a fault."""

    def run(problem):
        benchmark.group = problem.group
        rows = harness.run(problem, benchmark, EFFORTS[request.config.option.profile])
        request.config.stash[_ROWS].extend(rows)
        faults = [f"{row['variant']}: {row['fault']}" for row in rows if row["fault"]]
        if faults:
            pytest.fail("; ".join(faults), pytrace=False)

    return run


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_ROWS]
    if not rows:
        return
    conditions = record.conditions(config.option.profile)
    path = record.save(config.option.record, conditions, rows)
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(record.summary(conditions))
    terminalreporter.write_line(table.text(rows))
    terminalreporter.write_line(f"\nrecord: {path}")
