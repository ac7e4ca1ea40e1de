"""What a command reports to its user in one line, without a traceback."""

import os


class UsageError(Exception):
    """An argument that cannot be used; the message names it, what came and what was expected."""


def first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def printable(path: str | os.PathLike) -> str:
    """A path as a terminal can show it: bytes that are no UTF-8, and control characters, as escapes."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
