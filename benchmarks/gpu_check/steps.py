"""The steps of a GPU check. Each is processes of its own, so that whatever happens in one leaves the others.

First what makes a record: build, proof, ten headline rows. Then the rest, the most telling first.
"""

import functools
import importlib.util
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_check import pieces, process, sanitizer
from benchmarks.gpu_check.outcome import NO_GPU, Check, Outcome, last_line, outcome
from benchmarks.gpu_check.process import FAILED, PASSED
from benchmarks.gpu_check.program import gpu_kernels
from benchmarks.gpu_check.runner import CRASHED, HUNG, NOT_REACHED, state_of
from benchmarks.report import journal
from benchmarks.report.table import AUTOTUNED

ROOT = Path(__file__).parent.parent.parent
_CACHES = ROOT / "build" / "gpu_check"  # a second call on the same machine finds what the first compiled
_ARCHS = "TORCH_CUDA_ARCH_LIST"
_NO_CUDA_SOURCES = "this version has no CUDA sources"
_NOT_ON_A_GPU = ("test_aot.py", "test_cuda_compiled.py")
_LONG_SUITES = "not (install or aot or ptx or benchmarks)"
_HEADLINE, _CASES, _AUTOTUNED = "headline", "cases", "autotuned"
_PROOF_SECONDS = _TUNE_SECONDS = _REPEATS_SECONDS = _HEADLINE_SECONDS = 90  # of one, compilation by Triton included
_TEST_SECONDS = 180


@dataclass(frozen=True)
class Step:
    """run takes (check, seconds that it may take): `most`, or a share of the time left, beside those of later steps.

    is_stale says of a step with a result that this machine needs it again.
    """

    name: str
    run: Callable[[Check, float], Outcome]
    most: float = math.inf
    share: float = 0
    needs_gpu: bool = False
    is_stale: Callable[[Check], bool] = lambda check: False


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def on_a_gpu() -> dict[str, str]:
    """Variables of what runs there."""
    caches = {"TRITON_CACHE_DIR": _CACHES / "triton", "TORCHINDUCTOR_CACHE_DIR": _CACHES / "inductor"}
    return {"TRITON_INTERPRET": "0"} | {name: os.environ.get(name, str(path)) for name, path in caches.items()}


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
    """The extension, in place, for the GPU that is here; what an interrupted build compiled is not compiled again."""
    if _is_built(check):
        return Outcome(PASSED, "built before")
    capability = check.conditions["device"].get("capability")
    variables = {_ARCHS: os.environ.get(_ARCHS, capability)} if capability else {}
    command = python("setup.py", "build_ext", "--inplace")
    finished = process.run(command, seconds, environment=variables, log=check.log)
    if finished.status != PASSED:
        return outcome(finished)
    info = _build_info()
    parts = {part: info[part]["reason"] or "built" for part in ("cpp", "cuda")}
    summary = "; ".join(f"{part}: {what}" for part, what in parts.items())
    expected = check.has_gpu and not parts["cuda"].startswith(_NO_CUDA_SOURCES)
    missing = not info["cpp"]["built"] or (expected and not info["cuda"]["built"])
    return Outcome(FAILED if missing else PASSED, summary, finished.seconds, finished.log, {"build": info})


def _is_built(check: Check) -> bool:
    """From these sources, for the torch and the GPU that are here."""
    info, device = _build_info(), check.conditions["device"]
    if not info or not info["cpp"]["built"] or not list((ROOT / "tokenfusion").glob("_C*.so")):
        return False
    here = (_digest_of_sources(), check.conditions["versions"].get("torch"), platform.python_version())
    if (info["sources"], info["torch"], info["python"]) != here:
        return False
    return not check.has_gpu or (info["cuda"]["built"] and device["capability"] in info["cuda"]["archs"])


def _build_info() -> dict:
    path = ROOT / "tokenfusion" / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _digest_of_sources() -> str:
    spec = importlib.util.spec_from_file_location("plan", ROOT / "build_support" / "plan.py")
    plan = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = plan  # for its dataclasses
    spec.loader.exec_module(plan)
    return plan.digest_of_sources()


