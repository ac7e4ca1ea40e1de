"""What is made of the reports of compute-sanitizer's tools."""

import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import sanitizer
from benchmarks.gpu_check.outcome import Outcome
from tests.gpu_check.test_check import make_check

KERNELS = {"one,cuda": [sys.executable, "-c", "pass"]}


def outcome_of(folder: Path, script: str | None, seconds: float = 30) -> Outcome:
    check = make_check(folder / "record.json")
    tool = None
    if script is not None:
        tool = folder / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    check.conditions["tools"] = {"compute-sanitizer": tool and str(tool)}
    return sanitizer.run("racecheck", KERNELS, {}, check, seconds)


@pytest.mark.parametrize(
    "script, status, words",
    [
        (None, "skipped", "compute-sanitizer not found"),
        ("echo '========= ERROR SUMMARY: 0 errors'", "passed", "0 errors, 0 warnings in 1 of 1 kernels"),
        ("echo '========= ERROR SUMMARY: 1 error'; exit 9", "failed", "1 errors"),
        ("echo '= RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)'; exit 9", "passed", "0 errors, 3 w"),
        ("echo '= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)'; exit 9", "failed", "2 errors, 1 w"),
        ("echo '= ERROR SUMMARY: 0 errors'; echo 3 failed; exit 1", "failed", "one,cuda: exit status 1: 3 failed"),
        ("echo Device not supported; exit 1", "failed", "exit status 1: Device not supported"),
        ("echo nothing to say", "failed", "racecheck gave no summary"),
    ],
)
def test_verdict(script, status, words, tmp_path):
    found = outcome_of(tmp_path, script)
    assert found.status == status and words in found.summary


def test_what_was_seen_is_not_run_again(tmp_path):
    script = f"echo once >> {tmp_path}/runs; echo '= ERROR SUMMARY: 0 errors'"
    assert [outcome_of(tmp_path, script).status for _ in range(2)] == ["passed", "passed"]
    assert (tmp_path / "runs").read_text() == "once\n"


def test_a_time_out_is_no_verdict(tmp_path):
    found = outcome_of(tmp_path, "sleep 100", seconds=1)
    assert (found.status, found.facts["not_reached"]) == ("timed out", ["one,cuda"])
