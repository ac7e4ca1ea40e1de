"""What serves a call of an operator best on this machine, where somebody measured it: see tokenfusion.tuning.

Calls that differ in what a table cannot interpolate are of different kinds. Among those of one kind the entry whose
sizes are nearest decides, if none of them is further than a factor away; else the built-in order does.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

_FURTHEST = 4  # times as large, or as small, in any size
_MOST_KEPT = 1 << 12  # looked up, of each table

_log = logging.getLogger("tokenfusion")


class Workload(NamedTuple):
    """The calls of an operator that take the same time: kind is a dtype, "inference" or "training", and words of the
    operator's own; sizes are numbers of at least 1."""

    operator: str
    kind: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Workloads:
    """How an operator's calls are told apart. names are those of the sizes.

    of takes what its implementations' can_run takes, and gives kind and sizes, the dtype and the direction being added
    to the kind; example makes, of words, sizes and a maker of tensors, a call of the kind as `Implementation.run` takes
    it, of which can_run takes the first `selecting`, or all.
    """

    names: tuple[str, ...]
    selecting: int | None
    of: Callable[..., tuple[tuple[str, ...], tuple[int, ...]]]
    example: Callable[..., tuple[Any, ...]]


class Table:
    """Choices by workload. A choice is the name of an implementation.

    refused are (operator, implementation) that were wrong for some workload, and so are trusted with none.
    """

    def __init__(self, choices: Mapping[Workload, str], refused: frozenset[tuple[str, str]] = frozenset()):
        self.choices, self.refused = dict(choices), refused
        self._nearest: dict[Workload, str | None] = {}

    def choice(self, workload: Workload) -> str | None:
        """None outside of what was measured, and for sizes that may be any, of which symbolic shapes are made."""
        try:
            return self._nearest[workload]
        except KeyError:
            if len(self._nearest) >= _MOST_KEPT:
                self._nearest.clear()
            return self._nearest.setdefault(workload, self._find(workload))
        except TypeError:
            return None

    def _find(self, workload: Workload) -> str | None:
        found = [
            (distance, choice)
            for known, choice in self.choices.items()
            if _comparable(known, workload) and (distance := _distance(known.sizes, workload.sizes)) is not None
        ]
        return min(found)[1] if found else None


def _comparable(known: Workload, workload: Workload) -> bool:
    return known[:2] == workload[:2] and len(known.sizes) == len(workload.sizes)


def _distance(sizes: tuple[int, ...], others: tuple[int, ...]) -> float | None:
    steps = [abs(math.log(max(a, 1) / max(b, 1))) for a, b in zip(sizes, others, strict=True)]
    return None if max(steps) > math.log(_FURTHEST) else sum(steps)


_in_force: Table | None = None  # not read yet


def in_force() -> Table:
    """The table that "auto" follows, read once in a process."""
    global _in_force
    if _in_force is None:
        from tokenfusion.tuning import files

        loaded = files.loaded()
        _in_force = loaded.table
        for reason in loaded.ignored:
            _log.warning("a file of `tokenfusion tune` is ignored: %s", reason)
        if loaded.remark is not None:
            _log.warning("%s: %s; `tokenfusion tune` measures again", loaded.path, loaded.remark)
    return _in_force


@contextlib.contextmanager
def using(table: Table) -> Iterator[None]:
    """Follows another table in a with-block. Code compiled before keeps to the one that was in force then."""
    global _in_force
    previous, _in_force = _in_force, table
    try:
        yield
    finally:
        _in_force = previous


@torch.compiler.assume_constant_result
def constant_choice(operator: str, kind: tuple[str, ...], sizes: tuple[int, ...]) -> str | None:
    """`in_force().choice`, while torch.compile traces."""
    return in_force().choice(Workload(operator, kind, sizes))


@torch.compiler.assume_constant_result
def is_empty() -> bool:
    return not (in_force().choices or in_force().refused)


@torch.compiler.assume_constant_result
def is_refused(operator: str, implementation: str) -> bool:
    return (operator, implementation) in in_force().refused
