"""The GPU check on a machine without a GPU: what fails, hangs or is missing is recorded, and the rest goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import cases, process, steps
from benchmarks.report import record
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


def make_check(path: Path, kind: str = "cuda") -> steps.Check:
    content = gpu_check._empty()
    device = {"kind": kind, "name": "Some GPU", "driver": "1.2", "cpu": "", "cores": 2, "threads": 2}
    content["conditions"] = content["conditions"] | {"device": device}
    return steps.Check(content, path, "smoke", 60, save=lambda: record.save(path, content))


def step(name: str, shell: str, **options) -> steps.Step:
    def run(check, seconds):
        return steps.outcome(process.run([*SHELL, shell], seconds))

    return steps.Step(name, run, **{"share": 1} | options)


def raises(check, seconds):
    raise ValueError("a bug")


def statuses(path: Path) -> dict[str, str]:
    return {name: step["status"] for name, step in record.load(path)["steps"].items()}


def test_what_goes_wrong_in_a_step_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_LEAST_SECONDS", 0.1)
    path = tmp_path / "record.json"
    check = make_check(path)
    chosen = [
        step("fails", "echo something; exit 4"),
        step("hangs", "echo before; sleep 1000"),
        steps.Step("raises", raises, share=1),
        step("garbage", r"printf '\377\000'; exit 1"),
        step("works", "echo fine"),
    ]
    gpu_check.run_steps(chosen, check, time.monotonic() + 8, repeat=False)
    assert statuses(path) == {
        "fails": "failed",
        "hangs": "timed out",
        "raises": "failed",
        "garbage": "failed",
        "works": "passed",
    }
    kept = record.load(path)["steps"]
    assert kept["fails"]["summary"] == "exit status 4: something"
    assert kept["hangs"]["summary"].endswith("before")
    assert kept["raises"]["summary"] == "ValueError: a bug"
    printed = gpu_check.table(check.record)
    assert all(name in printed for name in kept) and "exit status 4: something" in printed


def test_no_step_begins_after_the_time_and_a_second_run_adds_it(tmp_path):
    path = tmp_path / "record.json"
    first, second = step("first", "echo 1"), step("second", "echo 2")
    gpu_check.run_steps([first], make_check(path), time.monotonic() + 60, repeat=False)
    check = make_check(path)
    check.record |= record.load(path)
    check.save = lambda: record.save(path, check.record)
    gpu_check.run_steps([first, second], check, time.monotonic() + 1, repeat=False)
    assert statuses(path) == {"first": "passed", "second": "not reached"}
    assert record.load(path)["steps"]["first"]["summary"] == "1"
    gpu_check.run_steps([step("first", "echo again"), second], check, time.monotonic() + 60, repeat=False)
    assert statuses(path) == {"first": "passed", "second": "passed"}
    assert record.load(path)["steps"]["first"]["summary"] == "1"
    gpu_check.run_steps([step("first", "echo again")], check, time.monotonic() + 60, repeat=True)
    assert record.load(path)["steps"]["first"]["summary"] == "again"


def test_steps_for_a_gpu_are_skipped_without_one(tmp_path):
    path = tmp_path / "record.json"
    gpu_check.run_steps(
        [step("parity", "exit 1", needs_gpu=True)], make_check(path, "cpu"), time.monotonic() + 60, repeat=False
    )
    assert record.load(path)["steps"]["parity"]["summary"] == "no CUDA device"
    assert statuses(path) == {"parity": "skipped"}


def test_tuning_is_a_step(tmp_path):
    found = steps.tune(make_check(tmp_path / "record.json", "cpu"), 40)
    assert found.status == "passed", found.log
    assert found.facts["tuning"]["entries"] and "0 with a kernel that was refused" in found.summary


def sanitizer_outcome(tmp_path, script: str | None) -> steps.Outcome:
    check = make_check(tmp_path / "record.json")
    tool = None
    if script is not None:
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    check.conditions["tools"] = {"compute-sanitizer": tool and str(tool)}
    return steps.sanitizer("memcheck", check, 30)


@pytest.mark.parametrize(
    "script, status, summary",
    [
        (None, "skipped", "compute-sanitizer not found"),
        ("echo '========= ERROR SUMMARY: 0 errors'", "passed", "ERROR SUMMARY: 0 errors"),
        ("echo '========= ERROR SUMMARY: 2 errors'; exit 9", "failed", "ERROR SUMMARY: 2 errors"),
        ("echo Device not supported; exit 1", "failed", "exit status 1: Device not supported"),
        ("echo nothing to say", "failed", "memcheck gave no summary"),
    ],
)
def test_verdict_of_the_sanitizer(script, status, summary, tmp_path):
    found = sanitizer_outcome(tmp_path, script)
    assert (found.status, found.summary) == (status, summary)


def test_tests_that_are_all_skipped_prove_nothing(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("import pytest\ndef test_a():\n    pytest.skip('no')\n")
    found = steps.pytest([str(file)], 60)
    assert (found.status, found.summary) == ("failed", "0 tests passed, 0 failed, 1 skipped")
    file.write_text("def test_a():\n    pass\ndef test_b():\n    assert False\n")
    found = steps.pytest([str(file)], 60)
    assert (found.status, found.summary) == ("failed", "1 tests passed, 1 failed, 0 skipped")
    assert [name.split("::")[1] for name in found.facts["failed_tests"]] == ["test_b"]


def test_parity_finds_the_gpu_tests_of_every_operator(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(steps, "pytest", lambda arguments, seconds: seen.extend(arguments))
    steps.parity(make_check(tmp_path / "record.json"), 9)
    assert {"tests/test_gpu_kernels.py", "tests/single_query_attention/test_triton.py"} <= set(seen)
    assert all((ROOT / name).exists() for name in seen)


SUITE = """
import os, time
import pytest
from benchmarks.conftest import _ROWS

