"""A record: the conditions of a run, its rows, and what `make gpu-check` found, as JSON. Needs no torch."""

import json
import os
import re
from pathlib import Path

from benchmarks.report import table

_ROOT = Path(__file__).parents[2]
RECORDS = _ROOT / "benchmarks" / "records"  # kept in the repository
RESULTS = _ROOT / "benchmarks" / "results"  # of a single run
_METHOD = "variants in turn in every round, x = median of the ratios round by round"


def save(path: Path, content: dict) -> Path:
    """Writes conditions, rows and the rest, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content | {"rows": ordered(content["rows"])}
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)
    return path


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def ordered(rows: list[dict]) -> list[dict]:
    """Group by group and case by case, as they first appear; of rows of the same variant of a case the last one."""
    places: dict[str, dict[str, dict[str, dict]]] = {}
    for row in rows:
        cases = places.setdefault(row["group"], {})
        cases.setdefault(json.dumps(row["case"]), {})[row["variant"]] = row
    return [row for cases in places.values() for variants in cases.values() for row in variants.values()]


def of_kernels(rows: list[dict]) -> list[dict]:
    """The rows of this package's GPU kernels, to be set beside predictions: what ran, on what, and how fast.

    sizes are those of the case; share_of_copy is the rate at which the bytes that must move moved, as a share of that
    of a large copy.
    """
    found = []
    for row in rows:
        kernel, is_op, _ = row["group"].partition(", the op")
        if row["backend"] not in table.GPU_BACKENDS or row["fault"] or not is_op:
            continue
        sizes = {name: value for name, value in row["case"].items() if name not in ("dtype", "direction")}
        times = {"microseconds": 1e6 * row["seconds"], "share_of_copy": row["share_of_copy"]}
        named = {"kernel": kernel, "backend": row["backend"], "variant": row["variant"], "sizes": sizes}
        found.append(named | {"dtype": row["case"]["dtype"], "direction": row["case"]["direction"]} | times)
    return found


def file_name(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def default_path(conditions: dict) -> Path:
    return RESULTS / f"{file_name(conditions['device']['name'] + ' ' + conditions['date'].split('+')[0])}.json"


def summary(conditions: dict) -> str:
    """The conditions in a few lines."""
    device, versions = conditions["device"], conditions["versions"]
    names = ("tokenfusion", "torch", "triton", "timm")
    installed = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    parts = [device["name"], f"{device['threads']} threads", conditions["isa"], device["driver"]]
    return "\n".join(
        (
            ", ".join(str(part) for part in parts if part),
            f"{installed}, commit {conditions['commit']}, {conditions['date']}, profile {conditions['profile']}",
            f"{conditions['cache']}; {_METHOD}",
        )
    )
