"""The tables of records in Markdown, for the README and the documentation."""

import math
import re
from pathlib import Path

from benchmarks.report import record, table
from benchmarks.report.table import AND_COMPILE, COMPILED, EAGER, GPU_BACKENDS

_TABLE = re.compile(r"(<!-- table ([^|>]+?) *\| *([^|>]+?) *-->\n)(.*?)(<!-- end -->)", re.DOTALL)
_ROWS = re.compile(r"(<!-- rows (\S+)\n(.*?)-->\n)(.*?)(<!-- end -->)", re.DOTALL)
_COLUMNS = ("eager", "torch.compile", "tokenfusion", "tokenfusion + compile", "peak MB, eager", "peak MB, tokenfusion")


def updated(text: str) -> str:
    """The text with its marked tables made from the records that they name."""

    def table_of(block: re.Match) -> str:
        begin, path, group, _, end = block.groups()
        return f"{begin}\n{_table(group, _cases(path, group))}\n\n{end}"

    def chosen_rows(block: re.Match) -> str:
        begin, path, chosen, _, end = block.groups()
        rows = [_row(path, *re.split(r" *\| *", line)) for line in chosen.strip().splitlines()]
        columns = [column for column in zip(("", *_COLUMNS), *rows, strict=True) if set(column[1:]) != {"-"}]
        head, *rows = (f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True))
        lines = [head, "|:--|" + "--:|" * (len(columns) - 1), *rows]
        return f"{begin}\n{chr(10).join(lines)}\n\n{end}"

    return _ROWS.sub(chosen_rows, _TABLE.sub(table_of, text))


def _cases(path: str, group: str) -> list[tuple[dict, list[dict]]]:
    cases = dict(table.groups(record.load(Path(path))["rows"]))
    if group not in cases:
        raise SystemExit(f"{path}: no group {group!r}, it has {', '.join(map(repr, cases))}")
    return cases[group]


def _row(path: str, label: str, group: str, name: str, other_path: str | None = None) -> tuple[str, ...]:
    """The label and the cells of the case of that name in a group, of another record where one is named."""
    path = other_path or path
    found = {table.case_name(case): {row["variant"]: row for row in members} for case, members in _cases(path, group)}
    if name not in found:
        raise SystemExit(f"{path}, {group}: no case {name!r}, it has {', '.join(map(repr, found))}")
    rows = found[name]
    package = _fastest_of_a_gpu(rows) or next(variant for variant, row in rows.items() if row["backend"])
    variants = rows[EAGER], rows.get(COMPILED), rows[package], rows.get(package + AND_COMPILE)
    return label, *map(_cell, variants), *(table.megabytes(rows[name]["peak_bytes"]) for name in (EAGER, package))


def _fastest_of_a_gpu(rows: dict[str, dict]) -> str | None:
    """Where kernels of Triton and of CUDA C++ stand beside each other."""
    names = [name for backend in GPU_BACKENDS if (name := f"tokenfusion ({backend})") in rows]
    return min(names, key=lambda name: rows[name].get("seconds", math.inf), default=None)


def chosen_rows(path: Path) -> str:
    """The block of all cases of a record that `updated` makes a table of, to be thinned out and given better labels."""
    cases = [(group, *each) for group, of_group in table.groups(record.load(path)["rows"]) for each in of_group]
    lines = [f"{table.short_name(rows[0])} | {group} | {table.case_name(case)}" for group, case, rows in cases]
    return "\n".join((f"<!-- rows {path}", *lines, "-->", "<!-- end -->"))


def tables(loaded: dict) -> str:
    """A table for each group with a line for each case: time and speed-up over eager of every variant, and memory."""
    parts = [record.summary(loaded["conditions"]).replace("\n", "  \n")]
    parts += [_table(group, cases) for group, cases in table.groups(loaded["rows"])]
    return "\n\n".join(parts)


def _table(group: str, cases: list[tuple[dict, list[dict]]]) -> str:
    variants = list(dict.fromkeys(row["variant"] for _, members in cases for row in members))
    package = [row["variant"] for _, members in cases for row in members if row["backend"]][:1]
    memory = [EAGER, *package]
    lines = [f"| {group} | {' | '.join([*variants, *(f'peak MB, {name}' for name in memory)])} |"]
    lines.append("|:--|" + "--:|" * (len(variants) + len(memory)))
    for case, members in cases:
        rows = {row["variant"]: row for row in members}
        cells = [_cell(rows.get(variant)) for variant in variants]
        cells += [table.megabytes(rows[name]["peak_bytes"]) if name in rows else "-" for name in memory]
        lines.append(f"| {table.case_name(case)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["fault"]:
        return "failed"
    is_eager = row["variant"] == EAGER
    found = [] if is_eager else [table.times(row["times_eager"])]
    if "kept_seconds" in row:
        kept = table.duration(row["kept_seconds"]) if is_eager else table.times(row["kept_times_eager"])
        found.append(f"{table.OTHER_TIMES['kept']} {kept}")
    return table.duration(row["seconds"]) + (f" ({', '.join(found)})" if found else "")
