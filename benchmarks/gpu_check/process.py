"""A command with a time limit, whatever it does: hang, crash, leave children behind or print what is no text."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PASSED, FAILED, TIMED_OUT, KILLED = "passed", "failed", "timed out", "killed"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 3
_TAIL = 6000  # characters
_BYTES_READ = 1 << 20
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\n\t -~\u00a0-\U0010ffff]")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

ending = threading.Event()  # once it is set every command ends


@dataclass(frozen=True)
class Finished:
    """What became of a command. log is the end of what it printed, stdout and stderr together."""

    status: str
    returncode: int | None
    seconds: float
    log: str


def run(
    command: Sequence[str],
    seconds: float,
    *,
    environment: Mapping[str, str] | None = None,
    stop: Callable[[], bool] = lambda: False,
    log: Path | None = None,
) -> Finished:
    """Runs a command in a process group of its own, which is killed after `seconds`, or when `stop` says so.

    It does not outlive this process. What it prints is added to the file `log` as it comes.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
            )
        except OSError as error:
            return Finished(FAILED, None, 0.0, f"{command[0]}: {error}")
        copied = 0
        try:
            while process.poll() is None and time.monotonic() - start < seconds and not ending.is_set() and not stop():
                time.sleep(_POLL_SECONDS)
                copied = _copy_new(output, copied, log)
            status = _status(process.poll())
        finally:
            _kill_group(process)
            _copy_new(output, copied, log)
        return Finished(status, process.returncode, time.monotonic() - start, _tail(output))


def _status(returncode: int | None) -> str:
    if returncode is None:
        return TIMED_OUT
    return KILLED if returncode < 0 else FAILED if returncode else PASSED


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _copy_new(output, copied: int, log: Path | None) -> int:
    """Adds to the log what was printed since; up to where that was copied."""
    while log is not None and (new := os.pread(output.fileno(), _BYTES_READ, copied)):
        with log.open("ab") as file:
            file.write(new)
        copied += len(new)
    return copied


def _kill_group(process: subprocess.Popen) -> None:
    """The command and what it started, also where it has ended itself."""
    for sign, patience in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _tail(output) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(size - _BYTES_READ, 0))
    text = output.read().decode("utf-8", errors="replace").replace("\r", "\n")
    return _ESCAPES.sub("", text).rstrip()[-_TAIL:]
