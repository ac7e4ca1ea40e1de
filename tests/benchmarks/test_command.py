"""`pytest benchmarks/ --benchmark-only` end to end: what it prints, keeps and hands to pytest-benchmark."""

import copy
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

COLUMNS = 100


def command(*arguments: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--benchmark-only", "--profile", "smoke", "-p", "no:cacheprovider"]
    return {
        "args": [sys.executable, "-m", "pytest", *options, *arguments],
        "cwd": ROOT,
        "env": environment | {"OMP_NUM_THREADS": "1", "COLUMNS": str(COLUMNS)},
        "text": True,
    }


def run_benchmarks(*arguments: str) -> str:
    done = subprocess.run(**command(*arguments), capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def own_lines(stdout: str) -> list[str]:
    """From the first case on, without pytest-benchmark's legend, which is as long as it is."""
    lines = stdout[stdout.index("collected") :].splitlines()
    return [line for line in lines if not line.startswith("  Outliers: ")]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[str, dict, dict]:
    """What a run of all benchmarks prints, its record, and what pytest-benchmark saves."""
    folder = tmp_path_factory.mktemp("smoke")
    record, saved = folder / "record.json", folder / "saved.json"
    stdout = run_benchmarks("benchmarks/", "--record", str(record), "--benchmark-json", str(saved))
    return stdout, json.loads(record.read_text()), json.loads(saved.read_text())


def test_smoke_profile_writes_a_record(smoke):
    table, loaded, _ = smoke
    assert max(map(len, own_lines(table))) <= COLUMNS
    assert re.search(r"^ 1/\d+ .* about \d+:\d\d left$", table, re.MULTILINE)
    assert loaded["conditions"]["versions"]["torch"] == torch.__version__
    assert {row["group"] for row in loaded["rows"]} == {
        "single_query_attention, the op",
        "CrossAttentionBlock, eager is timm's",
        "Attentive probe on frozen tokens, a training step without the optimizer, eager is nn.MultiheadAttention",
        "Pooling of a bag, inference, eager is nn.MultiheadAttention",
        "A batch of bags, a training step without the optimizer, eager is nn.MultiheadAttention with a mask",
        "30 attentive probes on the same tokens, a training step, eager is nn.MultiheadAttention",
        "Cross-attention of vit-pytorch's CrossViT, dropout 0.1",
        "Drop-in guard, of one image",
        "Deferred result, nn.ConvTranspose2d before torch.cat",
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
        "upconv_add, the op",
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
        assert row["error"] is None or row["error"] <= row["allowed_error"]
        assert row["times_eager"] == 1 or row["variant"] != "eager"


def test_every_variant_is_an_entry_of_pytest_benchmark(smoke):
    stdout, record, saved = smoke
    entries, rows = saved["benchmarks"], record["rows"]
    assert len(entries) == len(rows) == len({entry["fullname"] for entry in entries})
    for entry, row in zip(entries, rows, strict=True):
        assert entry["name"] == row["variant"] and entry["extra_info"]["row"] == row
        assert entry["stats"]["median"] == pytest.approx(row["seconds"])
        assert entry["stats"]["rounds"] == row["rounds"] == len(entry["stats"]["data"])
    assert "benchmark 'tied_ffn gelu N70 C16 F40': 2 tests" in stdout


def test_a_run_that_is_slower_than_a_saved_one_fails(smoke, tmp_path):
    faster = copy.deepcopy(smoke[2])
    for entry in faster["benchmarks"]:
        entry["stats"]["median"] /= 1e6
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(faster))
    options = "benchmarks/ops/tied_ffn", f"--benchmark-storage={tmp_path}", "--record", str(tmp_path / "record.json")
    compare = f"--benchmark-compare={saved}", "--benchmark-compare-fail=median:99%"
    done = subprocess.run(**command(*options, *compare), capture_output=True, check=False)
    assert done.returncode != 0 and "Performance has regressed" in done.stdout + done.stderr


def test_disabled_benchmarks_are_checked_and_not_recorded(tmp_path):
    path = tmp_path / "record.json"
    call = command("benchmarks/ops/tied_ffn", "--benchmark-disable", "--record", str(path))
    call["args"].remove("--benchmark-only")
    done = subprocess.run(**call, capture_output=True, check=False)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
    assert not path.exists()


def test_an_interrupt_keeps_and_prints_what_was_measured(tmp_path):
    path, saved = tmp_path / "record.json", tmp_path / "saved.json"
    call = command("benchmarks/", "--record", str(path), "--benchmark-json", str(saved))
    with subprocess.Popen(**call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if re.match(r" *2/\d+ ", line):  # the second case has ended
                process.send_signal(signal.SIGINT)
        assert process.wait() == pytest.ExitCode.INTERRUPTED
    stdout = "".join(lines)
    rows = json.loads(path.read_text())["rows"]
    measured = re.search(r"tokenfusion: (\d+) of (\d+) cases", stdout)
    assert 2 <= int(measured[1]) < int(measured[2])
    assert len({json.dumps([row["group"], row["case"]]) for row in rows}) == int(measured[1])
    assert len(json.loads(saved.read_text())["benchmarks"]) == len(rows)
    assert all(row["group"] in stdout for row in rows) and f"record: {path}" in stdout
    assert "KeyboardInterrupt" in stdout and "Traceback" not in stdout


def modules_with_cases() -> list[str]:
    paths = (path.relative_to(ROOT).with_suffix("") for path in Path(ROOT, "benchmarks").rglob("test_*.py"))
    return sorted(".".join(path.parts) for path in paths)


@pytest.mark.parametrize("name", modules_with_cases())
def test_the_full_profile_has_every_quick_case(name):
    cases = importlib.import_module(name).CASES
    assert len(set(cases["full"])) == len(cases["full"])
    assert set(cases["quick"]) <= set(cases["full"])
