"""The cases of the benchmarks, one after another; what hangs or crashes costs the one case that did."""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu_check import process
from benchmarks.report import journal

MEASURED, FAULTY, SKIPPED = "measured", "with a fault", "skipped"
HUNG, CRASHED, NOT_REACHED = "timed out", "crashed", "not reached"
_LEAST_SECONDS = 5  # to start a process and measure something


def command(profile: str) -> list[str]:
    options = ["--benchmark-only", "--benchmark-quiet", "--profile", profile, "-q", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", "benchmarks/", *options, "--continue-on-collection-errors"]


class Runner:
    """Fills record["rows"] and record["cases"], {test: {"state", "reason", "seconds"}}; cases with a state stay."""

    def __init__(self, record: dict, command: list[str], case_seconds: float, save: Callable[[], object]):
        self.record = record
        self.command = command
        self.case_seconds = case_seconds
        self.save = save

    def run(self, end: float) -> process.Finished | None:
        """Runs what has no state yet, until the time `end` of time.monotonic(); returns what the last process did."""
        finished, more = None, True
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "journal")
            for name in self._settled():
                journal.note(path, case=name)
            while more and end - time.monotonic() > _LEAST_SECONDS:
                finished, more = self._process(path, end)
            for name in self._to_do(path):
                self.record["cases"][name] = {"state": NOT_REACHED, "reason": "no time was left", "seconds": 0.0}
        self.save()
        return finished

    def _process(self, path: Path, end: float) -> tuple[process.Finished, bool]:
        """(what became of one process, whether another one has work to do)."""
        started = time.monotonic()
        settled = len(self._settled())
        seen = len(journal.read(path))
        running = {"case": None, "since": started}

        def hangs() -> bool:
            nonlocal seen
            entries = journal.read(path)[seen:]
            seen += len(entries)
            for entry in entries:
                self._take(entry, running)
            return running["case"] is not None and time.monotonic() - running["since"] > self.case_seconds

        finished = process.run([*self.command, "--journal", str(path)], end - started, stop=hangs)
        stuck = hangs()
        if running["case"] is not None and (stuck or finished.status != process.TIMED_OUT):
            state = HUNG if stuck else CRASHED
            reason = f"stopped after {self.case_seconds:g} s" if stuck else f"exit status {finished.returncode}"
            seconds = time.monotonic() - running["since"]
            self.record["cases"][running["case"]] = {"state": state, "reason": reason, "seconds": seconds}
            self.save()
        progress = len(self._settled()) > settled
        return finished, progress and bool(self._to_do(path))

    def _settled(self) -> list[str]:
        return [name for name, case in self.record["cases"].items() if case["state"] != NOT_REACHED]

    def _take(self, entry: dict, running: dict) -> None:
        if entry.get("state") == "started":
            running |= {"case": entry["case"], "since": time.monotonic()}
        if entry.get("state") == "ended":
            running["case"] = None
            fault = entry["fault"]
            state = MEASURED if fault is None else SKIPPED if fault.startswith("skipped: ") else FAULTY
            self.record["cases"][entry["case"]] = {"state": state, "reason": fault, "seconds": entry["seconds"]}
            self.record["rows"] += entry["rows"]
            self.save()

    def _to_do(self, path: Path) -> list[str]:
        listed = [entry["to_do"] for entry in journal.read(path) if "to_do" in entry]
        settled = self._settled()
        return [name for name in listed[0] if name not in settled] if listed else []
