"""The steps of a GPU check. Each is processes of its own, so that whatever happens in one leaves the others."""

import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_check import cases, process
from benchmarks.gpu_check.process import FAILED, PASSED, TIMED_OUT

ROOT = Path(__file__).parent.parent.parent
SKIPPED, NOT_REACHED = "skipped", "not reached"
NO_GPU = "no CUDA device"
_ARCHS = "TORCH_CUDA_ARCH_LIST"
_NO_CUDA_SOURCES = "this version has no CUDA sources"
_TESTS = ("triton", "cuda", "gpu")  # tests/<op>/test_<one of these>*.py
_ON_A_GPU = {"TRITON_INTERPRET": "0"}
_FEWEST_REPEATS_SECONDS = 5


@dataclass
class Check:
    """A run of the check: the record that it fills, and where that is kept."""

    record: dict
    path: Path
    profile: str
    case_seconds: float
    save: Callable[[], object]

    @property
    def conditions(self) -> dict:
        return self.record["conditions"]

    @property
    def has_gpu(self) -> bool:
        return self.conditions["device"]["kind"] == "cuda"

    @property
    def why_no_gpu(self) -> str:
        return NO_GPU if self.conditions["device"]["kind"] == "cpu" else "the environment is not known"


@dataclass(frozen=True)
class Outcome:
    """status is one of "passed", "failed", "timed out", "skipped" and "not reached"; summary says it in a line."""

    status: str
    summary: str
    seconds: float = 0.0
    log: str = ""
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """run takes (check, seconds that it may take). share is its part of the time left, beside those of later steps."""

    name: str
    run: Callable[[Check, float], Outcome]
    share: float
    needs_gpu: bool = False


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no output")


def outcome(finished: process.Finished, summary: str | None = None, **facts) -> Outcome:
    if finished.status == TIMED_OUT:
        summary = f"stopped after {finished.seconds:.0f} s: {last_line(finished.log)}"
    elif finished.status == FAILED and summary is None:
        summary = f"exit status {finished.returncode}: {last_line(finished.log)}"
    return Outcome(finished.status, summary or last_line(finished.log), finished.seconds, finished.log, facts)


def environment(check: Check, seconds: float) -> Outcome:
    finished = process.run(python("-m", "benchmarks.measure.environment"), seconds)
    found = _last_json(finished.log) if finished.status == PASSED else None
    if found is None:
        return outcome(finished)
    check.record["conditions"] = found | {"profile": check.profile}
    device, missing = found["device"], found["missing_packages"]
    parts = [device["name"], f"driver {device['driver']}" if device["driver"] else NO_GPU]
    parts += [f"{name} {version}" for name, version in found["versions"].items() if version and name != "GPU"]
    parts += [f"{name}: {found['tools'][name] or 'not found'}" for name in found["tools"]]
    parts += [f"missing packages: {', '.join(missing)}"] if missing else []
    return outcome(finished, ", ".join(parts))


def build(check: Check, seconds: float) -> Outcome:
    """The extension, in place, for the GPU that is here."""
    capability = check.conditions["device"].get("capability")
    variables = {_ARCHS: os.environ.get(_ARCHS, capability)} if capability else {}
    finished = process.run(python("setup.py", "build_ext", "--inplace"), seconds, environment=variables)
    if finished.status != PASSED:
        return outcome(finished)
    info = json.loads((ROOT / "tokenfusion" / "_build_info.json").read_text())
    parts = {part: info[part]["reason"] or "built" for part in ("cpp", "cuda")}
    summary = "; ".join(f"{part}: {what}" for part, what in parts.items())
    expected = check.has_gpu and not parts["cuda"].startswith(_NO_CUDA_SOURCES)
    missing = not info["cpp"]["built"] or (expected and not info["cuda"]["built"])
    return Outcome(FAILED if missing else PASSED, summary, finished.seconds, finished.log, {"build": info})


def parity(check: Check, seconds: float) -> Outcome:
    """The tests of GPU kernels of every operator, on the GPU."""
    folders = sorted(folder.name for folder in (ROOT / "tokenfusion" / "kernels").iterdir() if folder.is_dir())
    files = [
        path for op in folders for stem in _TESTS for path in sorted((ROOT / "tests" / op).glob(f"test_{stem}*.py"))
    ]
    return pytest(["tests/test_gpu_kernels.py", *(str(path.relative_to(ROOT)) for path in files)], seconds)


