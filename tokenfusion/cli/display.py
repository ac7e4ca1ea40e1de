"""Tables on standard output, and a progress bar on standard error that leaves nothing behind."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

_UNLIMITED = 10_000


def console(width: int | None = None) -> Console:
    """Standard output; width None is that of the terminal. A pipe has none: there a row is a line."""
    width = width if sys.stdout.isatty() else _UNLIMITED
    return Console(width=width, markup=False, emoji=False, highlight=False)


def show(out: Console, *parts: Table | str) -> None:
    """Lines and tables, then an empty line. On a terminal too narrow for the words of a table its lines run on."""
    for part in parts:
        needed = 0
        if isinstance(part, Table):
            needed = Measurement.get(out, out.options.update(max_width=_UNLIMITED), part).minimum
        (out if needed <= out.width else console(needed)).print(part)
    out.print()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> Table:
    """A table whose columns named in `numbers` are aligned on the right; neither they nor the first one are wrapped.

    Without a heading row if no column has a name.
    """
    style = dict(title_justify="left", title_style="bold", box=None, show_header=any(columns), pad_edge=False)
    result = Table(title=title, min_width=cell_len(title), **style)
    for i, name in enumerate(columns):
        whole = name in numbers or i == 0
        width = max(map(cell_len, (name, *(row[i] for row in rows)))) if whole else None
        result.add_column(name, justify="right" if name in numbers else "left", no_wrap=whole, min_width=width)
    for row in rows:
        result.add_row(*row)
    return result


@contextlib.contextmanager
def progress_bar(subject: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Yields step(stage=None, advance=0), which names the stage and moves the bar; total None has no end.

    Nothing is shown where standard error is no terminal, or one that cannot take a line back. Nothing may be printed
    on standard output meanwhile.
    """
    terminal = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    disable = not terminal.is_terminal or terminal.is_dumb_terminal
    with Progress(*columns, console=terminal, transient=True, redirect_stdout=False, disable=disable) as progress:
        task = progress.add_task(subject, total=total)

        def step(stage: str | None = None, advance: int = 0) -> None:
            progress.update(task, description=stage and f"{subject}: {stage}", advance=advance)

        yield step
