"""Tables on standard output, and a progress bar on standard error that leaves nothing behind."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def console() -> Console:
    width = None if sys.stdout.isatty() else 10_000  # a pipe has no width: one line per row
    return Console(width=width, markup=False, emoji=False, highlight=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> Table:
    """A table whose columns named in `numbers` are aligned on the right and never wrapped; without a heading row if
    no column has a name."""
    result = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=any(columns), pad_edge=False
    )
    for name in columns:
        if name in numbers:
            result.add_column(name, justify="right", no_wrap=True)
        else:
            result.add_column(name, overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


@contextlib.contextmanager
def progress_bar(subject: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Yields step(stage=None, advance=0), which names the stage and moves the bar; total None has no end.

    Nothing is shown where standard error is not a terminal. Nothing may be printed on standard output meanwhile.
    """
    terminal = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=terminal, transient=True, redirect_stdout=False, disable=not terminal.is_terminal
    ) as progress:
        task = progress.add_task(subject, total=total)

        def step(stage: str | None = None, advance: int = 0) -> None:
            progress.update(task, description=stage and f"{subject}: {stage}", advance=advance)

        yield step
