"""The plots of a report: time and memory against a size that varies, and speed-ups."""

import io
from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.report.table import (
    CHECKPOINTED,
    COMPILED,
    EAGER,
    EPILOGUE,
    FLEX,
    PADDED,
    PADDING_READ,
    PROJECTIONS,
    by_size,
    case_name,
    groups,
)

_AXES = {"N": "tokens N", "B": "batch B", "img_size": "image size, pixels"}  # others under their own names
_FEWEST_POINTS = 3
_PER_LINE = 2
_OTHERS = {
    EAGER: ("#000000", "o"),
    COMPILED: ("#E69F00", "s"),
    PROJECTIONS: ("#56B4E9", "^"),
    CHECKPOINTED: ("#999933", "h"),
    FLEX: ("#AA4499", "H"),
    PADDED: ("#44AA99", "8"),
    PADDING_READ: ("#888888", "d"),
    EPILOGUE: ("#882255", "p"),
}
_PACKAGE = [("#0072B2", "D"), ("#D55E00", "v"), ("#009E73", "P"), ("#CC79A7", "X"), ("#8C6D00", "*"), ("#666666", "<")]
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_STYLE = {"font.size": 11, "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True}


def time_against_sizes(rows: list[dict]) -> dict[str, bytes]:
    """Size -> PNG of one group's times with a panel for every series of at least three values of that size."""
    return _against_sizes(rows, "time of a call, ms", lambda row: row["seconds"] * 1e3, guide=True)


def memory_against_sizes(rows: list[dict]) -> dict[str, bytes]:
    return _against_sizes(rows, "peak extra memory, MB", lambda row: row["peak_bytes"] / 1e6, guide=False)


def speedups(rows: list[dict]) -> bytes:
    """PNG of one group with a line for every case and a mark for every variant at its speed-up over eager."""
    cases = [case for _, of_group in groups(rows) for case in by_size(of_group)]
    looks = _looks(rows)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 0.3 * len(cases) + 1.8), layout="constrained")
        axis = figure.subplots()
        for line, (_, members) in enumerate(cases):
            for row in members:
                if row["variant"] != EAGER and not row["fault"] and row["times_eager"] is not None:
                    color, marker = looks[row["variant"]]
                    axis.plot(row["times_eager"], line, marker, color=color, markersize=8, label=row["variant"])
        axis.set_yticks(range(len(cases)), [case_name(case) for case, _ in cases], fontsize=10)
        axis.set_ylim(len(cases) - 0.4, -0.6)
        axis.set_xscale("log")
        lowest, highest = axis.get_xlim()
        lowest, highest = min(lowest, 0.8), max(highest, 1.3)
        axis.axvspan(lowest, 1, color="#f6dcd9", zorder=0)
        axis.axvline(1, color=looks[EAGER][0], linewidth=1.2)
        axis.set_xlim(lowest, highest)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest / lowest > 5 else (1, 1.2, 1.5, 2, 3, 5, 8)))
        axis.xaxis.set_major_formatter(_PLAIN)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("times as fast as eager (in the shaded part: slower)")
        return _png(figure, [axis])


def _looks(rows: list[dict]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every variant."""
    of_package = dict.fromkeys(row["variant"] for row in rows if row["backend"])
    return _OTHERS | {name: _PACKAGE[i % len(_PACKAGE)] for i, name in enumerate(of_package)}


def _against_sizes(rows: list[dict], label: str, value: Callable[[dict], float], guide: bool) -> dict[str, bytes]:
    rows = [row for row in rows if not row["fault"]]
    sizes = dict.fromkeys(name for row in rows for name, size in row["case"].items() if isinstance(size, int))
    panels = {size: _series(rows, size) for size in sizes}
    return {size: _panels(found, size, label, value, guide) for size, found in panels.items() if found}


def _series(rows: list[dict], size: str) -> dict[str, list[dict]]:
    """Title -> rows that differ in this size alone."""
    series: dict[str, list[dict]] = {}
    for row in rows:
        if size in row["case"]:
            others = {name: value for name, value in row["case"].items() if name != size}
            series.setdefault(case_name(others), []).append(row)
    return {
        title: members
        for title, members in series.items()
        if len({row["case"][size] for row in members}) >= _FEWEST_POINTS
    }


def _panels(panels: dict[str, list[dict]], size: str, label: str, value: Callable[[dict], float], guide: bool) -> bytes:
    columns = min(len(panels), _PER_LINE)
    lines = -(-len(panels) // columns)
    looks = _looks([row for members in panels.values() for row in members])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(5.5 * columns, 8), 4.2 * lines + 0.6), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, members) in zip(axes.flat, panels.items(), strict=False):
            _panel(axis, members, size, value, looks, guide)
            axis.set_title(title, fontsize=11)
        for axis in axes[:, 0]:
            axis.set_ylabel(label)
        return _png(figure, axes.flat[: len(panels)])


def _panel(axis, rows: list[dict], size: str, value: Callable[[dict], float], looks: dict, guide: bool) -> None:
    for i, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        points = sorted((row["case"][size], value(row)) for row in rows if row["variant"] == variant)
        color, marker = looks[variant]
        width = max(11 - 1.3 * i, 6)  # marks that lie on each other stay visible
        axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=width, label=variant)
    values = sorted({row["case"][size] for row in rows})
    if guide:
        lowest = min(value(row) / row["case"][size] for row in rows) / 2
        axis.plot(values, [lowest * n for n in values], ":", color="#777777", label=f"cost linear in {size}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(values, [str(n) for n in values])
    axis.xaxis.set_minor_locator(NullLocator())
    lowest, highest = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest / lowest < 100 else (1,)))
    axis.yaxis.set_major_formatter(_PLAIN)
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(_AXES.get(size, size))


def _png(figure: Figure, axes) -> bytes:
    """The figure with one legend for all its panels, below them."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(handles, key=lambda label: label.startswith("cost"))
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=3, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
