"""Trainings side by side: what is compared, and what a reader sees of it."""

import copy
import json
import math

import pytest
import torch

from benchmarks.convergence import __main__ as command
from benchmarks.convergence import show, training
from benchmarks.convergence.families import FAMILIES
from benchmarks.measure.problem import device
from tokenfusion.kernels import extension

pytest.importorskip("sklearn")


pytestmark = pytest.mark.skipif(device() != "cpu" or extension.why_not() is not None, reason="of the kernels of a CPU")

WAYS = [way for way in training.WAYS if way.name in ("eager", "eager, batches reversed", "fused")]


@pytest.fixture(autouse=True)
def few_ways(monkeypatch):
    monkeypatch.setattr(training, "WAYS", WAYS)


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "WAYS", WAYS)
        return training.compare(FAMILIES[2], False, 3, "cpu")


def test_fused_trains_as_eager_does(rows):
    eager, *others = rows
    assert [row["way"] for row in rows] == [way.name for way in WAYS]
    assert eager["parameter_distance"] == eager["loss_distance"] == 0
    assert len(set(eager["losses"])) == 3
    for row in others:
        assert row["loss_distance"] < 1e-4
        assert 0 < row["parameter_distance"] < 1e-2
    assert others[-1]["kernels"] == ["tied_ffn", "tied_ffn_backward"]


def test_another_training_is_seen(rows, monkeypatch):
    """Of a fused model that is wrong."""
    fuse = training.tokenfusion.fuse

    def wrong(model):
        fuse(model)
        torch.nn.init.zeros_(model.head.weight)

    monkeypatch.setattr(training.tokenfusion, "fuse", wrong)
    found = training.compare(FAMILIES[2], False, 2, "cpu")
    assert found[-1]["loss_distance"] > 100 * max(row["loss_distance"] for row in found[:-1])


def test_reference_is_no_proof(monkeypatch):
    monkeypatch.setattr(training, "WAYS", [WAYS[0], WAYS[-1]])
    with pytest.raises(RuntimeError, match="no kernel"):
        training.compare(FAMILIES[2], False, 2, "reference")


def test_table_and_plot(rows, tmp_path):
    text = show.table(rows)
    assert len(text.splitlines()) == 2 + 2
    assert "ViT-PE, float32 | eager, its sums in other orders" in text
    assert show.plot(rows).startswith(b"\x89PNG")
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"rows": rows}))
    page = f"before\n<!-- convergence {path} -->\nold\n<!-- end -->\nafter"
    assert show.updated(page) == f"before\n<!-- convergence {path} -->\n\n{text}\n\n<!-- end -->\nafter"


def test_a_loss_that_is_no_number_is_seen(rows):
    eager, reordered, fused = rows
    broken = copy.copy(fused) | {"losses": [*fused["losses"][:-1], math.nan], "loss_distance": math.nan}
    assert "| fused | nan |" in show.table([eager, reordered, broken])
    assert show._distances(broken, eager)[-1] == math.inf > show._distances(fused, eager)[-1]


def test_command(monkeypatch, rows, tmp_path, capsys):
    def compare(family, bfloat16, steps, backend, report):
        return [copy.copy(row) | {"dtype": "bfloat16" if bfloat16 else "float32"} for row in rows]

    monkeypatch.setattr(command, "compare", compare)
    command.main(["--only", "vit-pe", "--steps", "4", "--out", str(tmp_path / "found.json")])
    assert "ViT-PE, bfloat16" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "found.json").read_text())["rows"]) == 2 * len(rows)
    assert (tmp_path / "found.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "no such family"], "the families are CrossViT of timm, DynaMixer, ViT-PE, Token Fusion"),
        (["--steps", "1"], "expected at least 2"),
        (["--out", "no/such/folder.json"], "in no folder"),
        (["--backend", "reference"], "invalid choice"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err
