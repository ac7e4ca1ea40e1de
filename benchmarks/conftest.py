"""Options, the fixture that measures, what a run shows as it goes, and what it comes to."""

import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check.journaled import ROWS
from benchmarks.gpu_check.program import gpu_kernels
from benchmarks.measure import allocator, entries, environment, harness, problem, timing
from benchmarks.report import record, summary, table
from benchmarks.report.live import Live
from tokenfusion import precision

EFFORTS = {
    "smoke": harness.Effort(seconds=0.05, fewest=3, most=5),
    "quick": harness.Effort(seconds=1.5, fewest=5, most=41),
    "full": harness.Effort(seconds=8, fewest=15, most=101),
    "headline": harness.Effort(seconds=1, fewest=15, most=51),
    "gpu": harness.Effort(seconds=1, fewest=15, most=51),
    "gpu-full": harness.Effort(seconds=1, fewest=15, most=51),
}
_LONG = ("headline", "gpu", "gpu-full")  # profiles of a machine that is there for minutes
_CHOSEN = ("headline", "gpu")  # profiles that have the cases of modules that name some, and no others
_ONCE = harness.Effort(seconds=0, fewest=1, most=1)  # --benchmark-disable
_ROWS = pytest.StashKey[list]()
_FAULT = pytest.StashKey[str]()
_LIVE = pytest.StashKey[Live]()
_COLUMNS = ["median", "iqr", "rounds"]  # of pytest-benchmark's table, unless --benchmark-columns says others


def pytest_addoption(parser):
    group = parser.getgroup("tokenfusion")
    group.addoption("--profile", choices=EFFORTS, default="quick", help="which cases to measure (default: quick)")
    group.addoption("--record", type=Path, metavar="FILE", help="where the record goes (default: benchmarks/results/)")
    group.addoption("--autotuned", action="store_true", help="beside torch.compile that tunes, too: minutes a case")
    group.addoption("--warm-allocator", action="store_true", help="time all once more with freed memory kept")
    kernels = [",".join(kernel) for kernel in gpu_kernels()]
    group.addoption("--without", choices=kernels, action="append", default=[], help="leave a GPU kernel out")


def pytest_configure(config):
    precision.use_ieee()  # for eager, whose error is the measure, and beside kernels that use no TF32
    config.option.benchmark_columns = config.option.benchmark_columns or _COLUMNS
    config.option.showcapture = "no"  # torch.compile's trace would fill screens
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script_method:DeprecationWarning")  # its compiler's
    config.stash[_ROWS] = []
    if config.option.profile == "smoke":
        timing.most_bytes = 4 << 20
    if config.option.warm_allocator:
        _try_warm_allocator()
    problem.without.update(tuple(kernel.split(",")) for kernel in config.option.without)


def _try_warm_allocator():
    """So that its thresholds are, from the first case on, what they are after a time with freed memory kept."""
    if torch.cuda.is_available():
        raise pytest.UsageError("--warm-allocator: for CPUs; PyTorch keeps the memory of a GPU in any case")
    try:
        with allocator.keeping_freed_memory():
            pass
    except OSError as error:
        raise pytest.UsageError(f"--warm-allocator: {error}") from None


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases_of(metafunc.module, metafunc.config.option.profile), ids=str)


def cases_of(module, profile: str) -> list:
    return module.CASES.get(profile, [] if profile in _CHOSEN else module.CASES["full"])


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=entries.clock))
    profile = config.option.profile
    without_cases = [item for item in items if hasattr(item.module, "CASES") and not cases_of(item.module, profile)]
    items[:] = [item for item in items if item not in without_cases]
    config.hook.pytest_deselected(items=without_cases)
    items.sort(key=lambda item: "models" in item.path.parts)  # whole models last
    if config.option.profile in _LONG:
        items.sort(key=_place)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    cases = [item for item in session.items if item.get_closest_marker("benchmark")]
    if reporter is not None and cases:
        reporter.showfspath = False
        session.config.stash[_LIVE] = Live(reporter, cases)
    return (yield)


def pytest_report_teststatus(report):
    """No letter for a case: its rows are there to see."""
    if "benchmark" in report.keywords and (report.when == "call" or not report.passed):
        return report.outcome if report.when == "call" or report.skipped else "error", "", ""
    return None


def _place(item) -> int:
    """The first case of every group, then every second one: a run that ends early has something of each.

    COST of a module: as how many cases one of its own counts.
    """
    callspec = getattr(item, "callspec", None)
    return callspec.indices["case"] * getattr(item.module, "COST", 1) if callspec else 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    live = item.config.stash.get(_LIVE, None)
    item.stash[ROWS] = []
    if live is not None:
        live.begins(item)
    try:
        result = yield
    finally:
        if live is not None:
            live.makes_way()
    if live is not None:
        live.ends(item, item.stash[ROWS], item.stash.get(_FAULT, None))
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.stash[_FAULT] = str(call.excinfo.value)
    elif report.skipped:
        item.stash[_FAULT] = f"skipped: {call.excinfo.value}"
    return report


@pytest.fixture
def compiles(request) -> tuple[str, ...]:
    """What is measured under torch.compile, too: an operator stays itself, and compiling a model lasts a minute."""
    quick = () if "models" in request.path.parts else ("eager",)
    full = ("eager",) if request.path.stem == "test_op" else ("eager", "fused")
    found = {"smoke": (), "quick": quick, "headline": quick}.get(request.config.option.profile, full)
    return (*found, "autotuned") if request.config.option.autotuned else found


@pytest.fixture
def run(benchmark, request):
    """Measures a problem and adds its rows to the record; fails where a variant has a fault."""

    def run(problem):
        effort = EFFORTS[request.config.option.profile] if benchmark.enabled else _ONCE
        benchmark.skipped = True  # until there are samples: an interrupt is no misuse of the fixture
        measured = harness.run(problem, effort, kept=request.config.option.warm_allocator)
        entries.enter(benchmark, measured)
        if benchmark.enabled:
            request.config.stash[_ROWS].extend(measured.rows)
        request.node.stash[ROWS] = measured.rows
        faults = [f"{row['variant']}: {row['fault']}" for row in measured.rows if row["fault"]]
        if faults:
            pytest.fail("; ".join(faults), pytrace=False)

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """After pytest-benchmark's own table, which shows every case by itself."""
    rows = config.stash[_ROWS]
    if not rows or getattr(config.option, "journal", None):
        return
    facts = environment.collect(config.option.profile)
    path = record.save(config.option.record or record.default_path(facts), {"conditions": facts, "rows": rows})
    terminalreporter.section(f"tokenfusion: {config.stash[_LIVE].progress()}")
    terminalreporter.write_line(f"{summary.text(rows)}\n")
    for line in record.summary(facts).splitlines():
        terminalreporter.write_line(textwrap.fill(line, table.COLUMNS))
    terminalreporter.write_line(f"record: {path}")
