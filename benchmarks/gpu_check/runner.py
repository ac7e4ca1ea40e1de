"""Many small checks in a process that is started anew where one of them hangs or crashes; a journal keeps each result.

A program that is run so takes --journal FILE and --piece NAME. It notes what it has to do, leaving out what the journal
says of that piece already, and each check as it starts and as it ends (`program.py`, `journaled.py`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_check import process
from benchmarks.report import journal

MEASURED, FAULTY, SKIPPED = "measured", "with a fault", "skipped"
HUNG, CRASHED, NOT_REACHED = "timed out", "crashed", "not reached"
SKIPS = "skipped: "  # begins the fault of what was skipped
_LEAST_SECONDS = 5  # to start a process and check something
_FRUITLESS = 2  # processes in a row that may end without a result, as one that was killed from outside does


def state_of(entry: dict) -> str:
    """Of the entry of a check that ended."""
    fault = entry["fault"]
    return entry.get("verdict") or (MEASURED if fault is None else SKIPPED if fault.startswith(SKIPS) else FAULTY)


def settled(path: Path, piece: str) -> list[str]:
    """What needs no second run."""
    return [entry["case"] for entry in journal.read(path, piece) if entry.get("state") == "ended"]


@dataclass
class Runner:
    """What of a piece has been checked. took is told each check that ended, those of earlier runs as well."""

    path: Path
    piece: str
    command: list[str]
    case_seconds: float
    took: Callable[[dict], object] = lambda entry: None
    environment: dict[str, str] = field(default_factory=dict)
    log: Path | None = None
    ended: dict[str, dict] = field(default_factory=dict)
    to_do: list[str] | None = None  # None: no process has said it
    finished: process.Finished | None = None

    def run(self, end: float) -> None:
        """Runs what has not ended yet, until the time `end` of time.monotonic()."""
        reader = journal.Reader(self.path)
        self._take(reader)
        self.to_do = None  # that of an earlier run
        fruitless = 0
        while fruitless < _FRUITLESS and self._has_work and end - time.monotonic() > _LEAST_SECONDS:
            before = len(self.ended)
            self._process(reader, end)
            fruitless = 0 if len(self.ended) > before else fruitless + 1

    @property
    def _has_work(self) -> bool:
        """As far as is known: a program that fails before it says what it has to do would fail again."""
        if self.to_do is None:
            return self.finished is None or self.finished.status == process.KILLED
        return bool(self.not_reached)

    @property
    def not_reached(self) -> list[str]:
        return [name for name in self.to_do or () if name not in self.ended]

    def _process(self, reader: journal.Reader, end: float) -> None:
        running: dict[str, float] = {}

        def hangs() -> bool:
            self._take(reader, running)
            return any(time.monotonic() - since > self.case_seconds for since in running.values())

        command = [*self.command, "--journal", str(self.path), "--piece", self.piece]
        left = end - time.monotonic()
        self.finished = process.run(command, left, environment=self.environment, stop=hangs, log=self.log)
        stuck = hangs()
        if not stuck and (self.finished.status == process.TIMED_OUT or process.ending.is_set()):
            return
        for name, since in running.items():
            verdict = HUNG if stuck else CRASHED
            fault = f"stopped after {self.case_seconds:g} s" if stuck else f"exit status {self.finished.returncode}"
            seconds = round(time.monotonic() - since, 1)
            ended = {"case": name, "state": "ended", "verdict": verdict, "fault": fault, "rows": [], "seconds": seconds}
            journal.note(self.path, piece=self.piece, **ended)
        if stuck:
            self.finished = process.Finished(process.KILLED, None, self.finished.seconds, self.finished.log)
        self._take(reader)

    def _take(self, reader: journal.Reader, running: dict[str, float] | None = None) -> None:
        running = {} if running is None else running
        for entry in reader.new():
            if entry.get("piece") != self.piece:
                continue
            if "to_do" in entry:
                self.to_do = entry["to_do"]
            elif entry.get("state") == "started":
                running[entry["case"]] = time.monotonic()
            elif entry.get("state") == "ended":
                running.pop(entry["case"], None)
                self.ended[entry["case"]] = entry
                self.took(entry)
