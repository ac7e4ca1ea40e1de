"""python -m benchmarks.gpu_check: build, proof, headline rows, parity, memory and race checks, benchmarks; one record.

Needs no network and installs nothing: it uses the Python environment that it is started with. Each step has a time
limit; one that fails is recorded, and the rest goes on. A run that ends early, killed or not, is continued with
--resume. Beside the record NAME.json stand NAME.journal, from which it is continued, NAME.log, NAME.tuning.json and
NAME.html, a page; all but the page grow as the run goes on.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from benchmarks.gpu_check import process
from benchmarks.gpu_check.outcome import NOT_REACHED, RUNNING, SKIPPED, Check, Outcome
from benchmarks.gpu_check.process import FAILED, PASSED
from benchmarks.gpu_check.steps import ROOT, STEPS, Step
from benchmarks.report import record

_FINAL = (PASSED, FAILED)  # what --resume does not repeat
_ALWAYS = ("environment", "report")
_LEAST_SECONDS = 5
_SECONDS_OF_REPORT = 20  # kept back
_WIDTH = 12
_PROFILES = ("smoke", "quick", "full", "gpu", "gpu-full")
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
    signal.signal(signal.SIGTERM, _end)
    if args.commit:
        os.environ["TOKENFUSION_COMMIT"] = args.commit
    end = time.monotonic() + 60 * args.minutes
    chosen = [step for step in STEPS if args.steps is None or step.name in (*args.steps, *_ALWAYS)]
    check = Check(_empty(), Path(), args.profile or "gpu", args.case_seconds)
    first = _run_step(chosen[0], check, _seconds(chosen, end))
    if args.profile is None and not check.has_gpu:
        check.profile = check.conditions["profile"] = "smoke"
    check.path = _path(args, check)
    _continue(check, resume=args.resume is not None)
    _note(check, chosen[0], first)
    run_steps(chosen[1:], check, end, repeat=args.steps is not None)
    print(f"\n{check.record['steps']['report']['log']}\n\n{table(check.record)}\n\nrecord: {check.path}")
    return 0


def run_steps(steps: list[Step], check: Check, end: float, repeat: bool) -> None:
    """Every step, one after the other, until `end`; those with a result only where `repeat` says so."""
    to_do = [step for step in steps if repeat or _is_to_do(step, check)]
    for i, step in enumerate(to_do):
        seconds = _seconds(to_do[i:], end)
        if seconds < _LEAST_SECONDS and step.name in check.record["steps"]:
            continue  # it has a part of its result
        _note(check, step, Outcome(RUNNING, "when the run was killed, unless it goes on"), quietly=True)
        _note(check, step, _run_step(step, check, seconds))


def _is_to_do(step: Step, check: Check) -> bool:
    before = check.record["steps"].get(step.name, {}).get("status")
    return step.name in _ALWAYS or before not in _FINAL or step.is_stale(check)


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
    add = parser.add_argument
    add("--out", type=Path, help="the record, or the folder that it goes to (benchmarks/records/)")
    add("--minutes", type=float, default=30, help="for all steps together (default: 30)")
    add("--steps", type=known, help=f"these alone, comma-separated: {','.join(names)}")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="FROM",
        help="add to the record what it lacks; FROM: the folder to which an earlier run wrote it, if that is another",
    )
    add("--profile", choices=_PROFILES, help="which cases are measured after the headline's")
    add("--case-seconds", type=float, default=240, help="for one case (default: 240)")
    add("--commit", help="the commit of a copy without git")
    return parser.parse_args(arguments)


def _end(*_) -> None:
    process.ending.set()
    raise SystemExit(128 + signal.SIGTERM)


def _empty() -> dict:
    return {"conditions": _UNKNOWN, "steps": {}, "ceilings": {}, "cases": {}, "rows": []}


def _path(args: argparse.Namespace, check: Check) -> Path:
    """Where the record is, or will be; what an earlier run wrote to another folder is brought there.

    Raises:
        Refused: that folder has no record of this machine and commit.
    """
    out = (args.out or (record.RECORDS if check.has_gpu else record.RESULTS)).absolute()
    if args.resume:
        found = _newest(Path(args.resume), check)
        if found is None:
            raise Refused(f"{args.resume} has no record of {_identity(check.conditions)}")
        path = out if out.suffix == ".json" else out / found.name
        path.parent.mkdir(parents=True, exist_ok=True)
        for beside in found.parent.glob(f"{found.stem}.*"):
            target = path.parent / (path.stem + beside.name.removeprefix(found.stem))
            if not target.exists():
                shutil.copyfile(beside, target)
        return path
    if out.suffix == ".json":
        return out
    device, date = check.conditions["device"]["name"], time.strftime("%Y-%m-%d", time.gmtime())
    earlier = None if args.resume is None else _newest(out, check)
    return earlier or out / f"{record.file_name(device)}-{date}.json"


def _newest(folder: Path, check: Check) -> Path | None:
    """The newest record in a folder that is of this check, of this machine and commit, whatever its date."""
    loaded = {path: record.load(path) for path in folder.absolute().glob("*.json")}
    fitting = [
        path
        for path, content in loaded.items()
        if "steps" in content and _identity(content["conditions"]) == _identity(check.conditions)
    ]
    return max(fitting, key=lambda path: loaded[path]["conditions"]["date"], default=None)


def _identity(conditions: dict) -> dict[str, str]:
    return {"device": conditions["device"]["name"], "commit": conditions["commit"]}


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
    found, here = _identity(before["conditions"]), _identity(check.conditions)
    for name in found:
        if found[name] != here[name]:
            raise Refused(
                f"{check.path}: its {name} is {found[name]}, and here it is {here[name]}: "
                "--out FILE.json takes another place"
            )
    check.record = _empty() | before | {"conditions": check.conditions}


def _seconds(steps: list[Step], end: float) -> float:
    """What the first of these steps may take."""
    step, left = steps[0], end - time.monotonic()
    if step.name in _ALWAYS:
        return step.most
    left -= _SECONDS_OF_REPORT
    return min(step.most, left) if not step.share else left * step.share / sum(each.share for each in steps)


def _run_step(step: Step, check: Check, seconds: float) -> Outcome:
    if step.needs_gpu and not check.has_gpu:
        return Outcome(SKIPPED, check.why_no_gpu)
    if seconds < _LEAST_SECONDS:
        return Outcome(NOT_REACHED, "no time was left")
    print(f"{step.name} (up to {seconds:.0f} s) ...", flush=True)
    try:
        return step.run(check, seconds)
    except Exception as error:  # noqa: BLE001  (a step that fails leaves the rest to be done)
        return Outcome(FAILED, f"{type(error).__name__}: {error}")


def _note(check: Check, step: Step, result: Outcome, quietly: bool = False) -> None:
    if not quietly:
        print(f"{step.name}: {result.status}, {result.seconds:.1f} s: {result.summary}", flush=True)
    kept = {"status": result.status, "summary": result.summary, "seconds": round(result.seconds, 1)}
    check.record["steps"][step.name] = kept | {"log": result.log} | result.facts
    check.save()


if __name__ == "__main__":
    sys.exit(main())
