import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def _row(variant: str, backend: str | None, length: int, seconds: float, **changes) -> dict:
    row = {
        "group": "some layer",
        "case": {"B": 8, "N": length, "dtype": "float32", "direction": "forward"},
        "variant": variant,
        "backend": backend,
        "fault": None,
        "peak_bytes": 1000 * length,
        "moved_bytes": 400 * length,
        "flops": 100 * length,
        "error": 1e-7,
        "allowed_error": 5e-7,
        "seconds": seconds,
        "quartiles": [0.9 * seconds, 1.1 * seconds],
        "rounds": 9,
        "times_eager": 1.5,
        "times_compiled": None,
        "bytes_per_second": 1e9,
        "flops_per_second": 1e9,
        "memory_ceiling_seconds": seconds / 2,
        "arithmetic_ceiling_seconds": seconds / 4,
        "share_of_ceiling": 0.5,
    }
    return row | changes


def _failed(row: dict) -> dict:
    measured = ("peak_bytes", "error", "allowed_error")
    timed = list(row)[list(row).index("seconds") :]
    fault = {"fault": "RuntimeError: <out of luck>", **dict.fromkeys(measured)}
    return {name: value for name, value in row.items() if name not in timed} | fault


@pytest.fixture
def synthetic_record(tmp_path) -> Path:
    from benchmarks import record

    rows = [
        row
        for length in (65, 401, 4097)
        for row in (
            _row("eager", None, length, 1e-5 * length),
            _failed(_row("projections + SDPA", None, length, 1e-5 * length)),
            _row("tokenfusion (cuda)", "cuda", length, 1e-6 * length),
        )
    ]
    conditions = record.conditions("smoke")
    conditions["device"] |= {"kind": "cuda", "name": "Some GPU", "driver": "1.2.3"}
    return record.save(tmp_path / "record.json", conditions, rows)


def test_smoke_profile_writes_a_record(tmp_path):
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "--profile", "smoke"]
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--record", str(path), "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.index("median") :]
    assert max(map(len, table.splitlines())) <= 120
    loaded = json.loads(path.read_text())
    assert loaded["conditions"]["versions"]["torch"] == torch.__version__
    assert {row["group"] for row in loaded["rows"]} == {
        "single_query_attention, the op",
        "CrossAttentionBlock, eager is timm's",
    }
    for row in loaded["rows"]:
        assert row["fault"] is None
        assert row["variant"] in table
        assert row["seconds"] > 0 and row["peak_bytes"] > 0
        assert row["error"] <= row["allowed_error"]
        assert row["times_eager"] == 1 or row["variant"] != "eager"


def test_report_makes_plots_and_one_page(synthetic_record, tmp_path, capsys):
    from benchmarks import report

    report.main([str(synthetic_record), "--out", str(tmp_path / "report"), "--markdown"])
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {"time.png", "memory.png", "speedups-some-layer.png", "report.html"}
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert "Some GPU" in page and "1.2.3" in page
    assert "&lt;out of luck&gt;" in page
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert lines[-1].startswith("| B 8, N 4097, float32, forward | 41 ms | failed | 4.1 ms (1.50x) |")


def test_record_of_one_length_has_no_plot_against_length(synthetic_record, tmp_path):
    from benchmarks import record, report

    loaded = record.load(synthetic_record)
    loaded["rows"] = loaded["rows"][:3]
    report.write(loaded, tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"speedups-some-layer.png", "report.html"}


def test_variants_with_a_fault_are_not_timed():
    from benchmarks import harness
    from benchmarks.problem import Problem, Variant

    def fails(x):
        raise RuntimeError("no such luck\nsecond line")

    variants = [
        Variant("eager", lambda x: (2 * x,)),
        Variant("wrong", lambda x: (2.001 * x,)),
        Variant("not a number", lambda x: (x / 0,)),
        Variant("fails", fails),
        Variant("not of this package", lambda x: (2 * x,), backend="cpu"),
        Variant("tokenfusion (reference)", lambda x: (2 * x,), backend="reference"),
    ]
    problem = Problem(
        group="doubling",
        case={"N": 3, "dtype": "float32"},
        variants=variants,
        make_inputs=lambda: (torch.randn(1 << 20),),
        reference=lambda x: (2 * x,),
        moved=8 << 20,
        written=True,
        flops=1 << 20,
    )
    benchmark = SimpleNamespace(pedantic=lambda target, rounds: [target() for _ in range(rounds)], extra_info={})
    rows = {row["variant"]: row for row in harness.run(problem, benchmark, harness.Effort(0.01, 3, 3))}
    assert {name for name, row in rows.items() if "seconds" in row} == {"eager", "tokenfusion (reference)"}
    assert "allowed" in rows["wrong"]["fault"]
    assert "allowed" in rows["not a number"]["fault"]
    assert rows["fails"]["fault"] == "RuntimeError: no such luck"
    assert rows["not of this package"]["fault"] == "expected backend cpu, ran plain PyTorch"


def test_parity_takes_a_zero_gradient_for_what_it_is():
    from benchmarks.parity import compare

    exact = (torch.ones(4, dtype=torch.float64), torch.full((4,), 1e-18, dtype=torch.float64))
    eager = (torch.ones(4), torch.full((4,), 1e-9))
    assert compare((torch.ones(4), torch.full((4,), 3e-9)), eager, exact).passes
    assert not compare((torch.ones(4), torch.full((4,), 3e-6)), eager, exact).passes
