"""What a record of trainings shows: a table in Markdown, and a plot."""

import io
import re
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from benchmarks.report import record

_TABLE = re.compile(r"(<!-- convergence (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_DISTANCES = {"loss_distance": "losses", "logit_distance": "logits", "parameter_distance": "parameters"}
_HEAD = (
    "training",
    "way",
    *(f"{name}: distance from eager" for name in _DISTANCES.values()),
    "accuracy",
    "images/s",
    "peak MB",
)
_COLOURS = {"compile": "#009E73", "fused": "#0072B2", "fused + compile": "#D55E00"}


def updated(text: str) -> str:
    """The text with its marked tables made from the records that they name."""

    def table_of(block: re.Match) -> str:
        begin, path, _, end = block.groups()
        return f"{begin}\n{table(record.load(Path(path))['rows'])}\n\n{end}"

    return _TABLE.sub(table_of, text)


def table(rows: list[dict]) -> str:
    """A line for eager with how far reordered sums take it, and one for every way that is fused or compiled."""
    lines = [f"| {' | '.join(_HEAD)} |", "|:--|:--|" + "--:|" * (len(_HEAD) - 2)]
    for (family, dtype), members in trainings(rows).items():
        eager, spread, others = members
        reordered = [f"{torch.tensor([row[name] for row in spread]).max():.1e}" for name in _DISTANCES]
        lines.append(_line(f"{family}, {dtype}", "eager, its sums in other orders", reordered, eager))
        for row in others:
            lines.append(_line("", row["way"], [f"{row[name]:.1e}" for name in _DISTANCES], row))
    return "\n".join(lines)


def trainings(rows: list[dict]) -> dict[tuple[str, str], tuple[dict, list[dict], list[dict]]]:
    """Of each family and dtype the row of eager, those of eager with its sums in other orders, and the others."""
    found = {}
    for row in rows:
        training = (row["family"], row["dtype"])
        if training not in found:
            found[training] = row, [], []
        else:
            found[training][2 if row["fused"] or row["compiled"] else 1].append(row)
    return found


def plot(rows: list[dict]) -> bytes:
    """PNG: for every training the distance of the losses from eager's, step by step, and the band of eager's own."""
    found = trainings(rows)
    families, dtypes = (list(dict.fromkeys(each)) for each in zip(*found, strict=True))
    with matplotlib.rc_context({"font.size": 10, "axes.grid": True, "grid.color": "#dddddd"}):
        size = (3.4 * len(families), 2.6 * len(dtypes) + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(dtypes), len(families), squeeze=False, sharex=True, sharey="row")
        for (family, dtype), (eager, spread, others) in found.items():
            axis = axes[dtypes.index(dtype), families.index(family)]
            band = [max(each) for each in zip(*(_distances(row, eager) for row in spread), strict=True)]
            steps = range(1, len(band) + 1)
            axis.fill_between(steps, _LEAST, band, color="#bbbbbb", label="eager, its sums in other orders")
            for row in others:
                axis.plot(steps, _distances(row, eager), color=_COLOURS[row["way"]], lw=1, label=row["way"])
            axis.set_yscale("log")
            axis.set_title(f"{family}, {dtype}", fontsize=10)
        for axis in axes[-1]:
            axis.set_xlabel("step")
        for axis in axes[:, 0]:
            axis.set_ylabel("|loss - eager's|")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


_LEAST = 1e-8  # what a distance of none is drawn at


def _distances(row: dict, eager: dict) -> list[float]:
    """The largest so far: single steps may cross by chance. It is infinite from a loss on that is no number."""
    distances = torch.tensor(row["losses"]).sub(torch.tensor(eager["losses"])).abs()
    return distances.nan_to_num(nan=torch.inf).clamp(min=_LEAST).cummax(dim=0).values.tolist()


def _line(training: str, way: str, distances: list[str], row: dict) -> str:
    figures = [f"{row['accuracy']:.1%}", f"{row['images_per_second']:.0f}", f"{row['peak_bytes'] / 1e6:.1f}"]
    return f"| {' | '.join([training, way, *distances, *figures])} |"
