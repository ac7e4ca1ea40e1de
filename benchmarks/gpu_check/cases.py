"""The cases of the benchmarks, one after another; what hangs or crashes costs the one case that did."""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import journal
from benchmarks.gpu_check import process

MEASURED, FAULTY, SKIPPED = "measured", "with a fault", "skipped"
HUNG, CRASHED, NOT_REACHED = "timed out", "crashed", "not reached"
_LEAST_SECONDS = 15  # to start a process and measure something


class Runner:
    """Fills record["rows"] and record["cases"], {test: {"state", "reason", "seconds"}}; cases with a state stay."""

    def __init__(self, record: dict, profile: str, case_seconds: float, save: Callable[[], object]):
        self.record = record
        self.case_seconds = case_seconds
        self.save = save
        self.unfinished = False  # whether the time ended, or a process, before all cases were known
        self._command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "--profile", profile]
        self._command += ["-q", "-p", "no:cacheprovider"]

    def run(self, end: float) -> str:
        """Runs what has no state yet, until the time `end` of time.monotonic(); returns the end of the output."""
        cases = self.record["cases"]
        for name in [name for name, case in cases.items() if case["state"] == NOT_REACHED]:
            del cases[name]
        log = ""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "journal")
            for name in cases:
                journal.note(path, case=name)
            while True:
                if end - time.monotonic() < _LEAST_SECONDS:
                    self.unfinished = True
                    break
                log, more = self._process(path, end)
                if not more:
                    break
            for name in self._to_do(path):
                cases[name] = {"state": NOT_REACHED, "reason": "no time was left", "seconds": 0.0}
        self.save()
        return log

    def _process(self, path: Path, end: float) -> tuple[str, bool]:
        """One process; (the end of its output, whether another one has work to do)."""
        started = time.monotonic()
        known = len(self.record["cases"])
        seen = len(journal.read(path))
        running = {"case": None, "since": started}

        def hangs() -> bool:
            nonlocal seen
            entries = journal.read(path)[seen:]
            seen += len(entries)
            for entry in entries:
                self._take(entry, running)
            return running["case"] is not None and time.monotonic() - running["since"] > self.case_seconds

        command = [*self._command, "--journal", str(path)]
        finished = process.run(command, end - started, stop=hangs)
        stuck = hangs()
        if running["case"] is not None and (stuck or finished.status != process.TIMED_OUT):
            state = HUNG if stuck else CRASHED
            reason = f"stopped after {self.case_seconds:g} s" if stuck else f"exit status {finished.returncode}"
            seconds = time.monotonic() - running["since"]
            self.record["cases"][running["case"]] = {"state": state, "reason": reason, "seconds": seconds}
            self.save()
        progress = len(self.record["cases"]) > known
        if not progress and not any("to_do" in entry for entry in journal.read(path)):
            self.unfinished = True  # it did not come as far as to list the cases
        return finished.log, progress and bool(self._to_do(path))

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
        return [name for name in listed[0] if name not in self.record["cases"]] if listed else []
