"""python -m benchmarks.gpu_model [KERNEL ...]: how fast the GPU kernels can be, predicted on a CPU.

Each call is made with its real host; its kernels are compiled for sm_80 and sm_90, some of their blocks run in the
interpreter of PTX, and what they issue and move is set against what an A100, an H100 and an H200 can do. KERNEL is a
word or several of a call's name, such as tied_ffn or "triton backward". Nobody has held the results against a GPU where
no record of one stands beside them.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.gpu_model import budgets, counting, facts, show
from benchmarks.gpu_model.cases import CASES, SMALL_CASES
from benchmarks.gpu_model.devices import DEVICES, Device
from benchmarks.gpu_model.facts import Call
from benchmarks.gpu_model.measured import beside, records
from tests.ptx.worker import Worker


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kernel", nargs="*", metavar="KERNEL", help="calls that have all words of one of these")
    parser.add_argument("--device", action="append", choices=DEVICES, help="more than once, or all (default)")
    parser.add_argument("--kept", action="store_true", help=f"predict from {facts.KEPT.name}, and run nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and predictions")
    parser.add_argument("--list", action="store_true", help="print the names of the calls")
    parser.add_argument("--budgets", type=Path, metavar="FILE", help="write what tests hold the kernels to")
    parser.add_argument("--update", type=Path, metavar="FILE", help="make the marked tables of this file anew")
    args = parser.parse_args(arguments)
    if args.update:
        args.update.write_text(show.updated(args.update.read_text(encoding="utf-8")), encoding="utf-8")
        return
    devices = [DEVICES[name] for name in args.device or DEVICES]
    if args.list:
        print("\n".join(_meant(CASES, args.kernel)))
    elif args.budgets:
        budgets.save(args.budgets, _counted(_meant(SMALL_CASES, args.kernel), [budgets.CAPABILITY]))
    else:
        _predict(args, devices)


def _predict(args: argparse.Namespace, devices: list[Device]) -> None:
    capabilities = sorted({device.capability for device in devices})
    counted = _kept(args.kernel) if args.kept else _counted(_meant(CASES, args.kernel), capabilities)
    found, calls = records(), []
    for call, versions in counted:
        calls.append(call)
        print(show.text(call, devices, beside(call, calls, found)), flush=True)
        if args.json:
            facts.save(args.json, calls, versions)


def _kept(words: list[str]) -> Iterator[tuple[Call, dict[str, str]]]:
    calls, versions = facts.load()
    return ((call, versions) for call in calls if _meant([call], words))


def _counted(names: list[str], capabilities: list[int]) -> Iterator[tuple[Call, dict[str, str]]]:
    with tempfile.TemporaryDirectory() as cache, Worker(Path(cache)) as worker:
        versions = counting.versions(worker)
        for name in names:
            start = time.monotonic()
            yield counting.count(worker, name, capabilities), versions
            print(f"{name}: counted in {time.monotonic() - start:.0f} s", file=sys.stderr)


def _meant(calls: Iterable, words: list[str]) -> list[str]:
    """The names that have all words of one of these; all where none is given."""
    names = map(str, calls)
    return [name for name in names if not words or any(all(w in name for w in each.split()) for each in words)]


if __name__ == "__main__":
    main()
