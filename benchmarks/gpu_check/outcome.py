"""A run of the check, and what became of a step of it."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_check import process
from benchmarks.gpu_check.process import FAILED, KILLED, TIMED_OUT
from benchmarks.report import record

SKIPPED, NOT_REACHED, RUNNING = "skipped", "not reached", "running"
NO_GPU = "no CUDA device"


@dataclass
class Check:
    """A run of the check: the record that it fills, and where that is kept with what stands beside it."""

    record: dict
    path: Path
    profile: str
    case_seconds: float
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the record, where pieces run side by side

    @property
    def conditions(self) -> dict:
        return self.record["conditions"]

    @property
    def has_gpu(self) -> bool:
        return self.conditions["device"]["kind"] == "cuda"

    @property
    def why_no_gpu(self) -> str:
        return NO_GPU if self.conditions["device"]["kind"] == "cpu" else "the environment is not known"

    @property
    def journal(self) -> Path:
        return self.path.with_suffix(".journal")

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log")

    @property
    def tuning(self) -> Path:
        return self.path.with_suffix(".tuning.json")

    @property
    def page(self) -> Path:
        return self.path.with_suffix(".html")

    def save(self) -> None:
        record.save(self.path, self.record)


@dataclass(frozen=True)
class Outcome:
    """status is one of "passed", "failed", "timed out", "killed", "skipped", "not reached" and "running"; summary says
    it in a line."""

    status: str
    summary: str
    seconds: float = 0.0
    log: str = ""
    facts: dict = field(default_factory=dict)


def last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no output")


def outcome(finished: process.Finished, summary: str | None = None, **facts) -> Outcome:
    """Of a step that is one command."""
    if finished.status == TIMED_OUT:
        summary = f"stopped after {finished.seconds:.0f} s: {last_line(finished.log)}"
    elif finished.status == KILLED:
        summary = f"killed by signal {-finished.returncode}: {last_line(finished.log)}"
    elif finished.status == FAILED and summary is None:
        summary = f"exit status {finished.returncode}: {last_line(finished.log)}"
    return Outcome(finished.status, summary or last_line(finished.log), finished.seconds, finished.log, facts)
