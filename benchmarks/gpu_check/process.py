"""A command with a time limit, whatever it does: hang, crash, leave children behind or print what is no text."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 3
_TAIL = 6000  # characters
_BYTES_READ = 1 << 20
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\n\t -~\u00a0-\U0010ffff]")


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
) -> Finished:
    """Runs a command in a process group of its own, which is killed after `seconds`, or when `stop` says so."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | (environment or {}),
            )
        except OSError as error:
            return Finished(FAILED, None, 0.0, f"{command[0]}: {error}")
        try:
            while process.poll() is None and time.monotonic() - start < seconds and not stop():
                time.sleep(_POLL_SECONDS)
            status = TIMED_OUT if process.poll() is None else FAILED if process.returncode else PASSED
        finally:
            _kill_group(process)
        return Finished(status, process.returncode, time.monotonic() - start, _tail(output))


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
