"""Checks and times one problem: all variants in turn in every round, so that a drifting machine drifts for all."""

import contextlib
import gc
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

import tokenfusion
from benchmarks.measure import allocator, roofline
from benchmarks.measure.problem import AND_COMPILE, AUTOMATIC, COMPILED, Problem, Variant, dtype_of, package
from benchmarks.measure.timing import MOST_CALLS, Replay, Ring, seconds_a_call
from benchmarks.report.table import OTHER_TIMES
from tokenfusion import measure
from tokenfusion.kernels import choices, dispatch
from tokenfusion.tuning.parity import Parity, compare, in_float64

_SAMPLE_SECONDS = 1e-3  # the least that a sample of the fastest variant should last
_WARM_UP_SECONDS = 0.3  # of a GPU, whose clocks rise with work
_SLACK_OF_OTHERS = 8  # code of others has to compute the same thing, and is not on trial for its rounding


@dataclass(frozen=True)
class Effort:
    """How much time a case may take, compilation and checks apart, and how many rounds it must and may have."""

    seconds: float
    fewest: int
    most: int


@dataclass(frozen=True)
class Measured:
    """The rows of a problem, and the samples behind the times of those that were timed: {variant: seconds}."""

    rows: list[dict]
    samples: dict[str, list[float]]


@dataclass(frozen=True)
class Inspection:
    """What one call of a variant showed. A variant with a fault is not timed."""

    parity: Parity | None = None
    peak_bytes: int | None = None
    fault: str | None = None


@dataclass
class Timed:
    """A variant's samples: in `seconds` those that count, in `called` those of calls from Python where they differ,
    in `kept` those with freed memory kept, where they were asked for.
    """

    call: object
    ring: Ring
    backend: str | None = None
    seconds: list[float] = field(default_factory=list)
    called: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    replay: Replay | None = None

    def from_python(self, calls: int) -> float:
        with _in_force(self.backend):
            return seconds_a_call(self.call, self.ring.take(calls))

    def capture(self, calls: int) -> None:
        with _in_force(self.backend):
            self.replay = Replay(self.call, self.ring.take(calls))

    def sample(self, calls: int) -> None:
        if self.replay is None:
            self.seconds.append(self.from_python(calls))
        else:
            self.seconds.append(self.replay.seconds_a_call())
            self.called.append(self.from_python(calls))

    def sample_kept(self, calls: int) -> None:
        self.kept.append(self.from_python(calls))


def run(problem: Problem, effort: Effort, kept: bool = False) -> Measured:
    """Every variant of a problem, checked and timed. kept: once more with freed memory kept, on a CPU."""
    problem = with_automatic(problem)
    torch.compiler.reset()
    torch.manual_seed(0)
    ring = Ring(problem.make_inputs)
    torch.manual_seed(0)  # how many sets a ring has hangs on the machine
    inspections = _inspect_all(problem, problem.make_checked() if problem.make_checked else ring.take(1)[0])
    timed = {v.name: Timed(v.call, ring, v.backend) for v in problem.variants if inspections[v.name].fault is None}
    stream = Timed(*roofline.stream(problem.moved, problem.written))
    entries = [*timed.values(), stream]
    calls, rounds = _plan(entries, effort)
    not_captured = _capture(entries, calls)
    _sample(entries, calls, rounds, Timed.sample)
    if kept:
        with allocator.keeping_freed_memory():
            _sample(entries, calls, 1, Timed.from_python)  # which faults in what is then kept
            _sample(entries, calls, rounds, Timed.sample_kept)
    rows = [_row(problem, v, inspections[v.name], timed, stream) | not_captured for v in problem.variants]
    return Measured(rows, {name: entry.seconds for name, entry in timed.items()})


def with_automatic(problem: Problem) -> Problem:
    """With what "auto" runs, too, where a table of this machine is in force: it may be another form or backend."""
    if choices.is_empty():
        return problem
    cpu = [variant for variant in problem.variants if variant.name == package("cpu")]
    automatic = [replace(variant, name=package(AUTOMATIC), backend=AUTOMATIC) for variant in cpu]
    return replace(problem, variants=[*problem.variants, *automatic])


