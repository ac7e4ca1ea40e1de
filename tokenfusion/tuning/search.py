"""tune and verify: prove every implementation of an operator, time those that are right, and keep what was found."""

import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from tokenfusion import measure
from tokenfusion.kernels import dispatch
from tokenfusion.kernels.choices import Table, Workload, using
from tokenfusion.kernels.dispatch import OPERATORS, Implementation
from tokenfusion.tuning import files, machine, proof
from tokenfusion.tuning.shipped import WORKLOADS

_ENOUGH = 1.02  # times as fast as the built-in choice, to be chosen in its place
_FIRST_ROUNDS = 2  # of all
_ROUNDS = 5, 41  # of those that they leave, fewest and most
_SECONDS = 1.0  # of the timing of a workload
_SAMPLE = 1e-3  # seconds that a sample lasts at least
_HOPELESS = 1.5  # times as slow as the fastest in the first rounds, to be left out of the others


@dataclass(frozen=True)
class Finding:
    """What was found about a workload.

    seconds are medians of a call, of the implementations that are right; wrong says why the others are refused; choice
    is the one to run, and built_in what runs without a table. All are names of implementations. skipped says why there
    is none of all this.
    """

    workload: Workload
    choice: str | None = None
    built_in: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None

    @property
    def gain(self) -> float | None:
        """How many times as fast the choice is as what would run without it."""
        if self.choice is None or self.built_in not in self.seconds:
            return None
        return self.seconds[self.built_in] / self.seconds[self.choice]


@dataclass(frozen=True)
class Tuning:
    """Findings, and the file that they are in, if any."""

    findings: tuple[Finding, ...]
    path: Path | None = None

    @property
    def wrong(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.wrong)


def workloads_of(model: nn.Module, inputs: Sequence, *, trains: bool, infers: bool = True) -> list[Workload]:
    """The distinct workloads of a model's own calls of operators, fused beforehand.

    A copy is called: training changes statistics, random numbers are drawn, and parts may be in modes of their own.
    """
    found: dict[Workload, None] = {}
    for training in (mode for mode, wanted in ((False, infers), (True, trains)) if wanted):
        copied = copy.deepcopy(model).train(training)
        with (
            using(Table({})),
            torch.random.fork_rng(),
            torch.set_grad_enabled(training),
            dispatch.observe() as seen,
        ):
            copied(*inputs)
        found |= dict.fromkeys(choice.workload for choice in seen.choices if choice.workload is not None)
    return list(found)


def tune(
    model: nn.Module | None = None,
    example_inputs: Sequence = (),
    *,
    workloads: Iterable[Workload] | None = None,
    train: bool = True,
    infer: bool = True,
    minutes: float = 5.0,
    path: Path | None = None,
    report: Callable[[Finding, int, int], None] = lambda finding, done, total: None,
) -> Tuning:
    """Prove and time every backend and form that can run here; the fastest go into the file that "auto" follows.

    What was measured is kept: entries of the file for other workloads stay, and it is written after each workload, so
    that an interruption loses none. Workloads that the file lacks come first. Processes that start later follow it;
    this one has read what it follows.

    Args:
        model: its own calls are measured; it is fused already, and stays as it is. None: `workloads`, or the list
            that comes with the package.
        example_inputs: what model is called with.
        train, infer: which of both to measure.
        minutes: when to stop, at the end of a call; a workload that is not finished then is left for the next time.
        path: the file; None for the one of this device in the user's cache folder.
        report: is told each finding, with how many there are and will be.

    Raises:
        OSError: the file cannot be written.
        ValueError: minutes is negative or no number.
    """
    if not minutes >= 0:
        raise ValueError(f"minutes: got {minutes}, expected a number of at least 0")
    path = files.user_path() if path is None else Path(path)
    limit = _Limit(time.monotonic() + 60 * minutes)
    kept = _kept(path)
    files.write(path, list(kept.values()))  # says at once if it cannot
    chosen = sorted(_workloads(model, example_inputs, workloads, train, infer), key=kept.__contains__)
    findings, entries = [], {}
    for done, workload in enumerate(chosen, 1):
        try:
            finding = _where_memory_suffices(_measured, workload, limit)
        except _TimeIsUp:
            break
        findings.append(finding)
        entries[workload] = _entry(finding)
        files.write(path, list((_kept(path) | entries).values()))  # with what another process has found meanwhile
        report(finding, done, len(chosen))
    return Tuning(tuple(findings), path)


def verify(
    workloads: Iterable[Workload] | None = None,
    *,
    report: Callable[[Finding, int, int], None] = lambda finding, done, total: None,
) -> Tuning:
    """The proof of `tune` alone: nothing is timed or written."""
    chosen = list(WORKLOADS if workloads is None else workloads)
    findings = []
    for done, workload in enumerate(chosen, 1):
        findings.append(_where_memory_suffices(_verified, workload, _Limit()))
        report(findings[-1], done, len(chosen))
    return Tuning(tuple(findings))


