"""Stands for every program that a check starts: what `fake_run` puts in their place. It needs no torch.

It appends what it does to the file `done` in the folder FAKE. A file FAKE/NAME.fault says "PIECE ACTION": once, in the
last check of a piece or step that begins so, it kills itself ("killed"), kills the check that started it, or hangs.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.gpu_check.runner import settled
from benchmarks.report import journal

FAKE = Path(os.environ["FAKE"])
CASES = 4
DEVICE = {
    "kind": "cuda",
    "name": "Some GPU",
    "driver": "1.2",
    "capability": "9.0",
    "cpu": "",
    "cores": 4,
    "threads": 4,
}


def main(arguments: list[str]) -> None:
    if "--journal" in arguments:
        return run_piece(arguments)
    if "setup.py" in arguments:
        may_go_wrong("build")
        return (FAKE / "built").touch()
    module = arguments[1]
    may_go_wrong(module.rpartition(".")[2])
    if module == "benchmarks.measure.environment":
        print("a warning that stands above it")
        print(json.dumps(conditions()))
    elif module == "benchmarks.measure.roofline":
        print(json.dumps({"copy, bytes/s read and written": 3e12}))
    elif module == "benchmarks.report":
        Path(arguments[arguments.index("--page") + 1]).write_text("a page")
    done(module)


def conditions() -> dict:
    found = {"date": os.environ.get("FAKE_DATE", "2026-11-27T23:00:00+00:00"), "profile": "none", "device": DEVICE}
    found |= {"versions": {"torch": "2.11"}, "isa": None, "commit": os.environ.get("TOKENFUSION_COMMIT"), "cache": ""}
    return found | {"tools": {"compute-sanitizer": str(FAKE / "compute-sanitizer")}, "missing_packages": []}


def run_piece(arguments: list[str]) -> None:
    path, piece = (arguments[arguments.index(name) + 1] for name in ("--journal", "--piece"))
    names = [f"{piece} {i}" for i in range(2 if "headline" in arguments else CASES)]
    left = [name for name in names if name not in settled(Path(path), piece)]
    journal.note(Path(path), piece=piece, to_do=left)
    for name in left:
        journal.note(Path(path), piece=piece, case=name, state="started")
        print(f"running {name}")
        if name == left[-1]:
            may_go_wrong("headline" if "headline" in arguments and piece == "cases" else piece)
        row = {"group": "an operator, the op", "case": {"B": 1, "dtype": "float32"}, "variant": name}
        journal.note(Path(path), piece=piece, case=name, state="ended", fault=None, rows=[row], seconds=0.1)
        done(name)


def may_go_wrong(piece: str) -> None:
    for fault in FAKE.glob("*.fault"):
        where, _, action = fault.read_text().rpartition(" ")
        if piece.startswith(where) and is_mine(fault):
            if action != "hangs":
                os.kill(os.getpid() if action == "killed" else os.getppid(), signal.SIGKILL)
            time.sleep(1000)


def is_mine(fault: Path) -> bool:
    """Of several that run at once the first."""
    try:
        fault.rename(fault.with_suffix(".taken"))
    except FileNotFoundError:
        return False
    return True


def done(what: str) -> None:
    with (FAKE / "done").open("a") as file:
        file.write(f"{what}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