CASES = {"full": ["measures", "hangs", "crashes", "has a fault", "is skipped", "comes last"]}

def test_cases(case, request):
    if case == "hangs":
        time.sleep(1000)
    if case == "crashes":
        os._exit(7)
    if case == "is skipped":
        pytest.skip("no need")
    assert case != "has a fault", "CUDA error: of this case"
    request.node.stash[_ROWS] = [{"group": "g", "case": {"name": case}, "variant": "eager"}]
"""


@pytest.fixture
def suite(tmp_path, monkeypatch) -> list[str]:
    """The command of a small set of benchmarks, which uses the journal as the real ones do."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "conftest.py").write_text("from benchmarks.conftest import *\n")
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "test_cases.py").write_text(SUITE)
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--rootdir={tmp_path}"]
    return [sys.executable, "-m", "pytest", str(tmp_path), *options]


def test_a_case_that_hangs_or_crashes_costs_itself_alone(suite, tmp_path):
    content = gpu_check._empty()
    saved = tmp_path / "record.json"
    runner = cases.Runner(content, suite, case_seconds=3, save=lambda: record.save(saved, content))
    runner.run(time.monotonic() + 150)
    found = {name.rpartition("[")[2].rstrip("]"): case["state"] for name, case in content["cases"].items()}
    assert found == {
        "test_broken.py": "with a fault",
        "measures": "measured",
        "hangs": "timed out",
        "crashes": "crashed",
        "has a fault": "with a fault",
        "is skipped": "skipped",
        "comes last": "measured",
    }
    reasons = {case["state"]: case["reason"] for case in content["cases"].values()}
    assert reasons["crashed"] == "exit status 7" and "no need" in reasons["skipped"]
    assert [row["case"]["name"] for row in record.load(saved)["rows"]] == ["measures", "comes last"]


def test_cases_that_were_not_reached_are_added_later(suite):
    content = gpu_check._empty()
    content["cases"] = {
        "test_cases.py::test_cases[hangs]": {"state": "timed out", "reason": "", "seconds": 1.0},
        "test_cases.py::test_cases[crashes]": {"state": "crashed", "reason": "", "seconds": 1.0},
        "test_cases.py::test_cases[measures]": {"state": "not reached", "reason": "", "seconds": 0.0},
    }
    cases.Runner(content, suite, case_seconds=60, save=lambda: None).run(time.monotonic() + 1)
    assert content["cases"]["test_cases.py::test_cases[measures]"]["state"] == "not reached"
    cases.Runner(content, suite, case_seconds=60, save=lambda: None).run(time.monotonic() + 60)
    states = {name.rpartition("[")[2].rstrip("]"): case["state"] for name, case in content["cases"].items()}
    assert states["measures"] == states["comes last"] == "measured" and states["hangs"] == "timed out"


def run_check(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_on_a_machine_without_a_gpu(tmp_path):
    path = tmp_path / "record.json"
    arguments = ["--out", str(path), "--minutes", "5", "--commit", "0123456789ab", "--steps"]
    done = run_check(*arguments, "parity,memcheck")
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(path) == {"environment": "passed", "parity": "skipped", "memcheck": "skipped", "report": "passed"}
    loaded = record.load(path)
    assert loaded["conditions"]["commit"] == "0123456789ab" and loaded["conditions"]["device"]["kind"] == "cpu"
    assert loaded["steps"]["memcheck"]["summary"] == "no CUDA device"
    assert "no CUDA device" in (tmp_path / "record" / "report.html").read_text()
    assert f"record: {path}" in done.stdout

    refused = run_check(*arguments, "repeats")
    assert refused.returncode != 0 and "--resume" in refused.stderr
    assert "repeats" not in statuses(path)
    other = run_check("--out", str(path), "--resume", "--commit", "another", "--steps", "repeats")
    assert other.returncode != 0 and "its commit is 0123456789ab, and here it is another" in other.stderr
    assert run_check(*arguments, "repeats", "--resume").returncode == 0
    assert statuses(path) == statuses(path) | {"parity": "skipped", "memcheck": "skipped", "repeats": "skipped"}


def test_unknown_step_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--steps", "parity,polish"])
    assert "polish" in capsys.readouterr().err
