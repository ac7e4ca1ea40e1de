"""A step made of pieces, each a program whose checks are journaled; where times do not count several run at once."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from benchmarks.gpu_check import process, runner
from benchmarks.gpu_check.outcome import Check, Outcome, last_line
from benchmarks.gpu_check.process import FAILED, PASSED, TIMED_OUT
from benchmarks.gpu_check.runner import CRASHED, FAULTY, HUNG, MEASURED, NOT_REACHED, Runner

_MOST_AT_ONCE = 6
_CORES_OF_A_PIECE = 2
_MOST_WORDS = 300  # of a fault, in the record


def at_once(check: Check) -> int:
    """How many pieces this machine can run side by side."""
    return min(max((check.conditions["device"]["cores"] or 1) // _CORES_OF_A_PIECE, 1), _MOST_AT_ONCE)


def each(function: Callable, pieces: Iterable, workers: int) -> list:
    """function(piece) of each, in order, some at once. All end soon after an error or an interrupt."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(function, pieces))
        except BaseException:
            process.ending.set()
            raise


def run(
    check: Check,
    commands: dict[str, list[str]],
    seconds: float,
    *,
    case_seconds: float,
    environment: dict[str, str],
    workers: int = 1,
    took: Callable[[dict], object] = lambda entry: None,
    done: str = "passed",
) -> Outcome:
    """
    Args:
        commands: by the names of the pieces, the most important first.
        took: is told each check that ended, one at a time.
        done: what the summary calls a check without a fault.
    """
    start = time.monotonic()
    runners = [
        Runner(check.journal, name, command, case_seconds, partial(_take, check, took), environment, check.log)
        for name, command in commands.items()
    ]
    each(lambda one: one.run(start + seconds), runners, workers)
    return _outcome(runners, time.monotonic() - start, done)


def _take(check: Check, took: Callable[[dict], object], entry: dict) -> None:
    with check.lock:
        took(entry)


def _outcome(runners: list[Runner], seconds: float, done: str) -> Outcome:
    states = {name: (runner.state_of(entry), entry) for one in runners for name, entry in one.ended.items()}
    not_reached = [name for one in runners for name in one.not_reached]
    unknown = [one.piece for one in runners if one.to_do is None]
    counts = Counter(state for state, _ in states.values())
    words = [f"{counts[MEASURED]} {done}"]
    words += [f"{count} {state}" for state, count in counts.items() if state != MEASURED]
    words += [f"{len(not_reached)} {NOT_REACHED}"] if not_reached else []
    words += [f"not begun: {', '.join(unknown)}"] if unknown else []
    faults = {
        name: f"{state}: {entry['fault'][:_MOST_WORDS]}"
        for name, (state, entry) in states.items()
        if state in (FAULTY, HUNG, CRASHED)
    }
    broken = [one for one in runners if one.to_do is None and one.finished and one.finished.status != TIMED_OUT]
    summary = "; ".join([", ".join(words), *(f"{one.piece}: {last_line(one.finished.log)}" for one in broken)])
    if not_reached or (unknown and not broken):
        status = TIMED_OUT
    else:
        status = FAILED if faults or broken or not counts[MEASURED] else PASSED
    shown = broken if len(runners) > 1 else runners
    log = "\n".join(one.finished.log for one in shown if one.finished)
    return Outcome(status, summary, seconds, log, {"faults": faults, "not_reached": not_reached})
