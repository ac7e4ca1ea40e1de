"""A record as one HTML page that a person reads without the sources: styles and pictures are in it."""

import base64
import html
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.report import record, summary, table

_STYLE = (Path(__file__).parent / "html.css").read_text()
_LEAD = (
    "tokenfusion replaces modules of vision models by fused ones that compute the same from the same weights. This "
    "page says how fast that is beside the original and beside torch.compile, and how much memory it takes."
)
_GLOSSARY = {
    "eager": "the module or model as its library has it (timm's, or the formula in plain PyTorch), run as it is",
    table.COMPILED: "the same under torch.compile: the rival that counts",
    table.AUTOTUNED: "with mode max-autotune: torch.compile tries many forms of its kernels, for minutes",
    table.PROJECTIONS: "keys and values of all tokens by matrix products, then scaled_dot_product_attention",
    table.CHECKPOINTED: "eager under torch.utils.checkpoint: it holds the input alone and computes the rest again",
    table.EPILOGUE: "bias and activation in the epilogue of the first matrix product, as PyTorch has it for inference",
    "tokenfusion (NAME)": "this package with its backend NAME: cpu is C++, triton and cuda are GPU kernels, reference "
    "is plain PyTorch, auto is what the table of this machine chooses; shaded in the tables",
    "own model (NAME)": "this package's own form of the model, with the same weights",
    "no guard, not deferred": "this package without the question whether a module may run fused, and with an operator "
    "that is called at once: what these cost where a call is short",
    "B, N, C, heads": "batch, tokens, channels, attention heads; other letters as in the operator's documentation",
    "median": "time of one call. All variants of a case take turns in every round, in an order that changes, on inputs "
    "that no cache holds",
    "x eager, x compile": "how many times as fast as eager and as torch.compile, the median of the ratios round by "
    "round. Below 1x a variant is slower, and is marked so",
    "from Python": "on a GPU the median is that of replaying a CUDA graph, which leaves out what launching from Python "
    "costs; this is the time with it. Short calls are often bound by it",
    "memory kept": "the time where memory that a call frees stays with the process. The C library gives tensors above "
    "32 MiB back to the system, whose new pages cost what allocates most, which is eager, most",
    "peak MB": "the most memory held during a call beyond what was held before it, as PyTorch's allocator counts it "
    "(1 MB is 10^6 bytes). Weights are not in it",
    "GB/s": "bytes that must move (each input once in each pass, each output once) by the time. Variants that move "
    "more than they must show a low figure",
    "% ceiling": "share of what the machine does at best, measured in the same run: the longer of a plain sum over, or "
    "copy of, as many bytes, and the arithmetic that must be done at the rate of a large matrix product. "
    "Above 100% the plain operation itself falls short of the machine",
    "parity": "error against float64, as the largest difference relative to the largest element or as the root mean "
    "square relative to that of the elements, whichever is nearer to the error allowed, which stands beside it: twice "
    "that of eager in the same dtype, and a little for rounding (eight times as much for code that is not of this "
    "package). "
    "What fails is not timed",
    "training step": "zero_grad, forward pass, cross-entropy, backward pass, AdamW; in bfloat16 under autocast",
}


def page(loaded: dict, pictures: Mapping[str, Mapping[str, bytes]]) -> str:
    """The page. pictures: group -> caption -> PNG; may be empty."""
    rows, conditions = loaded["rows"], loaded["conditions"]
    title = _text(f"tokenfusion, measured on {conditions['device']['name']}")
    groups = list(table.groups(rows))
    links = ("Summary", "Conditions", "How to read it", *(group for group, _ in groups), "Not measured")
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{_LEAD} All of it was measured on one machine, on {_text(conditions['date'][:10])}.</p>",
        f"<nav>{''.join(_link(name) for name in links)}</nav>",
        _heading("Summary"),
        *_summary(rows),
        _heading("Conditions"),
        _conditions(conditions, loaded.get("ceilings", {})),
        *_checks(loaded.get("steps", {})),
        _heading("How to read it"),
        _words(_GLOSSARY),
    ]
    for group, cases in groups:
        parts += [_heading(group), *_figures(pictures.get(group, {}), conditions), _rows(cases)]
    parts += [_heading("Not measured"), *_not_measured(loaded)]
    head = f'<meta charset="utf-8"/><meta name="viewport" content="width=device-width"/><title>{title}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'
    )


