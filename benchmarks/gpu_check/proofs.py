"""The calls of `tokenfusion tune`, one by one, so that a kernel that hangs or crashes leaves the other results.

python -m benchmarks.gpu_check.proofs verify: each GPU kernel on each call, as `tokenfusion verify` proves it.
python -m benchmarks.gpu_check.proofs tune --table FILE: each call by all that can run it, into that file.

A kernel that hung or crashed is left out of the calls that are like the one that showed it.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_check import program
from benchmarks.gpu_check.runner import CRASHED, HUNG
from benchmarks.report import journal
from benchmarks.report.table import GPU_BACKENDS
from tokenfusion.cli import workloads
from tokenfusion.kernels.choices import Workload
from tokenfusion.kernels.dispatch import OPERATORS, Implementation
from tokenfusion.tuning import machine, proof, search
from tokenfusion.tuning.shipped import WORKLOADS

_VERIFY, _TUNE = "verify", "tune"


class Proof(NamedTuple):
    workload: Workload
    implementation: Implementation

    @property
    def name(self) -> str:
        return f"{_name(self.workload)}, {self.implementation.name}"

    @property
    def like(self) -> tuple[str, ...]:
        """What a hang is taken to be of."""
        return self.workload.operator, *self.workload.kind[:2], self.implementation.name


def proofs() -> list[Proof]:
    """Riskiest first: backward passes, tensor cores, then the sizes from small to large."""
    found = [
        Proof(workload, implementation)
        for workload in WORKLOADS
        for implementation in OPERATORS[workload.operator].implementations
        if implementation.backend in GPU_BACKENDS
    ]
    return sorted(found, key=lambda each: _risk(each.workload))


def _risk(workload: Workload) -> tuple[bool, bool, int]:
    dtype, direction, *_ = workload.kind
    return direction != "training", dtype == "float32", math.prod(workload.sizes)


def _name(workload: Workload) -> str:
    return ": ".join(workloads.name(workload))


def _verify(each: Proof, stuck: dict[tuple[str, ...], str], left: int) -> str:
    _skip_if_stuck({each.like}, stuck)
    operator = OPERATORS[each.workload.operator]
    call = proof.call_of(operator, each.workload, machine.device())
    reason = each.implementation.can_run(*call.selecting)
    if reason is not None:
        raise program.Skipped(reason)
    wrong = proof.why_wrong(call, each.implementation, operator.implementations[-1])
    if wrong is not None:
        raise AssertionError(wrong)
    return "right"


def _tune(workload: Workload, table: Path, stuck: dict[tuple[str, ...], str], left: int) -> str:
    _skip_if_stuck({Proof(workload, each).like for each in OPERATORS[workload.operator].implementations}, stuck)
    (finding,) = search.tune(workloads=[workload], path=table).findings
    if finding.wrong:
        raise AssertionError("; ".join(f"{name}: {reason}" for name, reason in finding.wrong.items()))
    return f"{finding.choice}, {finding.gain:.2f}x of {finding.built_in}" if finding.gain else str(finding.choice)


def _skip_if_stuck(kinds: set[tuple[str, ...]], stuck: dict[tuple[str, ...], str]) -> None:
    found = [stuck[kind] for kind in kinds if kind in stuck]
    if found:
        raise program.Skipped(f"like a call that got stuck, {found[0]}")


def _stuck(path: Path | None) -> dict[tuple[str, ...], str]:
    """What hung or crashed in any piece of a journal, and the call that showed it."""
    verdicts = (HUNG, CRASHED)
    entries = journal.read(path) if path else []
    names = {entry["case"] for entry in entries if entry.get("verdict") in verdicts}
    return {each.like: each.name for each in proofs() if each.name in names}


def _checks(args: argparse.Namespace) -> dict[str, Callable[[int], str]]:
    stuck = _stuck(args.journal)
    if args.what == _TUNE:
        return {_name(workload): partial(_tune, workload, args.table, stuck) for workload in WORKLOADS}
    return {
        each.name: partial(_verify, each, stuck)
        for each in proofs()
        if program.is_chosen(args, each.workload.operator, each.implementation.backend)
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.proofs")
    parser.add_argument("what", choices=(_VERIFY, _TUNE))
    parser.add_argument("--table", type=Path, metavar="FILE", help="where what is measured goes")
    program.add_options(parser)
    args = parser.parse_args(arguments)
    if args.what == _TUNE and args.table is None:
        parser.error("tune: --table FILE is missing")
    return program.run(args, _checks(args))


if __name__ == "__main__":
    raise SystemExit(main())
