"""What finetune.py says of its epochs: a line, a bar, a table, a picture."""

import csv
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from training.checkpoints import replace


def best(rows: list[dict]) -> dict:
    return max(rows, key=lambda row: (row["accuracy"], -row["loss"]))


def line(row: dict, epochs: int, is_best: bool) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, of the test images {row['loss']:.4f}, "
        f"accuracy {row['accuracy']:.1%}{', the best' if is_best else ''}, {row['images/s']:.0f} images/s"
    )


def bar(args) -> Progress:
    """Of the first process, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn())
    hidden = args.rank > 0 or not args.console.is_terminal
    return Progress(*columns, console=args.console, transient=True, disable=hidden)


def write(folder: Path, rows: list[dict]) -> None:
    """log.csv, and curves.png where matplotlib is installed."""
    if not rows:
        return
    replace(folder / "log.csv", lambda path: _write_table(path, rows))
    try:
        import matplotlib.pyplot  # noqa: F401
    except ImportError:
        return
    replace(folder / "curves.png", lambda path: _draw(path, rows))


def _write_table(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _draw(path: Path, rows: list[dict]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for axis, name in ((losses, "loss"), (accuracies, "accuracy")):
        for key, label in ((f"train_{name}", "training"), (name, "test images")):
            axis.plot(epochs, [row[key] for row in rows], label=label, marker="o" if len(rows) < 20 else None)
        axis.set_title(name, loc="left")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    losses.set_ylim(bottom=0)
    accuracies.yaxis.set_major_formatter(PercentFormatter(1.0))
    accuracies.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)
