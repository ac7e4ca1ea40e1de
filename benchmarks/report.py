"""python -m benchmarks.report RECORD.json --out DIR: plots and one HTML page of a record.

With --markdown the table for the README goes to the standard output.
"""

import argparse
import base64
import html
from pathlib import Path

from benchmarks import plots, record, table
from benchmarks.problem import EAGER

_AGAINST_LENGTH = {
    "time": "Time of one call against the number of tokens, both on logarithmic scales.",
    "memory": "The most memory held during a call beyond what was held before it, results included.",
}
_SPEEDUPS = "How many times as fast as eager PyTorch each variant is, case by case."
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #888; } tr.case th { padding-top: .9rem; text-align: left; }
tr.package { background: #e8f1f8; } tr.fault { color: #a40000; }
tr.fault td:last-child { white-space: normal; }
.conditions th { text-align: left; font-weight: 600; } .conditions td { text-align: left; white-space: normal; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } figcaption { color: #555; }
.wide { overflow-x: auto; }
"""
_READING = """
<ul>
<li><b>median</b>: of one call. All variants of a case run in turn in every round, in an order that changes, on inputs
that no cache holds.</li>
<li><b>x eager</b>, <b>x compile</b>: how many times as fast as eager PyTorch and as torch.compile of the same, the
median of the ratios round by round. Below 1x a variant is slower.</li>
<li><b>peak MB</b>: the most memory held during the call beyond what was held before it (10<sup>6</sup> bytes), as
PyTorch's allocator counts it.</li>
<li><b>GB/s</b>: bytes that must move (the tokens once in each pass, their gradient once, small tensors and parameters)
by the time. Variants that move more than they must show a low figure.</li>
<li><b>% ceiling</b>: share of what the machine does at best, measured in the same run: the longer of a plain sum over
(forward) or copy of (forward + backward) as many bytes, and the arithmetic that must be done at the rate of a large
matrix product in the same dtype. Above 100% the plain operation itself falls short of the machine.</li>
<li><b>parity</b>: largest error against float64 relative to the largest element, and the error allowed: twice that of
eager in the same dtype, and a little for rounding (eight times as much for code that is not of this package). What
fails is not timed.</li>
<li><b>projections + SDPA</b>: keys and values of all tokens by matrix products, then
scaled_dot_product_attention.</li>
</ul>
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON file that the benchmarks wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the page and the plots go")
    parser.add_argument("--markdown", action="store_true", help="print the table for the README")
    args = parser.parse_args(arguments)
    loaded = record.load(args.record)
    if args.out:
        write(loaded, args.out)
    if args.markdown:
        print(markdown(loaded))


def write(loaded: dict, out: Path) -> None:
    rows = loaded["rows"]
    lengths = {"time": plots.time_against_length(rows), "memory": plots.memory_against_length(rows)}
    lengths = {name: png for name, png in lengths.items() if png is not None}
    speedups = plots.speedups(rows)
    out.mkdir(parents=True, exist_ok=True)
    for name, png in (lengths | {f"speedups, {group}": png for group, png in speedups.items()}).items():
        (out / f"{record.file_name(name)}.png").write_bytes(png)
    (out / "report.html").write_text(_page(loaded, lengths, speedups), encoding="utf-8")


def markdown(loaded: dict) -> str:
    """A table for each group with a line for each case: time and speed-up over eager of every variant, and memory."""
    parts = [record.summary(loaded["conditions"]).replace("\n", "  \n")]
    parts += [_markdown_table(group, cases) for group, cases in table.groups(loaded["rows"])]
    return "\n\n".join(parts)


def _markdown_table(group: str, cases: list[tuple[dict, list[dict]]]) -> str:
    variants = list(dict.fromkeys(row["variant"] for _, members in cases for row in members))
    package = next(row["variant"] for _, members in cases for row in members if row["backend"])
    lines = [f"| {group} | {' | '.join(variants)} | peak MB, {EAGER} | peak MB, {package} |"]
    lines.append("|:--|" + "--:|" * (len(variants) + 2))
    for case, members in cases:
        rows = {row["variant"]: row for row in members}
        cells = [_markdown_cell(rows.get(variant)) for variant in variants]
        cells += [table.megabytes(rows[variant]["peak_bytes"]) for variant in (EAGER, package)]
        lines.append(f"| {table.case_name(case)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _markdown_cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["fault"]:
        return "failed"
    speedup = "" if row["variant"] == EAGER else f" ({table.times(row['times_eager'])})"
    return table.duration(row["seconds"]) + speedup


def _page(loaded: dict, lengths: dict[str, bytes], speedups: dict[str, bytes]) -> str:
    conditions = loaded["conditions"]
    title = html.escape(f"tokenfusion on {conditions['device']['name']}")
    parts = [f"<h1>{title}</h1>", _conditions(conditions)]
    parts += [_figure(caption, lengths[name]) for name, caption in _AGAINST_LENGTH.items() if name in lengths]
    parts.append(f"<h2>How to read the tables</h2>{_READING}")
    for group, cases in table.groups(loaded["rows"]):
        parts += [f"<h2>{html.escape(group)}</h2>", _figure(_SPEEDUPS, speedups[group]), _table(cases)]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _conditions(conditions: dict) -> str:
    device = conditions["device"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items() if version)
    facts = {
        "device": device["name"],
        "driver": device["driver"],
        "processor": f"{device['cpu']}, {device['cores']} cores, {device['threads']} threads used",
        "instruction set of the C++ kernels": conditions["isa"],
        "versions": versions,
        "commit": conditions["commit"],
        "date": conditions["date"],
        "profile": conditions["profile"],
        "caches": conditions["cache"],
    }
    lines = [_line((name, str(value)), heads=1) for name, value in facts.items() if value]
    return f'<table class="conditions">{"".join(lines)}</table>'


def _figure(caption: str, png: bytes) -> str:
    image = f'<img alt="{caption}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _table(cases: list[tuple[dict, list[dict]]]) -> str:
    lines = []
    for case, members in cases:
        name = html.escape(table.case_name(case))
        lines.append(f'<tr class="case"><th colspan="{len(table.HEADINGS)}">{name}</th></tr>')
        lines += [_line(table.cells(row), kind=_kind(row)) for row in members]
    head = f"<thead>{_line(table.HEADINGS, heads=len(table.HEADINGS))}</thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _kind(row: dict) -> str:
    return "fault" if row["fault"] else "package" if row["backend"] else "other"


def _line(cells, *, heads: int = 0, kind: str = "other") -> str:
    tags = ["th" if i < heads else "td" for i in range(len(cells))]
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for tag, cell in zip(tags, cells, strict=True))
    return f'<tr class="{kind}">{inner}</tr>'


if __name__ == "__main__":
    main()
