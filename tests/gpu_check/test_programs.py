"""The programs that a check starts, where Triton's interpreter stands for the GPU."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_check import kernels, program, proofs
from benchmarks.report import journal
from tokenfusion.kernels.choices import Workload
from tokenfusion.kernels.dispatch import OPERATORS
from tokenfusion.tuning.files import workload_of

SMALL = [
    Workload("tied_ffn", (dtype, direction), (17, 16, 16))
    for dtype in ("float32", "float16")
    for direction in ("inference", "training")
]
SKIPPED = {"skipped: nothing is held in inference", "skipped: there is one size of tiles in float32"}


@pytest.fixture
def small_workloads(monkeypatch):
    monkeypatch.setattr(proofs, "WORKLOADS", SMALL)


@pytest.fixture
def options(tmp_path) -> list[str]:
    return ["--kernel", "tied_ffn,triton", "--journal", str(tmp_path / "journal"), "--piece", "p"]


def entries(path) -> dict[str, str]:
    return {entry["case"]: entry["fault"] for entry in journal.read(path) if entry.get("state") == "ended"}


def test_every_gpu_kernel_is_in_one_piece():
    pieces = program.gpu_kernels()
    assert pieces == sorted(pieces, key=lambda kernel: kernel[1] != "cuda")
    for operator in OPERATORS:
        for backend in kernels.gpu_backends(operator):
            fitting = [folder for folder, other in pieces if operator.startswith(folder) and backend == other]
            assert len(fitting) == 1, (operator, backend)


def test_proofs_are_kept_one_by_one_riskiest_first(small_workloads, options, tmp_path, capsys):
    assert proofs.main(["verify", *options]) == 0, capsys.readouterr().out
    found = entries(tmp_path / "journal")
    assert {fault for fault in found.values() if fault is not None} == SKIPPED
    kinds = [("training" in name, "float16" in name) for name in found]
    assert list(dict.fromkeys(kinds)) == [(True, True), (True, False), (False, True), (False, False)]
    assert proofs.main(["verify", *options]) == 1 and "0 ran, 0 failed" in capsys.readouterr().out
    assert entries(tmp_path / "journal") == found


def test_a_wrong_kernel_is_said(small_workloads, options, tmp_path, monkeypatch):
    monkeypatch.setattr(proofs.proof, "why_wrong", lambda call, implementation, expected: "it is wrong")
    assert proofs.main(["verify", *options]) == 1
    assert set(entries(tmp_path / "journal").values()) == {"AssertionError: it is wrong", *SKIPPED}


def test_a_kernel_that_got_stuck_is_left_out_of_calls_like_it(options, tmp_path, monkeypatch):
    monkeypatch.setattr(proofs, "WORKLOADS", SMALL[:2])
    monkeypatch.setattr(proofs.proof, "why_wrong", lambda call, implementation, expected: None)
    monkeypatch.setattr(proofs.search, "_SECONDS", 0.01)
    first = next(each for each in proofs.proofs() if each.implementation.backend == "triton")
    path = tmp_path / "journal"
    verdict = {"state": "ended", "verdict": "timed out", "fault": "stopped after 45 s", "rows": [], "seconds": 45}
    journal.note(path, piece="an earlier one", case=first.name, **verdict)
    proofs.main(["verify", *options])
    found = entries(path)
    assert "like a call that got stuck" in found[first.name]
    assert sum(fault is None for fault in found.values()) == 2
    proofs.main(["tune", "--table", str(tmp_path / "t.json"), "--journal", str(path), "--piece", "tune"])
    tuned = json.loads((tmp_path / "t.json").read_text())["entries"]
    assert {workload_of(entry) for entry in tuned} == set(SMALL[:2]) - {first.workload}


def test_repeats_of_one_kernel(options, tmp_path, monkeypatch, capsys):
    (call,) = (call for call in kernels.small_calls(torch.float32) if call.label == "narrow")
    monkeypatch.setattr(kernels, "DTYPES", (torch.float32,))
    monkeypatch.setattr(kernels, "small_calls", lambda dtype: [call, replace(call, operator="dynamic_mixing")])
    assert kernels.main(["repeats", "--count", "2", *options]) == 0
    assert entries(tmp_path / "journal") == {"tied_ffn, triton, torch.float32, narrow": None}
    assert "2 repeats, all bit-equal" in capsys.readouterr().out


def test_a_check_after_which_cuda_is_unusable_is_the_last_of_its_process(tmp_path, capsys):
    def fails(left: int) -> str:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    parser = program.argparse.ArgumentParser()
    program.add_options(parser)
    args = parser.parse_args(["--journal", str(tmp_path / "journal"), "--piece", "p"])
    assert program.run(args, {"a": lambda left: "ran", "b": fails, "c": lambda left: "ran"}) == 1
    assert list(entries(tmp_path / "journal")) == ["a", "b"]
    assert program.run(args, {"a": fails, "b": fails, "c": lambda left: "ran"}) == 0
    assert list(entries(tmp_path / "journal")) == ["a", "b", "c"]