def _sample(entries: list[Timed], calls: int, rounds: int, sample: Callable[[Timed, int], object]) -> None:
    """All entries in turn in every round, without garbage collection."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for entry in random.sample(entries, len(entries)):
                sample(entry, calls)
    finally:
        gc.enable()


def _in_force(backend: str | None):
    return tokenfusion.backend(backend) if backend else contextlib.nullcontext()


def _inspect_all(problem: Problem, inputs) -> dict[str, Inspection]:
    exact = problem.reference(*in_float64(inputs))
    eager = problem.variants[0].call(*inputs)
    return {variant.name: _inspect(variant, inputs, eager, exact) for variant in problem.variants}


def _inspect(variant: Variant, inputs, eager, exact) -> Inspection:
    def call():
        return variant.call(*inputs)

    with _in_force(variant.backend):
        try:
            results = call()
        except Exception as error:  # one variant that cannot run leaves the others to be measured
            return Inspection(fault=_first_line(error))
        parity = None if variant.another_network else _parity(variant, results, eager, exact)
        del results
        ran = _backends_that_run(call)
        peak_bytes = measure.peak_extra_bytes(call)
    fault = None
    if parity and not parity.passes:
        fault = f"relative error {parity.error:.1e}, allowed {parity.allowed:.1e}"
    if variant.backend != AUTOMATIC and ran != {variant.backend} - {"reference", None}:
        fault = f"expected backend {variant.backend}, ran {', '.join(sorted(ran)) or 'plain PyTorch'}"
    return Inspection(parity, peak_bytes, fault)


def _parity(variant: Variant, results, eager, exact) -> Parity:
    others = variant.backend is None or variant.name.endswith(AND_COMPILE)
    slack = _SLACK_OF_OTHERS if others else 1  # torch.compile sums in its own ways
    return compare(results, variant.comparable(eager), variant.comparable(exact), slack)


def _backends_that_run(call) -> set[str]:
    """Whose kernels of this package a call reaches; the reference is none."""
    with dispatch.observe() as seen:
        call()
    return {backend for _, backend in seen.ran}


def _plan(entries: list[Timed], effort: Effort) -> tuple[int, int]:
    """Calls a sample and rounds, after every variant has been warmed up."""
    for entry in entries:
        entry.from_python(1)
    seconds = [entry.from_python(1) for entry in entries]
    most = MOST_CALLS
    if torch.cuda.is_available():
        most = min(len(entry.ring) for entry in entries)
        for _ in range(min(int(_WARM_UP_SECONDS / sum(seconds)), MOST_CALLS)):
            seconds = [entry.from_python(1) for entry in entries]
    calls = min(max(round(_SAMPLE_SECONDS / min(seconds)), 1), most)
    rounds = int(effort.seconds / (calls * sum(seconds)))
    return calls, min(max(rounds, effort.fewest), effort.most)


def _capture(entries: list[Timed], calls: int) -> dict[str, str]:
    """Graphs of all variants on a GPU. Where one cannot be captured none is, so that all are timed alike; says why."""
    if not torch.cuda.is_available():
        return {}
    try:
        for entry in entries:
            entry.capture(calls)
    except Exception as error:
        for entry in entries:
            entry.replay = None
        return {"not_captured": _first_line(error)}
    return {}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _row(problem: Problem, variant: Variant, inspection: Inspection, timed: dict[str, Timed], stream: Timed) -> dict:
    row = {
        "group": problem.group,
        "case": problem.case,
        "variant": variant.name,
        "backend": variant.backend,
        "fault": inspection.fault,
        "peak_bytes": inspection.peak_bytes,
        "moved_bytes": problem.moved,
        "flops": problem.flops,
        "error": inspection.parity and _finite(inspection.parity.error),
        "allowed_error": inspection.parity and _finite(inspection.parity.allowed),
    }
    if inspection.fault is None:
        row |= _times(problem, timed, timed[variant.name], stream)
    return row


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def _times(problem: Problem, timed: dict[str, Timed], entry: Timed, stream: Timed) -> dict:
    def faster_than(name: str, of: str = "seconds") -> float | None:
        return measure.median_ratio(getattr(timed[name], of), getattr(entry, of)) if name in timed else None

    eager = problem.variants[0].name
    seconds = statistics.median(entry.seconds)
    memory = statistics.median(stream.seconds)
    arithmetic = problem.flops / roofline.matmul_flops(dtype_of(problem.case["dtype"]))
    times = {
        "seconds": seconds,
        "quartiles": torch.tensor(entry.seconds).quantile(torch.tensor([0.25, 0.75])).tolist(),
        "rounds": len(entry.seconds),
        "times_eager": faster_than(eager),
        "times_compiled": faster_than(COMPILED),
        "bytes_per_second": problem.moved / seconds,
        "flops_per_second": problem.flops / seconds,
        "memory_ceiling_seconds": memory,
        "arithmetic_ceiling_seconds": arithmetic,
        "share_of_ceiling": max(memory, arithmetic) / seconds,
        "share_of_copy": problem.moved / seconds / roofline.bytes_per_second(written=True),
    }
    for kind in OTHER_TIMES:
        if samples := getattr(entry, kind):
            times |= {
                f"{kind}_seconds": statistics.median(samples),
                f"{kind}_times_eager": faster_than(eager, kind),
                f"{kind}_times_compiled": faster_than(COMPILED, kind),
            }
    return times
