"""A check that is killed in any of its steps, as a whole or in one of its programs, loses what was running alone."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.gpu_check.steps import STEPS
from benchmarks.report import record
from tests.conftest import ROOT
from tests.gpu_check.test_process import is_alive

PIECES = {  # step -> where in it
    "environment": "environment",
    "build": "build",
    "verify": "verify one,cuda",
    "headline": "headline",
    "roofline": "roofline",
    "tune": "tune",
    "parity": "tests tests/one/test_cuda.py",
    "repeats": "repeats two,triton",
    "benchmarks": "cases",
    "memcheck": "memcheck",
    "racecheck": "racecheck",
    "suite": "suite one",
    "autotuned": "autotuned",
    "report": "report",
}
SANITIZER = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.gpu_check import fake_program
fake_program.may_go_wrong(sys.argv[2])
fake_program.done(f"{{sys.argv[2]}} {{sys.argv[-1]}}")
print("========= RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)")
sys.exit(9)
"""


_DATE = "2026-11-27T23:00:00+00:00"


class Runs:
    """Runs of one check, with the files that it leaves."""

    def __init__(self, folder: Path):
        self.fake, self.out = folder / "fake", folder / "out"
        self.fake.mkdir()
        tool = self.fake / "compute-sanitizer"
        tool.write_text(SANITIZER)
        tool.chmod(0o755)

    def command(self, *arguments: str, date: str = _DATE) -> dict:
        command = [sys.executable, "-m", "tests.gpu_check.fake_run", "--out", str(self.out), "--commit", "0123456789ab"]
        environment = os.environ | {"FAKE": str(self.fake), "FAKE_DATE": date, "PYTHONPATH": str(ROOT)}
        return {"args": [*command, *arguments], "cwd": ROOT, "env": environment}

    def run(self, *arguments: str, faults: Iterable[str] = (), date: str = _DATE):
        for i, fault in enumerate(faults):
            (self.fake / f"{i}.fault").write_text(fault)
        done = subprocess.run(**self.command(*arguments, date=date), capture_output=True, text=True)
        assert not list(self.fake.glob("*.fault")), done.stdout
        return done

    @property
    def record_path(self) -> Path:
        (path,) = (path for path in self.out.glob("*.json") if "tuning" not in path.name)
        return path

    @property
    def record(self) -> dict:
        return record.load(self.record_path)

    def statuses(self) -> dict[str, str]:
        return {name: step["status"] for name, step in self.record["steps"].items()}

    def done(self) -> Counter:
        return Counter((self.fake / "done").read_text().splitlines())


@pytest.fixture
def runs(tmp_path) -> Runs:
    return Runs(tmp_path)


def assert_is_whole(runs: Runs) -> None:
    content = runs.record
    assert set(content["cases"]) == {f"cases {i}" for i in range(4)}
    assert {case["state"] for case in content["cases"].values()} == {"measured"}
    assert [row["variant"] for row in content["rows"]] == [f"cases {i}" for i in range(4)]
    assert content["ceilings"] and content["steps"]["racecheck"]["warnings"] == 6


def test_every_step_has_a_place_to_be_killed_in():
    assert [step.name for step in STEPS] == list(PIECES)


def test_a_run_that_is_killed_in_every_step_comes_to_its_end(runs):
    assert runs.run(faults=["environment the-check"]).returncode == -9
    assert not runs.out.exists()
    for step, piece in list(PIECES.items())[1:]:
        assert runs.run("--resume", faults=[f"{piece} the-check"]).returncode == -9
        assert runs.statuses()[step] == "running"
    done = runs.run("--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.statuses() == dict.fromkeys(PIECES, "passed"), done.stdout
    assert_is_whole(runs)
    repeated = {what for what, count in runs.done().items() if count > 1}
    # of those that run at once, one may have ended just before the other killed the check
    at_once = {f"{step} {kernels}" for step in ("memcheck", "racecheck") for kernels in ("one,cuda", "two,triton")}
    assert repeated - at_once == {"benchmarks.measure.environment"}


def test_programs_that_are_killed_cost_what_they_were_doing(runs):
    places = list(PIECES.items())[1:]
    assert runs.run(faults=[f"{piece} killed" for _, piece in places]).returncode == 0
    for step, piece in places:
        found = runs.record["steps"][step]
        if step in ("memcheck", "racecheck"):
            assert found["status"] == "timed out" and found["not_reached"] in (["one,cuda"], ["two,triton"])
        elif step in ("build", "roofline", "report"):
            assert found["status"] == "killed" and "signal 9" in found["summary"]
        else:
            name, fault = list(found["faults"].items())[-1]
            assert found["status"] == "failed" and fault == "crashed: exit status -9"
            assert name.startswith("cases 1" if step == "headline" else piece)
    assert runs.run("--resume").returncode == 0
    passed = {step for step, status in runs.statuses().items() if status == "passed"}
    assert passed == {"environment", "build", "roofline", "memcheck", "racecheck", "report"}
    assert not [what for what, count in runs.done().items() if count > 1 and not what.startswith("benchmarks.")]


def test_a_hang_is_stopped_and_named(runs):
    done = runs.run("--steps", "benchmarks", "--case-seconds", "1", faults=["cases hangs"])
    assert runs.record["cases"]["cases 3"]["state"] == "timed out", done.stdout
    assert runs.record["cases"]["cases 3"]["reason"] == "stopped after 1 s"


def test_a_run_that_is_asked_to_end_leaves_nothing_running(runs):
    (runs.fake / "0.fault").write_text("verify hangs")
    with subprocess.Popen(**runs.command("--steps", "verify"), stdout=subprocess.DEVNULL) as check:
        while not (runs.fake / "0.taken").exists():
            time.sleep(0.02)
        children = Path(f"/proc/{check.pid}/task").glob("*/children")
        children = [int(pid) for path in children for pid in path.read_text().split()]
        check.terminate()
        assert check.wait(20) == 128 + signal.SIGTERM
    assert children and not any(map(is_alive, children))
    assert runs.statuses()["verify"] == "running"


def test_the_files_beside_a_record_are_few_and_have_all(runs):
    runs.run()
    record = runs.record_path
    names = {path.name.removeprefix(record.stem) for path in runs.out.iterdir()}
    assert record.stem.startswith("some-gpu-2") and names == {".json", ".journal", ".log", ".html"}
    assert "running verify one,cuda 3" in runs.record_path.with_suffix(".log").read_text()


def test_midnight_and_another_folder_keep_the_record(runs):
    runs.run("--steps", "build,roofline")
    earlier = runs.record_path.rename(runs.out / "some-gpu-2026-11-26.json")
    runs.record_path.with_suffix(".journal").touch()
    runs.run("--resume", "--steps", "tune", date="2026-11-28T00:01:00+00:00")
    assert runs.record_path == earlier and set(runs.statuses()) == {
        "environment",
        "build",
        "roofline",
        "tune",
        "report",
    }

    first, runs.out = runs.out, runs.out.parent / "second"
    assert runs.run("--resume", str(first), "--steps", "tune,repeats").returncode == 0
    assert runs.record_path.name == earlier.name and {"tune", "repeats", "roofline"} <= set(runs.statuses())
    assert max(runs.done()[f"tune {i}"] for i in range(4)) == 1
    refused = runs.run("--resume", str(runs.fake), "--steps", "tune")
    assert refused.returncode != 0 and "has no record of" in refused.stderr