def pytest(arguments: list[str], seconds: float) -> Outcome:
    """Fails, too, where every test was skipped."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        options = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={results}"]
        command = python("-m", "pytest", *options, *arguments)
        finished = process.run(command, seconds, environment=_ON_A_GPU)
        if finished.status == TIMED_OUT or not results.exists():
            return outcome(finished)
        tests = list(ElementTree.parse(results).iter("testcase"))
    failed = [test for test in tests if test.find("failure") is not None or test.find("error") is not None]
    skipped = [test for test in tests if test.find("skipped") is not None]
    passed = len(tests) - len(failed) - len(skipped)
    names = [f"{test.get('classname', '')}::{test.get('name', '')}" for test in failed]
    status = PASSED if passed and not failed and finished.status == PASSED else FAILED
    summary = f"{passed} tests passed, {len(failed)} failed, {len(skipped)} skipped"
    return Outcome(status, summary, finished.seconds, finished.log, {"failed_tests": names})


def suite(check: Check, seconds: float) -> Outcome:
    """All tests, those of the CPU as well: the whole package in this environment."""
    return pytest(["tests"], seconds)


def repeats(check: Check, seconds: float) -> Outcome:
    allowed = max(0.7 * seconds, _FEWEST_REPEATS_SECONDS)  # the rest is for start and compilation
    command = python("-m", "benchmarks.gpu_check.kernels", "repeats", "--seconds", str(allowed))
    return outcome(process.run(command, seconds, environment=_ON_A_GPU))


def sanitizer(tool: str, check: Check, seconds: float) -> Outcome:
    """Every kernel once under a checker; without the caching allocator, in whose blocks neighbours go unseen."""
    path = check.conditions.get("tools", {}).get("compute-sanitizer")
    if path is None:
        return Outcome(SKIPPED, "compute-sanitizer not found")
    command = [path, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
    variables = _ON_A_GPU | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    kernels = python("-m", "benchmarks.gpu_check.kernels", "once")
    finished = process.run([*command, *kernels], seconds, environment=variables)
    summaries = [line.strip("= ") for line in finished.log.splitlines() if "SUMMARY" in line]
    result = outcome(finished, summaries[-1] if summaries else None)
    if finished.status == PASSED and not summaries:
        return Outcome(FAILED, f"{tool} gave no summary", finished.seconds, finished.log)
    return result


def tune(check: Check, seconds: float) -> Outcome:
    """Proves every kernel at the sizes of real calls, and times it beside the others: what a default is made of."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tuning.json")
        command = python("-m", "tokenfusion", "tune", "--minutes", str(0.5 * seconds / 60))
        finished = process.run(command, seconds, environment=_ON_A_GPU | {"TOKENFUSION_TUNING": str(path)})
        found = json.loads(path.read_text()) if path.exists() else {"entries": []}
    refused = [entry for entry in found["entries"] if entry["wrong"]]
    summary = f"{len(found['entries'])} calls, {len(refused)} with a kernel that was refused"
    return outcome(finished, summary if found["entries"] else None, tuning=found)


def roofline(check: Check, seconds: float) -> Outcome:
    finished = process.run(python("-m", "benchmarks.measure.roofline"), seconds)
    rates = _last_json(finished.log) if finished.status == PASSED else None
    if rates is None:
        return outcome(finished)
    check.record["ceilings"] = rates
    return outcome(finished, ", ".join(f"{name}: {rate:.3g}" for name, rate in rates.items()))


def benchmarks(check: Check, seconds: float) -> Outcome:
    """Every case, in a process that is started anew where one hangs or crashes."""
    start = time.monotonic()
    runner = cases.Runner(check.record, cases.command(check.profile), check.case_seconds, check.save)
    finished = runner.run(start + seconds)
    states = [case["state"] for case in check.record["cases"].values()]
    counts = {state: states.count(state) for state in dict.fromkeys((cases.MEASURED, *states))}
    summary = ", ".join(f"{count} cases {state}" for state, count in counts.items())
    log = finished.log if finished else ""
    if not states:
        ended = finished is not None and finished.status != TIMED_OUT
        status, summary = FAILED if ended else TIMED_OUT, f"no case was begun: {last_line(log)}"
    elif NOT_REACHED in counts:
        status = TIMED_OUT
    else:
        status = PASSED if set(counts) <= {cases.MEASURED, SKIPPED} else FAILED
    return Outcome(status, summary, time.monotonic() - start, log)


def report(check: Check, seconds: float) -> Outcome:
    folder = check.path.with_suffix("")
    finished = process.run(
        python("-m", "benchmarks.report", str(check.path), "--out", str(folder), "--markdown"), seconds
    )
    return outcome(finished, f"{folder}/report.html" if finished.status == PASSED else None)


def _last_json(log: str) -> dict | None:
    """The last line of a log, where warnings may stand above it."""
    try:
        found = json.loads(last_line(log))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


STEPS = (
    Step("environment", environment, share=1),
    Step("build", build, share=10),
    Step("parity", parity, share=4, needs_gpu=True),
    Step("repeats", repeats, share=2, needs_gpu=True),
    Step("tune", tune, share=5, needs_gpu=True),
    Step("memcheck", functools.partial(sanitizer, "memcheck"), share=2, needs_gpu=True),
    Step("racecheck", functools.partial(sanitizer, "racecheck"), share=2, needs_gpu=True),
    Step("roofline", roofline, share=1),
    Step("benchmarks", benchmarks, share=12),
    Step("suite", suite, share=4, needs_gpu=True),
    Step("report", report, share=1),
)
