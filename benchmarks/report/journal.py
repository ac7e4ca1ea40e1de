"""A file that gains a line of JSON for each event of a run, so that a killed process leaves what it had."""

import json
from pathlib import Path


def read(path: Path) -> list[dict]:
    """Its entries, in the order written; a line that was half written is none."""
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def note(path: Path, **entry) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
