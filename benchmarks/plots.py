"""The plots of a report: time and memory against the number of tokens, and speed-ups."""

import io
from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.problem import COMPILED, EAGER, PROJECTIONS
from benchmarks.table import case_name, groups

_LENGTH = "N"
_FEWEST_POINTS = 3
_PER_LINE = 3
_OTHERS = {EAGER: ("#000000", "o"), COMPILED: ("#E69F00", "s"), PROJECTIONS: ("#56B4E9", "^")}
_PACKAGE = [("#0072B2", "D"), ("#D55E00", "v"), ("#009E73", "P"), ("#CC79A7", "X"), ("#8C6D00", "*"), ("#666666", "<")]
_GUIDE = "cost linear in N"
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_STYLE = {"font.size": 11, "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True}


def time_against_length(rows: list[dict]) -> bytes | None:
    """PNG with a panel for every series of at least three lengths; None where there is none."""
    return _against_length(rows, "time of a call, ms", lambda row: row["seconds"] * 1e3, guide=True)


def memory_against_length(rows: list[dict]) -> bytes | None:
    return _against_length(rows, "peak extra memory, MB", lambda row: row["peak_bytes"] / 1e6, guide=False)


def speedups(rows: list[dict]) -> dict[str, bytes]:
    """Group -> PNG with a line for every case and a mark for every variant at its speed-up over eager."""
    return {group: _speedups(group, cases, _looks(rows)) for group, cases in groups(rows)}


def _speedups(group: str, cases: list[tuple[dict, list[dict]]], looks: dict) -> bytes:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 0.28 * len(cases) + 1.8), layout="constrained")
        axis = figure.subplots()
        axis.axvline(1, color=looks[EAGER][0], linewidth=1)
        for line, (_, members) in enumerate(cases):
            for row in members:
                if row["variant"] != EAGER and not row["fault"]:
                    color, marker = looks[row["variant"]]
                    axis.plot(row["times_eager"], line, marker, color=color, markersize=8, label=row["variant"])
        axis.set_yticks(range(len(cases)), [case_name(case) for case, _ in cases], fontsize=10)
        axis.set_ylim(len(cases) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(_PLAIN)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("times as fast as eager (right of the line is faster)")
        axis.set_title(group, loc="left", fontsize=12)
        return _png(figure, [axis])


def _looks(rows: list[dict]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every variant."""
    of_package = dict.fromkeys(row["variant"] for row in rows if row["backend"])
    return _OTHERS | {name: _PACKAGE[i % len(_PACKAGE)] for i, name in enumerate(of_package)}


def _against_length(rows: list[dict], label: str, value: Callable[[dict], float], guide: bool) -> bytes | None:
    panels = _series(rows)
    if not panels:
        return None
    columns = min(len(panels), _PER_LINE)
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(4.6 * columns, 8), 4.2 * lines + 0.6), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, members) in zip(axes.flat, panels.items(), strict=False):
            _length_panel(axis, members, value, _looks(rows), guide)
            axis.set_title(title, fontsize=11)
        for axis in axes[:, 0]:
            axis.set_ylabel(label)
        return _png(figure, axes.flat[: len(panels)])


def _series(rows: list[dict]) -> dict[str, list[dict]]:
    """Title -> rows that differ in their length alone."""
    series: dict[str, list[dict]] = {}
    for row in rows:
        if _LENGTH in row["case"] and not row["fault"]:
            sizes = {name: size for name, size in row["case"].items() if name != _LENGTH}
            series.setdefault(f"{row['group']}\n{case_name(sizes)}", []).append(row)
    return {
        title: members
        for title, members in series.items()
        if len({row["case"][_LENGTH] for row in members}) >= _FEWEST_POINTS
    }


def _length_panel(axis, rows: list[dict], value: Callable[[dict], float], looks: dict, guide: bool) -> None:
    for i, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        points = sorted((row["case"][_LENGTH], value(row)) for row in rows if row["variant"] == variant)
        color, marker = looks[variant]
        size = max(11 - 1.3 * i, 6)  # marks that lie on each other stay visible
        axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=size, label=variant)
    lengths = sorted({row["case"][_LENGTH] for row in rows})
    if guide:
        lowest = min(value(row) / row["case"][_LENGTH] for row in rows) / 2
        axis.plot(lengths, [lowest * n for n in lengths], ":", color="#777777", label=_GUIDE)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(lengths, [str(n) for n in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(_PLAIN)
    axis.set_xlabel("tokens N")


def _png(figure: Figure, axes) -> bytes:
    """The figure with one legend for all its panels, below them."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(handles, key=lambda label: label == _GUIDE)
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=3, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
