"""python -m benchmarks.packaged_table FILE...: the table that comes with the package for this kind of device, made of
what several runs of `tokenfusion tune` have found on this machine.

A choice is what gains the most in the run in which it gains the least, and at least 3 % there; else it is what is built
in, which keeps a neighbour's choice from such a call.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from tokenfusion.tuning import files, machine

_ENOUGH = 1.03


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packaged_table", description=__doc__.split(":")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="FILE", help="what a run of `tokenfusion tune` wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table (that of this device in the package)")
    args = parser.parse_args(arguments)
    entries = joined([files.read(path) for path in args.runs])
    out = args.out or Path(files.__file__).parent / "defaults" / f"{machine.name()}.json"
    files.write(out, entries)
    gains = sum(entry["choice"] != entry["built_in"] for entry in entries)
    print(f"{out}: {len(entries)} choices, of which {gains} are not what is built in")


def joined(runs: Sequence[Sequence[dict]]) -> list[dict]:
    """The entries of what all runs have measured.

    Raises:
        ValueError: a kernel was wrong in one of them.
    """
    by_workload = [{files.workload_of(entry): entry for entry in run if entry["choice"] is not None} for run in runs]
    for run in runs:
        for entry in run:
            if entry["wrong"]:
                raise ValueError(f"{entry['operator']}, {entry['kind']}, {entry['sizes']}: {entry['wrong']}")
    in_all = [workload for workload in by_workload[0] if all(workload in run for run in by_workload)]
    return [_joined([run[workload] for run in by_workload]) for workload in in_all]


def _joined(entries: Sequence[dict]) -> dict:
    times, built_in = [entry["seconds"] for entry in entries], entries[0]["built_in"]
    names = [name for name in times[0] if all(name in seconds for seconds in times)]
    gains = {name: min(seconds[built_in] / seconds[name] for seconds in times) for name in names}
    best = max(gains, key=gains.get)
    medians = {name: statistics.median(seconds[name] for seconds in times) for name in names}
    return entries[0] | {"choice": best if gains[best] >= _ENOUGH else built_in, "seconds": medians}


if __name__ == "__main__":
    main()
