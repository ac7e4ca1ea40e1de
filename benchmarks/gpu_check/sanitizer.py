"""Every GPU kernel once under a tool of compute-sanitizer, kernel by kernel, so that a time-out keeps what was seen."""

import re
import time

from benchmarks.gpu_check import pieces, process
from benchmarks.gpu_check.outcome import SKIPPED, Check, Outcome, last_line, outcome
from benchmarks.gpu_check.process import FAILED, KILLED, PASSED, TIMED_OUT
from benchmarks.report import journal

_FOUND = 9  # exit status where the tool found something
_COUNTS = re.compile(r"(\d+) (error|warning)s?\b")


def run(tool: str, kernels: dict[str, list[str]], environment: dict[str, str], check: Check, seconds: float) -> Outcome:
    """kernels: commands by name. Without the caching allocator, in whose blocks neighbours go unseen.

    A warning (racecheck's, of an access that is no hazard as the hardware is) is counted and is no fault.
    """
    path = check.conditions.get("tools", {}).get("compute-sanitizer")
    if path is None:
        return Outcome(SKIPPED, "compute-sanitizer not found")
    start = time.monotonic()
    known = {entry["case"]: entry for entry in journal.read(check.journal, tool)}
    command = [path, "--tool", tool, "--error-exitcode", str(_FOUND), "--target-processes", "application-only"]
    variables = environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def look(name: str) -> process.Finished | None:
        left = start + seconds - time.monotonic()
        if name in known or left <= 0:
            return None
        finished = process.run([*command, *kernels[name]], left, environment=variables, log=check.log)
        if finished.status not in (TIMED_OUT, KILLED):
            known[name] = verdict(tool, finished) | {"case": name, "seconds": round(finished.seconds, 1)}
            journal.note(check.journal, piece=tool, **known[name])
        return finished

    runs = [found for found in pieces.each(look, kernels, pieces.at_once(check)) if found is not None]
    errors, warnings = (sum(entry[what] for entry in known.values()) for what in ("errors", "warnings"))
    faults = {name: entry["fault"] for name, entry in known.items() if entry["fault"]}
    left = [name for name in kernels if name not in known]
    words = [f"{errors} errors, {warnings} warnings in {len(known)} of {len(kernels)} kernels"]
    words += [f"{name}: {fault}" for name, fault in faults.items()]
    status = FAILED if faults and not left else TIMED_OUT if left else PASSED
    log = "\n".join(found.log for found in runs if found.status != PASSED)
    facts = {"errors": errors, "warnings": warnings, "faults": faults, "not_reached": left}
    return Outcome(status, "; ".join(words), time.monotonic() - start, log, facts)


def verdict(tool: str, finished: process.Finished) -> dict:
    """Of a tool that came to its end: errors, warnings, and what is wrong, if anything."""
    summaries = [line.strip("= ") for line in finished.log.splitlines() if "SUMMARY" in line]
    if not summaries:
        reason = outcome(finished).summary if finished.status == FAILED else f"{tool} gave no summary"
        return {"errors": 0, "warnings": 0, "fault": reason}
    counts = {"error": 0, "warning": 0} | {kind: int(count) for count, kind in _COUNTS.findall(summaries[-1])}
    failed = counts["error"] or finished.returncode not in (0, _FOUND)
    fault = summaries[-1] if counts["error"] else f"exit status {finished.returncode}: {last_line(finished.log)}"
    return {"errors": counts["error"], "warnings": counts["warning"], "fault": fault if failed else None}