def verify(check: Check, seconds: float) -> Outcome:
    """Whether each kernel is right at the sizes of real calls."""
    program = python("-m", "benchmarks.gpu_check.proofs", "verify")
    return _of_kernels(check, "verify", program, seconds, _PROOF_SECONDS)


def repeats(check: Check, seconds: float) -> Outcome:
    allowed = max(0.7 * seconds, 5)  # the rest is for start and compilation
    program = python("-m", "benchmarks.gpu_check.kernels", "repeats", "--seconds", str(allowed))
    return _of_kernels(check, "repeats", program, seconds, _REPEATS_SECONDS)


def _of_kernels(check: Check, name: str, program: list[str], seconds: float, case_seconds: float) -> Outcome:
    """A piece for each kernel and backend."""
    commands = {f"{name} {','.join(kernel)}": [*program, "--kernel", ",".join(kernel)] for kernel in gpu_kernels()}
    limits = {"case_seconds": case_seconds, "workers": pieces.at_once(check)}
    return pieces.run(check, commands, seconds, environment=on_a_gpu(), **limits)


def tune(check: Check, seconds: float) -> Outcome:
    """Proves and times what can run each of those calls: what a default is made of."""
    program = python("-m", "benchmarks.gpu_check.proofs", "tune", "--table", str(check.tuning))
    options = {"case_seconds": _TUNE_SECONDS, "environment": on_a_gpu(), "done": "calls tuned"}
    found = pieces.run(check, {"tune": program}, seconds, **options)
    table = json.loads(check.tuning.read_text()) if check.tuning.exists() else {"entries": []}
    refused = [entry for entry in table["entries"] if entry["wrong"]]
    summary = f"{found.summary}; {len(table['entries'])} in the table, {len(refused)} with a kernel that was refused"
    return Outcome(found.status, summary, found.seconds, found.log, found.facts | {"tuning": table})


def parity(check: Check, seconds: float) -> Outcome:
    """The tests of GPU kernels of every operator, on the GPU, file by file."""
    return _tests(check, {f"tests {path}": [path] for path in gpu_tests()}, seconds)


def gpu_tests() -> list[str]:
    """Files with tests of GPU kernels, the riskiest first: all on small calls, those of CUDA C++, the rest."""
    folders = [ROOT / "tests" / operator for operator in dict.fromkeys(name for name, _ in gpu_kernels())]
    found = [path for folder in folders for path in sorted(folder.glob("test_*.py")) if _is_of_a_gpu(path)]
    found.sort(key=lambda path: path.name != "test_cuda.py")
    return ["tests/test_gpu_kernels.py", *(str(path.relative_to(ROOT)) for path in found)]


def _is_of_a_gpu(path: Path) -> bool:
    return path.name not in _NOT_ON_A_GPU and ("triton" in (text := path.read_text()) or "cuda" in text)


def suite(check: Check, seconds: float) -> Outcome:
    """All other tests but the longest, those of the CPU as well: the whole package in this environment."""
    done = [f"--ignore={path}" for path in gpu_tests()]
    return _tests(check, {f"suite {name}": ["-m", _LONG_SUITES, *done, f"tests/{name}"] for name in suites()}, seconds)


def suites() -> list[str]:
    """What of tests/ has some."""
    tests = ROOT / "tests"
    places = {path.relative_to(tests).parts[0] for path in tests.rglob("test_*.py")}
    return sorted(name for name in places if f"tests/{name}" not in gpu_tests())


def _tests(check: Check, arguments: dict[str, list[str]], seconds: float) -> Outcome:
    commands = {name: _pytest("--tb=short", *of_piece) for name, of_piece in arguments.items()}
    options = {"case_seconds": _TEST_SECONDS, "environment": on_a_gpu(), "workers": pieces.at_once(check)}
    return pieces.run(check, commands, seconds, **options)


def _pytest(*arguments: str) -> list[str]:
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.journaled"]
    return python("-m", "pytest", "-q", *plugins, "--continue-on-collection-errors", *arguments)


def roofline(check: Check, seconds: float) -> Outcome:
    finished = process.run(python("-m", "benchmarks.measure.roofline"), seconds, log=check.log)
    rates = _last_json(finished.log) if finished.status == PASSED else None
    if rates is None:
        return outcome(finished)
    check.record["ceilings"] = rates
    return outcome(finished, ", ".join(f"{name}: {rate:.3g}" for name, rate in rates.items()))


