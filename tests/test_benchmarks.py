import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

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
    from benchmarks import conditions, record

    rows = [
        row
        for length in (65, 401, 4097)
        for row in (
            _row("eager", None, length, 1e-5 * length),
            _failed(_row("projections + SDPA", None, length, 1e-5 * length)),
            _row("tokenfusion (cuda)", "cuda", length, 1e-6 * length),
        )
    ]
    facts = conditions.collect("smoke")
    facts["device"] |= {"kind": "cuda", "name": "Some GPU", "driver": "1.2.3"}
    return record.save(tmp_path / "record.json", {"conditions": facts, "rows": rows})


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
        "ClassAttn, eager is timm's",
        "LayerScaleBlockClassAttn, eager is timm's",
        "ClassBlock, eager is timm's",
        "AttentionPoolLatent, eager is timm's",
        "AttentionPool2d, eager is timm's",
        "dynamic_mixing, the op",
        "DynaMixerBlock, eager is the authors' form",
        "tied_ffn, the op",
        "upconv_concat, the op",
        "upconv_concat_project, the op",
        "CrossViT models of timm",
    }
    assert {row["case"]["direction"] for row in loaded["rows"] if "model" in row["case"]} == {
        "forward",
        "training step",
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
    plots = {f"some-layer-{name}.png" for name in ("speed-ups", "time-against-n", "memory-against-n")}
    assert files == {*plots, "report.html"}
    page = (tmp_path / "report" / "report.html").read_text()
    ElementTree.fromstring(page.removeprefix("<!doctype html>"))
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert "Some GPU" in page and "1.2.3" in page
    assert "&lt;out of luck&gt;" in page
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert lines[-1].startswith("| B 8, N 4097, float32, forward | 41 ms | failed | 4.1 ms (1.50x) |")


def test_page_is_well_formed_and_says_what_lost_and_what_is_missing(synthetic_record):
    from benchmarks import page, record

    loaded = record.load(synthetic_record)
    loaded["rows"][2] |= {"times_eager": 0.5, "times_compiled": 0.25, "called_seconds": 2e-3}
    loaded["rows"][2] |= {"called_times_eager": 0.75, "called_times_compiled": None}
    loaded["steps"] = {
        "parity": {"status": "failed", "summary": "1 of 2 <tests>", "seconds": 3.2, "log": "the log"},
        "memcheck": {"status": "skipped", "summary": "compute-sanitizer not found", "seconds": 0.0, "log": ""},
    }
    loaded["cases"] = {"some/test[case]": {"state": "timed out", "reason": "stopped after 9 s", "seconds": 9.0}}
    made = page.page(loaded, {})
    ElementTree.fromstring(made.removeprefix("<!doctype html>"))
    assert "1 of 3</span>" in made and "0.50x (slower)" in made and "0.25x (slower)" in made
    assert "1 of 2 &lt;tests&gt;" in made and "the log" in made and "compute-sanitizer not found" in made
    assert "stopped after 9 s" in made and "from Python" in made and "0.75x (slower)" in made
    assert "torch.compile was not measured" in made


def test_report_without_matplotlib_has_no_plots(synthetic_record, tmp_path, monkeypatch, capsys):
    from benchmarks import record, report

    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    report.write(record.load(synthetic_record), tmp_path / "report")
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.html"]
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_record_of_one_length_has_no_plot_against_length(synthetic_record, tmp_path):
    from benchmarks import record, report

    loaded = record.load(synthetic_record)
    loaded["rows"] = loaded["rows"][:3]
    report.write(loaded, tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"some-layer-speed-ups.png", "report.html"}


def test_marked_tables_of_a_text_are_made_from_their_records(synthetic_record, tmp_path):
    from benchmarks import record, report

    text = tmp_path / "text.md"
    begin = f"<!-- table {synthetic_record} | some layer | 2 -->"
    text.write_text(f"before\n{begin}\nold\n<!-- end -->\nafter\n")
    loaded = record.load(synthetic_record)
    last = loaded["rows"][-1]
    record.save(synthetic_record, loaded | {"rows": [*loaded["rows"], last | {"variant": "another"}]})
    for _ in range(2):  # the second time changes nothing
        report.main(["--update", str(text)])
        lines = text.read_text().splitlines()
        rows = [line for line in lines if line.startswith("|")]
        assert len(rows) == 2 + 2 and set(rows) <= set(report.markdown(record.load(synthetic_record)).splitlines())
        assert lines[:2] == ["before", begin] and lines[-2:] == ["<!-- end -->", "after"] and "old" not in lines
    text.write_text(f"<!-- table {synthetic_record} | another layer -->\n<!-- end -->")
    with pytest.raises(SystemExit, match="no group 'another layer'"):
        report.main(["--update", str(text)])


def test_rows_of_two_runs_become_one_record(tmp_path):
    from benchmarks import record

    rows = [_row("eager", None, 65, 1.0), _row("eager", None, 65, 1.0, group="another"), _row("eager", None, 65, 2.0)]
    rows.append(_row("tokenfusion (cuda)", "cuda", 65, 1.0))
    ordered = record.load(record.save(tmp_path / "record.json", {"rows": rows}))["rows"]
    assert [(row["group"], row["variant"], row["seconds"]) for row in ordered] == [
        ("some layer", "eager", 2.0),
        ("some layer", "tokenfusion (cuda)", 1.0),
        ("another", "eager", 1.0),
    ]


class _Entry:
    """Stands in for a variant on a GPU."""

    def __init__(self, seconds: float, sets: int, can_be_captured: bool = True):
        self.seconds, self.ring, self.can_be_captured, self.replay = seconds, range(sets), can_be_captured, None

    def from_python(self, calls: int) -> float:
        return self.seconds

    def capture(self, calls: int) -> None:
        if not self.can_be_captured:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.replay = calls


def test_on_a_gpu_a_sample_takes_no_set_of_inputs_twice(monkeypatch):
    from benchmarks import harness

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    entries = [_Entry(1e-5, sets=7), _Entry(1e-4, sets=90)]
    calls, rounds = harness._plan(entries, harness.Effort(1, 3, 50))
    assert (calls, rounds) == (7, 50)
    assert harness._capture(entries, calls) == {} and [entry.replay for entry in entries] == [7, 7]


def test_where_one_variant_cannot_be_captured_none_is(monkeypatch):
    from benchmarks import harness

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    entries = [_Entry(1e-5, 7), _Entry(1e-5, 7, can_be_captured=False)]
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert harness._capture(entries, 3) == {"not_captured": reason}
    assert [entry.replay for entry in entries] == [None, None]


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
    assert rows["not a number"]["error"] is None  # JSON knows no NaN
    assert rows["fails"]["fault"] == "RuntimeError: no such luck"
    assert rows["not of this package"]["fault"] == "expected backend cpu, ran plain PyTorch"


def test_parity_takes_a_zero_gradient_for_what_it_is():
    from benchmarks.parity import compare

    exact = (torch.ones(4, dtype=torch.float64), torch.full((4,), 1e-18, dtype=torch.float64))
    eager = (torch.ones(4), torch.full((4,), 1e-9))
    assert compare((torch.ones(4), torch.full((4,), 3e-9)), eager, exact).passes
    assert not compare((torch.ones(4), torch.full((4,), 3e-6)), eager, exact).passes
