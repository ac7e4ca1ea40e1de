"""Where the measurements of a machine are kept, and which of them are in force.

The variable TOKENFUSION_TUNING names a file, or is 0 for none; else there is one a device in the user's cache folder;
else one that comes with the package, which holds for its kind of device. A file that does not fit is ignored, and
`tokenfusion info` says why.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tokenfusion.kernels.choices import Table, Workload
from tokenfusion.tuning import machine

_SCHEMA = 1
_PACKAGED = Path(__file__).parent / "defaults"
_VARIABLE = "TOKENFUSION_TUNING"


@dataclass(frozen=True)
class Loaded:
    """The table in force; where it is from, if anywhere; why other files are not; and what may have changed since."""

    table: Table
    path: Path | None = None
    digest: str = ""
    ignored: tuple[str, ...] = ()
    remark: str | None = None


def user_path() -> Path:
    """Where `tokenfusion tune` writes for this device.

    Raises:
        OSError: the user has no home, as one of a container may not.
    """
    chosen = os.environ.get(_VARIABLE, "")
    if chosen not in ("", "0"):
        return Path(chosen)
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from None
    return Path(cache) / "tokenfusion" / f"{machine.name()}.json"


@functools.cache
def loaded() -> Loaded:
    """What "auto" follows in this process: the first file that fits this machine, read once."""
    named = os.environ.get(_VARIABLE)
    if named == "0":
        return Loaded(Table({}))
    paths, ignored = [], []
    with contextlib.suppress(OSError):
        paths.append(user_path())
    if not named:
        paths.append(_PACKAGED / f"{machine.name()}.json")
    for path in paths:
        try:
            entries, digest, remark = _read(path, packaged=path.parent == _PACKAGED)
        except FileNotFoundError:
            if named:
                ignored.append(f"{path}: there is no such file")
        except (OSError, ValueError) as error:
            ignored.append(f"{path}: {error}")
        else:
            return Loaded(table_of(entries), path, digest, tuple(ignored), remark)
    return Loaded(Table({}), ignored=tuple(ignored))


def read(path: Path) -> list[dict]:
    """The entries of a file that fits this machine.

    Raises:
        OSError: it cannot be read.
        ValueError: it is of another machine or version, or no such file at all; the message says why.
    """
    return _read(path)[0]


def choices_of(entries: list[dict]) -> dict[Workload, str]:
    return {workload_of(entry): entry["choice"] for entry in entries if entry["choice"] is not None}


def table_of(entries: list[dict]) -> Table:
    """With what was found wrong in any entry."""
    refused = ((entry["operator"], name) for entry in entries for name in entry.get("wrong", ()))
    return Table(choices_of(entries), frozenset(refused))


def workload_of(entry: dict) -> Workload:
    """
    Raises:
        KeyError, TypeError: it is none.
    """
    workload = Workload(entry["operator"], tuple(entry["kind"]), tuple(entry["sizes"]))
    if any(type(size) is not int for size in workload.sizes) or not all(
        isinstance(word, str) for word in workload.kind
    ):
        raise TypeError(f"sizes are numbers, and kinds are words: {workload}")
    return workload


def write(path: Path, entries: list[dict]) -> None:
    """In one step: a reader finds the old file or the new one, whole.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    text = json.dumps(
        {"schema": _SCHEMA, "conditions": machine.conditions(), "noted": machine.noted(), "entries": entries}, indent=1
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _remark(noted) -> str | None:
    then, now = noted.get("driver") if isinstance(noted, dict) else None, machine.noted().get("driver")
    return None if then == now else f"measured with driver {then}, here {now}"


def _read(path: Path, packaged: bool = False) -> tuple[list[dict], str, str | None]:
    """The entries, a digest of the file, and a remark on the driver if it is another one than then."""
    data = path.read_bytes()
    try:
        content = json.loads(data)
        schema, found, entries = content["schema"], dict(content["conditions"]), content["entries"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("it is no tuning file, or not a whole one") from None
    if schema != _SCHEMA:
        raise ValueError(f"schema {schema!r}, expected {_SCHEMA}")
    here_found = machine.conditions()
    for name, here in {"device": here_found["device"]}.items() if packaged else here_found.items():
        if found.get(name) != here:
            raise ValueError(f"{name} {found.get(name)!r}, here {here!r}")
    try:
        table_of(entries)
    except (KeyError, TypeError):
        raise ValueError("an entry lacks its operator, kind, sizes or choice") from None
    return entries, hashlib.sha256(data).hexdigest()[:12], None if packaged else _remark(content.get("noted"))