class _TimeIsUp(Exception):
    pass


@dataclass(frozen=True)
class _Limit:
    """When to stop, by time.monotonic()."""

    at: float = math.inf

    def check(self) -> None:
        if time.monotonic() > self.at:
            raise _TimeIsUp


def _where_memory_suffices(find: Callable, workload: Workload, limit: _Limit) -> Finding:
    """On fewer images other kernels may run: nothing is known of a workload that does not fit."""
    try:
        return find(workload, limit)
    except (RuntimeError, MemoryError) as error:
        if not proof.ran_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Finding(workload, skipped="its proof or its measurement ran out of memory")


def _workloads(model, example_inputs, workloads, train: bool, infer: bool) -> list[Workload]:
    if model is not None:
        return workloads_of(model, example_inputs, trains=train, infers=infer)
    wanted = {"training": train, "inference": infer}
    return [workload for workload in (WORKLOADS if workloads is None else workloads) if wanted[workload.kind[1]]]


def _kept(path: Path) -> dict[Workload, dict]:
    """The entries of a file that holds for this machine."""
    try:
        return {files.workload_of(entry): entry for entry in files.read(path)}
    except (OSError, ValueError):
        return {}


def _entry(finding: Finding) -> dict:
    fields = {"operator": finding.workload.operator, "kind": finding.workload.kind, "sizes": finding.workload.sizes}
    fields |= {"choice": finding.choice, "built_in": finding.built_in}
    fields |= {"seconds": finding.seconds, "wrong": finding.wrong}
    return fields if finding.skipped is None else fields | {"skipped": finding.skipped}


def _verified(workload: Workload, limit: _Limit) -> Finding:
    _, _, wrong, built_in = _proven(workload, limit)
    return Finding(workload, built_in=built_in, wrong=wrong)


def _measured(workload: Workload, limit: _Limit) -> Finding:
    call, right, wrong, built_in = _proven(workload, limit)
    if not right:
        return Finding(workload, built_in=built_in, wrong=wrong)
    samples = _samples(call, right, built_in, limit)
    seconds = {name: statistics.median(times) for name, times in samples.items()}
    fastest = min((name for name in seconds if len(samples[name]) > _FIRST_ROUNDS), key=seconds.get)
    if built_in in seconds and not _clearly_faster(samples[fastest], samples[built_in]):
        fastest = built_in
    return Finding(workload, fastest, built_in, seconds, wrong)


def _clearly_faster(samples: list[float], others: list[float]) -> bool:
    """By the median of the rounds, and in three of four of them at all."""
    lower, median, _ = statistics.quantiles((b / a for a, b in zip(samples, others, strict=True)), n=4)
    return median >= _ENOUGH and lower > 1


def _proven(workload: Workload, limit: _Limit) -> tuple[proof.Call, list[Implementation], dict[str, str], str]:
    """A call of a workload, the implementations that are right, why the others are not, and which is built in."""
    operator = OPERATORS[workload.operator]
    call = proof.call_of(operator, workload, machine.device())
    with torch.set_grad_enabled(call.maker.trains), using(Table({})), dispatch.backend("auto"):
        can_run = [each for each in operator.implementations if each.can_run(*call.selecting) is None]
        built_in = operator.select(*call.selecting).name
    limit.check()
    expected = proof.expected(call, operator.implementations[-1])
    reasons = {}
    for each in can_run:
        limit.check()
        of_its_own = proof.call_of(operator, workload, machine.device())  # a wrong one may write anywhere
        reasons[each.name] = proof.why_wrong(of_its_own, each, expected)
    right = [each for each in can_run if reasons[each.name] is None]
    return call, right, {name: reason for name, reason in reasons.items() if reason is not None}, built_in


def _samples(
    call: proof.Call, implementations: Sequence[Implementation], built_in: str, limit: _Limit
) -> dict[str, list[float]]:
    """Seconds of a call, all in turn; in the first rounds alone of those that are much slower than the fastest."""
    timed = {each.name: call.timed(each) for each in implementations}
    first = measure.interleaved_seconds(timed, rounds=_FIRST_ROUNDS, after_each=limit.check)
    once = {name: min(times) for name, times in first.items()}
    fastest = min(once.values())
    close = {name: run for name, run in timed.items() if once[name] < _HOPELESS * fastest or name == built_in}
    repeats = max(1, round(_SAMPLE / fastest))
    rounds = int(_SECONDS / (repeats * sum(once[name] for name in close)))
    repeated = {name: functools.partial(_repeat, run, repeats) for name, run in close.items()}
    rounds = min(max(rounds, _ROUNDS[0]), _ROUNDS[1])
    seconds = measure.interleaved_seconds(repeated, rounds=rounds, after_each=limit.check)
    return first | {name: [each / repeats for each in times] for name, times in seconds.items()}


def _repeat(run: Callable[[], object], times: int) -> None:
    for _ in range(times):
        run()
