"""The rows of a record as a table: one line for each variant of a case."""

import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby

EAGER = "eager"
COMPILED = "torch.compile"
AUTOTUNED = "torch.compile, max-autotune"
AND_COMPILE = " + compile"
PROJECTIONS = "projections + SDPA"
FLEX = "flex_attention, compiled"
PADDED = "padded, by lengths"
PADDING_READ = "padded, all read"
CHECKPOINTED = "torch checkpoint"
EPILOGUE = "cuBLASLt epilogue"
FAILED = "FAILED"
GPU_BACKENDS = ("triton", "cuda")

HEADINGS = ("variant", "median", "x eager", "x compile", "peak MB", "GB/s", "% ceiling", "parity")
COLUMNS = 100
_USUAL = ("float32", "forward")
_WIDTHS = (32, 8, 8, 10, 8, 7, 10)


def groups(rows: list[dict]) -> Iterator[tuple[str, list[tuple[dict, list[dict]]]]]:
    """(group, [(case, its rows)]), in the order of the record."""
    for group, members in groupby(rows, key=lambda row: row["group"]):
        yield group, [(case, list(of_case)) for case, of_case in groupby(members, key=lambda row: row["case"])]


def by_size(cases: list[tuple[dict, list[dict]]]) -> list[tuple[dict, list[dict]]]:
    """Cases of a group sorted by their words, then by their sizes; the record has the important ones first."""

    def key(case: dict) -> tuple[list[str], list[int]]:
        values = case.values()
        return [value for value in values if isinstance(value, str)], [v for v in values if not isinstance(v, str)]

    return sorted(cases, key=lambda of_case: key(of_case[0]))


def case_name(case: dict) -> str:
    """Sizes with their letters, words alone: "B 64, N 401, C 384, heads 6, float32, forward"."""
    return ", ".join(f"{name} {value}" if isinstance(value, int) else value for name, value in case.items())


def short_name(row: dict) -> str:
    """A case in few letters, whatever its group: "CrossAttentionBlock B64 N401 C384 heads6"."""
    sizes = [f"{name}{value}" for name, value in row["case"].items() if isinstance(value, int) and value]
    words = [value.replace(" ", "") for value in row["case"].values() if isinstance(value, str)]
    name = () if "model" in row["case"] else (row["group"].split(",")[0],)  # a model is named in the case
    return " ".join((*name, *(word for word in words if word not in _USUAL), *sizes))


def cells(row: dict) -> tuple[str, ...]:
    """What the table shows of a row, in the order of HEADINGS."""
    peak = megabytes(row["peak_bytes"])
    if row["fault"]:
        return row["variant"], "-", "-", "-", peak, "-", "-", f"{FAILED}: {row['fault']}"
    return (
        row["variant"],
        duration(row["seconds"]),
        times(row["times_eager"]),
        times(row["times_compiled"]),
        peak,
        _number(row["bytes_per_second"] / 1e9),
        f"{row['share_of_ceiling']:.0%}",
        "-" if row["error"] is None else f"{row['error']:.0e} of {row['allowed_error']:.0e}",
    )


# Times beside the median, by the word that their keys in a row begin with.
OTHER_TIMES = {"called": "from Python", "kept": "memory kept"}


def other_times(rows: Iterable[dict]) -> list[str]:
    """Which of OTHER_TIMES there are."""
    rows = list(rows)
    return [kind for kind in OTHER_TIMES if any(f"{kind}_seconds" in row for row in rows)]


def other_headings(kind: str) -> tuple[str, ...]:
    return OTHER_TIMES[kind], "x eager", "x compile"


def other_cells(row: dict, kind: str) -> tuple[str, ...]:
    """The cells of another time, in the order of its headings."""
    if row["fault"] or f"{kind}_seconds" not in row:
        return ("-",) * len(other_headings(kind))
    return duration(row[f"{kind}_seconds"]), times(row[f"{kind}_times_eager"]), times(row[f"{kind}_times_compiled"])


def megabytes(count: int | None) -> str:
    return "-" if count is None else _number(count / 1e6)


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def head(group: str) -> str:
    """What stands above the lines of a group, for a terminal."""
    return f"{textwrap.fill(group, COLUMNS, break_on_hyphens=False)}\n{_line(HEADINGS)}"


def line(row: dict) -> str:
    return _line(cells(row))


def other_lines(row: dict) -> list[str]:
    """What stands below the line of a row: its other times."""
    kinds = [] if row["fault"] else other_times([row])
    return [_line((f"  {OTHER_TIMES[kind]}", *other_cells(row, kind), *[""] * 4)) for kind in kinds]


def _line(cells: tuple[str, ...]) -> str:
    if cells[-1].startswith(FAILED):
        return cut(f"  {cells[0]:<{_WIDTHS[0]}} {cells[-1]}", COLUMNS)
    name, *numbers = cells[: len(_WIDTHS)]
    aligned = "".join(f"{number:>{width}}" for number, width in zip(numbers, _WIDTHS[1:], strict=True))
    return f"  {cut(name, _WIDTHS[0]):<{_WIDTHS[0]}}{aligned} {cells[-1]:>14}".rstrip()


def cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: columns - 1] + "…"


def _number(value: float) -> str:
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
