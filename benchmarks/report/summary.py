"""What a record comes to: for each variant of this package in each group, how much faster, and where not."""

import statistics
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from benchmarks.report import table

_NAME_WIDTH, _WIDTH = 29, 21


@dataclass(frozen=True)
class Spread:
    """Ratios over the cases of a group, above 1 where this package is faster."""

    ratios: tuple[float, ...]

    def __str__(self) -> str:
        if not self.ratios:
            return "-"
        median = table.times(statistics.median(self.ratios))
        lowest, highest = table.times(min(self.ratios)), table.times(max(self.ratios))
        return median if lowest == highest else f"{median} ({lowest} to {highest})"


@dataclass(frozen=True)
class Headline:
    """One variant of this package in one group."""

    group: str
    variant: str
    cases: int
    eager: Spread
    compiled: Spread
    memory: Spread


def headlines(rows: list[dict]) -> list[Headline]:
    return [
        Headline(
            group,
            variant,
            len(members),
            _spread(members, lambda row: row["times_eager"]),
            _spread(members, lambda row: row["times_compiled"]),
            _spread(members, lambda row, cases=cases: _times_less_memory(row, cases)),
        )
        for group, cases in table.groups(rows)
        for variant, members in _of_package(cases).items()
    ]


def text(rows: list[dict]) -> str:
    """The headlines as a table for a terminal."""
    lines = [_line("", "cases", "x eager", "x compile", "x less memory")]
    for group, of_group in groupby(headlines(rows), key=lambda found: found.group):
        lines.append(textwrap.fill(group, table.COLUMNS, break_on_hyphens=False))
        for found in of_group:
            spreads = found.eager, found.compiled, found.memory
            lines.append(_line(found.variant, str(found.cases), *map(_compact, spreads)))
    return "\n".join(lines)


def _compact(spread: Spread) -> str:
    return str(spread).replace("x to ", " to ").replace("x)", ")")


def _line(name: str, cases: str, *spreads: str) -> str:
    return f"  {table.cut(name, _NAME_WIDTH - 1):<{_NAME_WIDTH}}{cases:>5}" + "".join(
        f"{spread:>{_WIDTH}}" for spread in spreads
    )


def losing(rows: list[dict]) -> list[dict]:
    """Rows of this package that are slower than eager or than torch.compile, the slowest first."""
    kernels = [row for _, cases in table.groups(rows) for members in _of_package(cases).values() for row in members]
    return sorted((row for row in kernels if loses(row)), key=_worst)


def loses(row: dict) -> bool:
    return _worst(row) < 1


def _worst(row: dict) -> float:
    return min([ratio for ratio in (row["times_eager"], row["times_compiled"]) if ratio is not None], default=1.0)


def _of_package(cases: list[tuple[dict, list[dict]]]) -> dict[str, list[dict]]:
    """Variant -> rows. The reference, which is plain PyTorch, counts only where no kernel was measured."""
    rows = [row for _, members in cases for row in members if row["backend"] and not row["fault"]]
    kernels = [row for row in rows if row["backend"] != "reference"]
    found: dict[str, list[dict]] = {}
    for row in kernels or rows:
        found.setdefault(row["variant"], []).append(row)
    return found


def _spread(rows: list[dict], ratio: Callable[[dict], float | None]) -> Spread:
    return Spread(tuple(value for value in map(ratio, rows) if value is not None))


def _times_less_memory(row: dict, cases: list[tuple[dict, list[dict]]]) -> float | None:
    """Eager's peak memory by this row's."""
    members = next(members for case, members in cases if case == row["case"])
    eager = next((other["peak_bytes"] for other in members if other["variant"] == table.EAGER), None)
    return eager / row["peak_bytes"] if eager and row["peak_bytes"] else None
