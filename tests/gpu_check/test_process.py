"""Commands with a time limit: none outlives it, its children or the check, whatever it does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import process
from tests.conftest import ROOT

SHELL = ("sh", "-c")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid: int) -> None:
    end = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < end, f"process {pid} lives on"
        time.sleep(0.05)


@pytest.mark.parametrize("end", ["wait", "exit 0"])
def test_children_end_with_their_command(end):
    finished = process.run([*SHELL, f"sleep 1000 & echo $!; {end}"], seconds=1)
    assert finished.status == (process.PASSED if end == "exit 0" else process.TIMED_OUT)
    wait_for_end(int(finished.log))


def test_a_command_that_ignores_the_first_signal():
    finished = process.run([*SHELL, "trap '' TERM; echo $$; while true; do sleep 0.1; done"], seconds=0.5)
    assert finished.status == process.TIMED_OUT and finished.seconds < 10
    assert not is_alive(int(finished.log))


def test_output_that_is_no_text():
    finished = process.run([*SHELL, r"printf '\377\376\000\033[31mred\033[0m\001 and \303\251\n'; exit 3"], seconds=9)
    assert (finished.status, finished.returncode) == (process.FAILED, 3)
    assert finished.log.endswith("red and é")
    assert json.loads(json.dumps(finished.log)) == finished.log and "\x00" not in finished.log


def test_long_output_keeps_its_end():
    finished = process.run([sys.executable, "-c", "print('x' * 5_000_000); print('the end')"], seconds=60)
    assert finished.log.endswith("the end") and len(finished.log) < 10_000


def test_missing_program():
    finished = process.run(["no-such-program"], seconds=9)
    assert finished.status == process.FAILED and "no-such-program" in finished.log


def test_a_command_that_is_killed_from_outside():
    finished = process.run([*SHELL, "kill -9 $$"], seconds=9)
    assert (finished.status, finished.returncode) == (process.KILLED, -9)


def test_the_log_grows_while_a_command_runs(tmp_path):
    log, seen = tmp_path / "log", []
    log.write_text("before\n")

    def stop() -> bool:
        seen.append(log.read_text())
        return seen[-1] == "before\nhello\n"

    finished = process.run([*SHELL, "echo hello; sleep 1000"], seconds=60, stop=stop, log=log)
    assert finished.seconds < 30 and finished.log == "hello"


def test_a_command_does_not_outlive_the_check(tmp_path):
    program = (
        "import sys; from benchmarks.gpu_check import process; "
        f"process.run(['sh', '-c', 'echo $$ > {tmp_path}/pid; sleep 1000'], 1000)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as check:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        os.kill(check.pid, signal.SIGKILL)
    wait_for_end(int((tmp_path / "pid").read_text()))
