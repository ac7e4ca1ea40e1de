"""What programs share that a Runner runs: their options, and the journal that they keep of what they do."""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.gpu_check.runner import SKIPS, settled
from benchmarks.report import journal

_UNSOUND = ("CUDA error", "CUDA driver error")  # after these a process can do nothing more
_KERNELS = Path(__file__).parents[2] / "tokenfusion" / "kernels"
_CUDA = Path(__file__).parents[2] / "csrc" / "cuda"


class Skipped(Exception):
    """There is nothing to check; the message says why."""


def is_unsound(fault: str | None) -> bool:
    return any(words in (fault or "") for words in _UNSOUND)


def gpu_kernels() -> list[tuple[str, str]]:
    """(folder in tokenfusion/kernels, backend) of all GPU kernels; those of CUDA C++, whose author had no compiler's
    help with memory and waiting, come first. By their sources: it needs no torch."""
    folders = sorted(path.name for path in _KERNELS.iterdir() if path.is_dir())
    cuda = [(name, "cuda") for name in folders if (_CUDA / f"{name}.cpp").exists()]
    return cuda + [(name, "triton") for name in folders if any((_KERNELS / name).rglob("triton_host.py"))]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", type=_kernel, metavar="OPERATOR,BACKEND", help="this one alone")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="keep each check as it ends; leave out those kept")
    parser.add_argument("--piece", default="", help="under this name")


def is_chosen(args: argparse.Namespace, operator: str, backend: str) -> bool:
    """Whether --kernel names it: the operators of a folder begin with the folder's name."""
    return args.kernel is None or (operator.startswith(args.kernel[0]) and backend == args.kernel[1])


def run(args: argparse.Namespace, checks: Mapping[str, Callable[[int], str]]) -> int:
    """Every check, each told how many are left, itself included; prints a line for each.

    Returns the exit status: 1 where a check failed or none ran. A check that leaves CUDA unusable is the last one.
    """
    known = settled(args.journal, args.piece) if args.journal else []
    left = [name for name in checks if name not in known]
    _note(args, to_do=left)
    ran = failed = 0
    for i, name in enumerate(left):
        start, fault, words = time.monotonic(), None, ""
        _note(args, case=name, state="started")
        try:
            words = checks[name](len(left) - i)
            ran += 1
        except Skipped as reason:
            fault = f"{SKIPS}{reason}"
        except Exception as error:  # noqa: BLE001  (one that fails leaves the others to be checked)
            fault = f"{type(error).__name__}: {error}"
            failed += 1
        seconds = round(time.monotonic() - start, 2)
        _note(args, case=name, state="ended", fault=fault, rows=[], seconds=seconds, words=words)
        print(f"{name}: {fault or words}", flush=True)
        if is_unsound(fault):
            print("the rest is for a fresh process")
            break
    print(f"{ran} ran, {failed} failed, {len(left) - ran - failed} did not run")
    return 1 if failed or not ran else 0


def _note(args: argparse.Namespace, **entry) -> None:
    if args.journal:
        journal.note(args.journal, piece=args.piece, **entry)


def _kernel(text: str) -> tuple[str, str]:
    operator, _, backend = text.partition(",")
    if (operator, backend) not in gpu_kernels():
        known = " ".join(map(",".join, gpu_kernels()))
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {known}")
    return operator, backend
