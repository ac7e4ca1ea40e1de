"""A file that gains a line of JSON for each event of a run, so that a killed process leaves what it had.

Several processes may write to one: each is a piece of the run, and finds its own entries by that name.
"""

import json
import os
from pathlib import Path


class Reader:
    """Of a journal that grows: its entries, in the order written; a line that was half written is none."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0

    def new(self) -> list[dict]:
        """What has come since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")
        self._offset += len(whole[0]) + len(whole[1])
        return [entry for entry in map(_parsed, whole[0].splitlines()) if entry is not None]


def read(path: Path, piece: str | None = None) -> list[dict]:
    """All entries, or those of a piece."""
    return [entry for entry in Reader(path).new() if piece in (None, entry.get("piece"))]


def note(path: Path, **entry) -> None:
    """Appends in one go, on a line of its own even where the line before was cut off."""
    line = json.dumps(entry).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        is_cut = size and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, b"\n" * bool(is_cut) + line)
    finally:
        os.close(handle)


def _parsed(line: bytes) -> dict | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