def _summary(rows: list[dict]) -> list[str]:
    found = summary.headlines(rows)
    if not found:
        return ["<p>No case of this package was measured.</p>"]
    headings = (
        "variant",
        "cases",
        "times as fast as eager",
        "as torch.compile",
        "slower than either",
        "times less memory",
    )
    lines = []
    for group in dict.fromkeys(line.group for line in found):
        lines.append(f'<tr class="case"><th colspan="{len(headings)}" scope="rowgroup">{_text(group)}</th></tr>')
        for line in (line for line in found if line.group == group):
            slower = sum(row["variant"] == line.variant and row["group"] == group for row in summary.losing(rows))
            cells = [_text(line.variant), str(line.cases), _text(line.eager), _text(line.compiled)]
            cells += [f'<span class="bad">{slower} of {line.cases}</span>' if slower else "none", _text(line.memory)]
            lines.append(f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>')
    caption = "The median over a group's cases, in brackets the worst and the best; a dash where nothing was measured."
    parts = [_table(headings, lines, caption)]
    slow = summary.losing(rows)
    if slow:
        parts.append(f"<h3>Where it loses</h3><p>{len(slow)} of the measured rows of this package are slower.</p>")
        parts.append(_details("These rows", _slower(slow), is_open=len(slow) <= 12))
    return parts


def _slower(rows: list[dict]) -> str:
    headings = ("case", "variant", "x eager", "x compile")
    lines = [
        _line(
            (
                f"{row['group']}: {table.case_name(row['case'])}",
                row["variant"],
                table.times(row["times_eager"]),
                table.times(row["times_compiled"]),
            ),
            kind="package",
        )
        for row in rows
    ]
    return _table(headings, lines)


def _conditions(conditions: dict, ceilings: dict) -> str:
    device = conditions["device"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items() if version)
    facts = {
        "device": device["name"],
        "driver": device["driver"],
        "clocks before the run (SM, memory, highest SM), power limit": device.get("clocks"),
        "processor": f"{device['cpu']}, {device['cores']} cores, {device['threads']} threads used",
        "instruction set of the C++ kernels": conditions["isa"],
        "versions": versions,
        "commit of tokenfusion": conditions["commit"],
        "date": conditions["date"],
        "profile": conditions["profile"],
        "caches": conditions["cache"],
        "products in float32": conditions.get("float32_products"),
        **{f"at best: {name}": f"{rate:.3g}" for name, rate in ceilings.items()},
    }
    return _words({name: str(value) for name, value in facts.items() if value})


def _checks(steps: dict) -> list[str]:
    """What `make gpu-check` did before and beside the benchmarks."""
    if not steps:
        return []
    lines = [
        _line((name, step["status"], f"{step['seconds']:.0f} s", step["summary"]), heads=1, bad=_is_bad(step["status"]))
        for name, step in steps.items()
    ]
    logs = [
        _details(f"{name}: the end of its output", f"<pre>{_text(step['log'])}</pre>")
        for name, step in steps.items()
        if step["log"] and _is_bad(step["status"])
    ]
    checks = _table(("step", "result", "time", ""), lines, kind="words")
    return [_heading("Checks"), checks, *logs]


def _is_bad(status: str) -> bool:
    return status not in ("passed", "skipped", "measured")


def _figures(pictures: Mapping[str, bytes], conditions: dict) -> list[str]:
    where = f"{conditions['device']['name']}, torch {conditions['versions'].get('torch')}, {conditions['date'][:10]}"
    figures = []
    for caption, png in pictures.items():
        image = f'<img alt="{_text(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"/>'
        figures.append(f"<figure>{image}<figcaption>{_text(f'{caption} {where}.')}</figcaption></figure>")
    return figures


def _rows(cases: list[tuple[dict, list[dict]]]) -> str:
    kinds = table.other_times(row for _, members in cases for row in members)
    headings = (*table.HEADINGS, *(heading for kind in kinds for heading in table.other_headings(kind)))
    lines = []
    for case, members in table.by_size(cases):
        name = _text(table.case_name(case))
        lines.append(f'<tr class="case"><th colspan="{len(headings)}" scope="rowgroup">{name}</th></tr>')
        for row in members:
            cells = (*table.cells(row), *(cell for kind in kinds for cell in table.other_cells(row, kind)))
            lines.append(_line(cells, kind="fault" if row["fault"] else "package" if row["backend"] else "other"))
    return _details(f"All {len(cases)} cases", _table(headings, lines))


def _not_measured(loaded: dict) -> list[str]:
    missing = {
        name: f"{case['state']}: {case['reason'] or ''}"
        for name, case in loaded.get("cases", {}).items()
        if case["state"] != "measured"
    }
    faults = {
        f"{row['group']}: {table.case_name(row['case'])}, {row['variant']}": f"failed: {row['fault']}"
        for row in loaded["rows"]
        if row["fault"]
    }
    found = [f"<p>{_text(words)}</p>" for words in _left_out(loaded)]
    return [*found, _words(missing | faults)] if missing or faults else found or ["<p>Every case was measured.</p>"]


def _left_out(loaded: dict) -> Iterable[str]:
    conditions, rows = loaded["conditions"], loaded["rows"]
    if conditions["device"]["kind"] != "cuda":
        yield "This record is of a CPU: it says nothing of GPUs."
    if not any(row["variant"] == table.COMPILED for row in rows):
        yield "torch.compile was not measured in this run."
    else:
        without = [group for group, cases in table.groups(rows) if not _has_compiled(cases)]
        if without:
            yield f"torch.compile was not measured for: {'; '.join(without)}."


def _has_compiled(cases: list[tuple[dict, list[dict]]]) -> bool:
    return any(row["variant"] == table.COMPILED for _, members in cases for row in members)


def _text(value: object) -> str:
    return html.escape(str(value))


def _heading(name: str) -> str:
    return f'<h2 id="{record.file_name(name)}">{_text(name)}</h2>'


def _link(name: str) -> str:
    return f'<a href="#{record.file_name(name)}">{_text(name)}</a> '


def _details(title: str, content: str, is_open: bool = False) -> str:
    state = ' open=""' if is_open else ""
    return f"<details{state}><summary>{_text(title)}</summary>{content}</details>"


def _words(facts: Mapping[str, str]) -> str:
    return _table((), [_line((name, text), heads=1) for name, text in facts.items()], kind="words")


def _table(headings: Iterable[str], lines: Iterable[str], caption: str = "", kind: str = "figures") -> str:
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in headings)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    caption = f"<caption>{_text(caption)}</caption>" if caption else ""
    body = "\n".join(lines)
    return f'<div class="wide"><table class="{kind}">{caption}{head}<tbody>{body}</tbody></table></div>'


def _line(cells: Iterable[str], *, heads: int = 0, kind: str = "other", bad: bool = False) -> str:
    inner = ""
    for i, cell in enumerate(cells):
        slower = " bad" if kind == "package" and _is_slower(cell) else ""
        words = f"{_text(cell)} (slower)" if slower else _text(cell)
        inner += f'<th scope="row">{words}</th>' if i < heads else f'<td class="cell{slower}">{words}</td>'
    return f'<tr class="{"fault" if bad else kind}">{inner}</tr>'


def _is_slower(cell: str) -> bool:
    return cell.startswith("0.") and cell.endswith("x")
