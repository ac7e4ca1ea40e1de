"""python -m benchmarks.gpu_check: build, parity, memory and race checks, benchmarks; one record.

Needs no network and installs nothing: it uses the Python environment that it is started with. Each step has a time
limit; one that fails is recorded, and the rest goes on. A run that ends early is continued with --resume.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu_check.process import FAILED, PASSED
from benchmarks.gpu_check.steps import NOT_REACHED, ROOT, SKIPPED, STEPS, Check, Outcome, Step
from benchmarks.report import record

_FINAL = (PASSED, FAILED)  # what --resume does not repeat
_ALWAYS = ("environment", "report")
_LEAST_SECONDS = 5
_SECONDS_OF_ALWAYS = 60  # at least
_WIDTH = 12
_UNKNOWN = {
    "date": "",
    "profile": "",
    "device": {"kind": "unknown", "name": "unknown", "driver": None, "cpu": "", "cores": None, "threads": None},
    "versions": {},
    "isa": None,
    "commit": None,
    "cache": "",
    "tools": {},
}


class Refused(SystemExit):
    """What was asked for would spoil a record."""


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    os.chdir(ROOT)
    if args.commit:
        os.environ["TOKENFUSION_COMMIT"] = args.commit
    end = time.monotonic() + 60 * args.minutes
    chosen = [step for step in STEPS if args.steps is None or step.name in (*args.steps, *_ALWAYS)]
    check = Check(_empty(), Path(), args.profile or "gpu", args.case_seconds, save=lambda: None)
    first = _run_step(chosen[0], check, _seconds(chosen, end))
    if args.profile is None and not check.has_gpu:
        check.profile = check.conditions["profile"] = "smoke"
    check.path = _path(args.out, check)
    _continue(check, resume=args.resume)
    check.save = lambda: record.save(check.path, check.record)
    _note(check, chosen[0], first)
    run_steps(chosen[1:], check, end, repeat=args.steps is not None)
    print(f"\n{check.record['steps']['report']['log']}\n\n{table(check.record)}\n\nrecord: {check.path}")
    return 0


def run_steps(steps: list[Step], check: Check, end: float, repeat: bool) -> None:
    """Every step, one after the other, until `end`; those with a result only where `repeat` says so."""
    for i, step in enumerate(steps):
        before = check.record["steps"].get(step.name, {}).get("status")
        if before in _FINAL and not repeat and step.name not in _ALWAYS:
            continue
        _note(check, step, _run_step(step, check, _seconds(steps[i:], end)))


def table(content: dict) -> str:
    """Step by step what came of it, for a person."""
    lines = [f"{'step':<{_WIDTH}} {'':<{_WIDTH}} {'seconds':>8}"]
    for name, step in content["steps"].items():
        lines.append(f"{name:<{_WIDTH}} {step['status']:<{_WIDTH}} {step['seconds']:>8.1f}  {step['summary']}")
    return "\n".join(lines)


def _parse(arguments: list[str] | None):
    names = [step.name for step in STEPS]

    def known(text: str) -> list[str]:
        chosen = text.split(",")
        if not set(chosen) <= set(names):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected names among {','.join(names)}")
        return chosen

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the record, or the folder that it goes to (benchmarks/records/)")
    parser.add_argument("--minutes", type=float, default=30, help="for all steps together (default: 30)")
    parser.add_argument("--steps", type=known, help=f"these alone, comma-separated: {','.join(names)}")
    parser.add_argument("--resume", action="store_true", help="add to the record what it lacks")
    parser.add_argument("--profile", choices=("smoke", "quick", "full", "gpu"), help="which cases are measured")
    parser.add_argument("--case-seconds", type=float, default=240, help="for one case (default: 240)")
    parser.add_argument("--commit", help="the commit of a copy without git")
    return parser.parse_args(arguments)


def _empty() -> dict:
    return {"conditions": _UNKNOWN, "steps": {}, "ceilings": {}, "cases": {}, "rows": []}


def _path(out: Path | None, check: Check) -> Path:
    out = out or (record.RECORDS if check.has_gpu else record.RESULTS)
    if out.suffix == ".json":
        return out.absolute()
    device, date = check.conditions["device"]["name"], time.strftime("%Y-%m-%d", time.gmtime())
    return out.absolute() / f"{record.file_name(device)}-{date}.json"


def _continue(check: Check, resume: bool) -> None:
    """Takes up the record that is there.

    Raises:
        Refused: there is one and no --resume, or it is of another machine or commit.
    """
    if not check.path.exists():
        return
    if not resume:
        raise Refused(f"{check.path} is there: --resume adds what it lacks, --out FILE.json takes another place")
    before = record.load(check.path)
    now = check.conditions
    for name, old, new in (
        ("device", before["conditions"]["device"]["name"], now["device"]["name"]),
        ("commit", before["conditions"]["commit"], now["commit"]),
    ):
        if old != new:
            raise Refused(
                f"{check.path}: its {name} is {old}, and here it is {new}: --out FILE.json takes another place"
            )
    check.record = _empty() | before | {"conditions": now}


def _seconds(steps: list[Step], end: float) -> float:
    """What the first of these steps may take."""
    return (end - time.monotonic()) * steps[0].share / sum(step.share for step in steps)


def _run_step(step: Step, check: Check, seconds: float) -> Outcome:
    if step.needs_gpu and not check.has_gpu:
        return Outcome(SKIPPED, check.why_no_gpu)
    if step.name in _ALWAYS:
        seconds = max(seconds, _SECONDS_OF_ALWAYS)
    if seconds < _LEAST_SECONDS:
        return Outcome(NOT_REACHED, "no time was left")
    print(f"{step.name} (up to {seconds:.0f} s) ...", flush=True)
    try:
        return step.run(check, seconds)
    except Exception as error:  # noqa: BLE001  (a step that fails leaves the rest to be done)
        return Outcome(FAILED, f"{type(error).__name__}: {error}")


def _note(check: Check, step: Step, result: Outcome) -> None:
    print(f"{step.name}: {result.status}, {result.seconds:.1f} s: {result.summary}", flush=True)
    kept = {"status": result.status, "summary": result.summary, "seconds": round(result.seconds, 1)}
    check.record["steps"][step.name] = kept | {"log": result.log} | result.facts
    check.save()


if __name__ == "__main__":
    sys.exit(main())
