"""The file that --json names: opened before the long work, so that one that cannot be written costs none."""

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenfusion.cli.errors import UsageError, printable


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Callable[[dict], None]]:
    """Yields the function that writes the record. Without its call a file stays as it was, and no new one is left.

    Raises:
        UsageError: the file cannot be written.
    """
    new, written = not path.exists(), False
    with _reported(path):
        # without blocking: a named pipe that nobody reads is an error, and no wait
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb", buffering=0) as file:
        os.set_blocking(descriptor, True)
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not regular:  # a device says that it is full when it gets something: JSON may begin with an empty line
            with _reported(path):
                file.write(b"\n")

        def write(facts: dict) -> None:
            nonlocal written
            written = True
            rest = memoryview(json.dumps(facts, indent=2).encode() + b"\n")
            with _reported(path, "; the results are those above"):
                if regular:
                    file.truncate(0)
                while rest:
                    rest = rest[file.write(rest) :]

        try:
            yield write
        finally:
            if new and not written:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _reported(path: Path, remark: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"--json: {printable(path)}: {error.strerror}{remark}") from None