def headline(check: Check, seconds: float) -> Outcome:
    """Each kernel's main shape beside eager and torch.compile."""
    return _cases(check, _HEADLINE, seconds, min(check.case_seconds, _HEADLINE_SECONDS))


def benchmarks(check: Check, seconds: float) -> Outcome:
    """Every case of the profile, but those of the headline, which are there."""
    return _cases(check, check.profile, seconds, check.case_seconds)


def _cases(check: Check, profile: str, seconds: float, case_seconds: float) -> Outcome:
    states = check.record["cases"]

    def took(entry: dict) -> None:
        states[entry["case"]] = {"state": state_of(entry), "reason": entry["fault"], "seconds": entry["seconds"]}
        check.record["rows"] += entry["rows"]
        check.save()

    found = _measured(check, _CASES, seconds, case_seconds, took, "--profile", profile)
    for name in found.facts["not_reached"]:
        states[name] = {"state": NOT_REACHED, "reason": "no time was left", "seconds": 0.0}
    return found


def autotuned(check: Check, seconds: float) -> Outcome:
    """The headline's cases beside torch.compile that tunes: what it gains for minutes of compilation."""

    def took(entry: dict) -> None:
        check.record["rows"] += [row for row in entry["rows"] if row["variant"] == AUTOTUNED]
        check.save()

    options = ("--profile", _HEADLINE, "--autotuned")
    return _measured(check, _AUTOTUNED, seconds, check.case_seconds, took, *options)


def _measured(check: Check, piece: str, seconds: float, case_seconds: float, took, *arguments: str) -> Outcome:
    stuck = [argument for kernel in _stuck(check) for argument in ("--without", kernel)]
    command = _pytest("benchmarks/", "--benchmark-only", "--benchmark-quiet", *stuck, *arguments)
    options = {"case_seconds": case_seconds, "environment": on_a_gpu(), "took": took, "done": "measured"}
    return pieces.run(check, {piece: command}, seconds, **options)


def _stuck(check: Check) -> list[str]:
    """Kernels, as "operator,backend", of which a proof hung or crashed: they would take the cases along."""
    found = [entry["piece"] for entry in journal.read(check.journal) if entry.get("verdict") in (HUNG, CRASHED)]
    return sorted({piece.removeprefix("verify ") for piece in found if piece.startswith("verify ")})


def report(check: Check, seconds: float) -> Outcome:
    arguments = str(check.path), "--page", str(check.page), "--markdown"
    finished = process.run(python("-m", "benchmarks.report", *arguments), seconds)
    return outcome(finished, str(check.page) if finished.status == PASSED else None)


def _sanitize(tool: str, check: Check, seconds: float) -> Outcome:
    program = python("-m", "benchmarks.gpu_check.kernels", "once", "--kernel")
    kernels = {",".join(kernel): [*program, ",".join(kernel)] for kernel in gpu_kernels()}
    return sanitizer.run(tool, kernels, on_a_gpu(), check, seconds)


def _last_json(log: str) -> dict | None:
    """The last line of a log, where warnings may stand above it."""
    try:
        found = json.loads(last_line(log))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


STEPS = (
    Step("environment", environment, most=180),
    Step("build", build, most=240, is_stale=lambda check: not _is_built(check)),
    Step("verify", verify, most=150, needs_gpu=True),
    Step("headline", headline, most=270, needs_gpu=True),
    Step("roofline", roofline, share=1),
    Step("tune", tune, share=4, needs_gpu=True),
    Step("parity", parity, share=6, needs_gpu=True),
    Step("repeats", repeats, share=2, needs_gpu=True),
    Step("benchmarks", benchmarks, share=8),
    Step("memcheck", functools.partial(_sanitize, "memcheck"), share=2, needs_gpu=True),
    Step("racecheck", functools.partial(_sanitize, "racecheck"), share=2, needs_gpu=True),
    Step("suite", suite, share=4, needs_gpu=True),
    Step("autotuned", autotuned, share=4, needs_gpu=True),
    Step("report", report, most=60),
)
