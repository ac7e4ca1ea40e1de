"""The GPU check on a machine without a GPU: what fails, hangs or is missing is recorded, and the rest goes on."""

import ast
import importlib
import os
import pkgutil
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import conftest
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import process, program, steps
from benchmarks.gpu_check.outcome import Check, outcome
from benchmarks.report import record
from tests.conftest import ROOT

SHELL = ("sh", "-c")


def make_check(path: Path, kind: str = "cuda") -> Check:
    content = gpu_check._empty()
    device = {"kind": kind, "name": "Some GPU", "driver": "1.2", "cpu": "", "cores": 2, "threads": 2}
    content["conditions"] = content["conditions"] | {"device": device}
    return Check(content, path, "smoke", 60)


def step(name: str, shell: str, **options) -> steps.Step:
    def run(check, seconds):
        return outcome(process.run([*SHELL, shell], seconds))

    return steps.Step(name, run, **{"share": 1} | options)


def raises(check, seconds):
    raise ValueError("a bug")


def statuses(path: Path) -> dict[str, str]:
    return {name: step["status"] for name, step in record.load(path)["steps"].items()}


def test_what_goes_wrong_in_a_step_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_LEAST_SECONDS", 0.1)
    monkeypatch.setattr(gpu_check, "_SECONDS_OF_REPORT", 0)
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


@pytest.mark.parametrize("seconds", [540, 1800])
def test_the_headline_has_its_time_on_a_machine_that_starts_bare(seconds):
    """Whatever the steps before it take of theirs."""
    names = [step.name for step in steps.STEPS]
    assert names[1:4] == ["build", "verify", "headline"] and names[-2:] == ["autotuned", "report"]
    used = {"environment": 40, "build": 110, "verify": 150}
    left = seconds - sum(used.values())
    assert gpu_check._seconds(list(steps.STEPS[3:]), time.monotonic() + left) > 215
    for step, spent in used.items():
        (limit,) = (each.most for each in steps.STEPS if each.name == step)
        assert spent <= limit


def test_parity_takes_the_tests_of_gpu_kernels_alone():
    found = steps.gpu_tests()
    assert found[0] == "tests/test_gpu_kernels.py" and found[1].endswith("/test_cuda.py")
    assert {f"tests/{name}/test_triton.py" for name in ("single_query_attention", "dynamic_mixing", "upconv")} <= set(
        found
    )
    assert all((ROOT / name).exists() for name in found)
    assert not [name for name in found if "compiled" in name or "aot" in name]


def test_what_was_built_elsewhere_or_of_other_sources_is_built_again(tmp_path, monkeypatch):
    check = make_check(tmp_path / "record.json", "cpu")
    info = {"sources": steps._digest_of_sources(), "torch": "2.11", "python": platform.python_version()}
    info |= {"cpp": {"built": True}, "cuda": {"built": False, "archs": []}}
    (tmp_path / "tokenfusion").mkdir()
    (tmp_path / "tokenfusion" / "_C.some.so").touch()
    monkeypatch.setattr(steps, "_build_info", lambda: info)
    monkeypatch.setattr(steps, "_digest_of_sources", lambda digest=info["sources"]: digest)
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    check.conditions["versions"] = {"torch": "2.11"}
    assert steps._is_built(check)
    assert steps.build(check, 9).summary == "built before"
    info["sources"] = "of other sources"
    assert not steps._is_built(check)
    info["sources"] = steps._digest_of_sources()
    check.conditions["device"] |= {"kind": "cuda", "capability": "9.0"}
    assert not steps._is_built(check)
    info["cuda"] = {"built": True, "archs": ["9.0"]}
    assert steps._is_built(check)


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
    assert "no CUDA device" in path.with_suffix(".html").read_text()
    assert f"record: {path}" in done.stdout


@pytest.mark.parametrize(
    "arguments, refusal",
    [
        ([], "--resume"),
        (["--resume", "--commit", "another"], "its commit is None, and here it is another"),
    ],
)
def test_a_record_that_is_there_is_added_to_only_where_it_fits(arguments, refusal, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    make_check(path).save()
    before = path.read_text()

    def environment(check, seconds):
        check.record["conditions"] = make_check(path).conditions | {"commit": os.environ.get("TOKENFUSION_COMMIT")}
        return outcome(process.Finished(process.PASSED, 0, 0.0, ""))

    monkeypatch.setattr(gpu_check, "STEPS", (steps.Step("environment", environment, most=9),))
    monkeypatch.setenv("TOKENFUSION_COMMIT", "")
    monkeypatch.delenv("TOKENFUSION_COMMIT")
    with pytest.raises(gpu_check.Refused, match=refusal):
        gpu_check.main(["--out", str(path), *arguments])
    assert path.read_text() == before


def test_unknown_step_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--steps", "parity,polish"])
    assert "polish" in capsys.readouterr().err


def test_the_headline_is_ten_cases_of_every_operator_and_part_of_the_profile():
    found = {profile: cases_of(profile) for profile in ("headline", "gpu")}
    assert len(found["headline"]) == 10 and found["headline"] <= found["gpu"] and len(found["gpu"]) < 40
    folders = {name.split(".")[2] for name, _ in found["headline"] if ".ops." in name}
    assert folders == {folder for folder, _ in program.gpu_kernels()}


def cases_of(profile: str) -> set[tuple[str, str]]:
    """(module, case)"""
    packages = [importlib.import_module(f"benchmarks.{name}") for name in ("ops", "models", "pooling")]
    names = [
        m.name for p in packages for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}.") if ".test_" in m.name
    ]
    modules = map(importlib.import_module, names)
    return {(module.__name__, str(case)) for module in modules for case in conftest.cases_of(module, profile)}


OPTIONAL = {"monai", "segmentation_models_pytorch", "dynamic_network_architectures", "vit_pytorch", "x_transformers"}
OPTIONAL |= {"open_clip", "accelerate", "opacus", "peft", "torchao", "onnx", "onnxruntime", "onnxscript", "hypothesis"}
OPTIONAL |= {"sklearn", "matplotlib", "transformers"}


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_no_file_of_tests_needs_an_optional_package_to_be_collected(folder):
    """Where it is missing, what needs it is skipped and the rest of the file runs."""
    needed = {}
    for path in (ROOT / folder).rglob("test_*.py"):
        skipped: set[str] = set()
        for statement in ast.parse(path.read_text()).body:
            skipped |= set(re.findall(r"importorskip\(['\"](\w+)", ast.unparse(statement)))
            names = (
                [alias.name for alias in getattr(statement, "names", [])] if isinstance(statement, ast.Import) else []
            )
            names += [statement.module] if isinstance(statement, ast.ImportFrom) else []
            missing = {name.partition(".")[0] for name in names} & (OPTIONAL - skipped)
            needed |= {path.name: missing} if missing else {}
    assert needed == {}
