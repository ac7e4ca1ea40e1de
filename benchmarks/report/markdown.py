"""The tables of a record in Markdown, for the README."""

import re
from pathlib import Path

from benchmarks.report import record, table
from benchmarks.report.table import EAGER

_BLOCK = re.compile(r"(<!-- table ([^|>]+?) *\| *([^|>]+?) *(?:\| *(\d+) *)?-->\n)(.*?)(<!-- end -->)", re.DOTALL)


def updated(text: str) -> str:
    """The text with its marked tables made from the records that they name."""

    def remade(block: re.Match) -> str:
        begin, path, group, count, _, end = block.groups()
        cases = dict(table.groups(record.load(Path(path))["rows"]))
        if group not in cases:
            raise SystemExit(f"{path}: no group {group!r}, it has {', '.join(map(repr, cases))}")
        return f"{begin}\n{_table(group, cases[group], int(count) if count else None)}\n\n{end}"

    return _BLOCK.sub(remade, text)


def tables(loaded: dict) -> str:
    """A table for each group with a line for each case: time and speed-up over eager of every variant, and memory."""
    parts = [record.summary(loaded["conditions"]).replace("\n", "  \n")]
    parts += [_table(group, cases) for group, cases in table.groups(loaded["rows"])]
    return "\n\n".join(parts)


def _table(group: str, cases: list[tuple[dict, list[dict]]], count: int | None = None) -> str:
    variants = list(dict.fromkeys(row["variant"] for _, members in cases for row in members))
    package = [row["variant"] for _, members in cases for row in members if row["backend"]][:1]
    memory = [EAGER, *package]
    lines = [f"| {group} | {' | '.join([*variants, *(f'peak MB, {name}' for name in memory)])} |"]
    lines.append("|:--|" + "--:|" * (len(variants) + len(memory)))
    for case, members in cases[:count]:
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
    speedup = "" if row["variant"] == EAGER else f" ({table.times(row['times_eager'])})"
    return table.duration(row["seconds"]) + speedup
