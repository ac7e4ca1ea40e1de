"""The file of a machine: found, followed where it fits, ignored with a reason where it does not, never half written."""

import json
import os
import threading
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tokenfusion.kernels import choices
from tokenfusion.kernels.choices import Workload
from tokenfusion.tuning import files, machine

ENTRY = {"operator": "single_query_attention", "kind": ["float32", "inference"], "sizes": [2, 50, 32, 3]}
ENTRIES = [ENTRY | {"choice": "reference", "seconds": {"cpu": 2.0, "reference": 1.0}, "wrong": {}}]
WORKLOAD = Workload("single_query_attention", ("float32", "inference"), (2, 50, 32, 3))


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    found = tmp_path / "tuning.json"
    monkeypatch.setenv("TOKENFUSION_TUNING", str(found))
    files.loaded.cache_clear()
    yield found
    files.loaded.cache_clear()


def test_what_was_written_is_followed(path):
    files.write(path, ENTRIES)
    loaded = files.loaded()
    assert loaded.table.choice(WORKLOAD) == "reference"
    assert loaded.path == path and len(loaded.digest) == 12 and loaded.ignored == ()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def _changed(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    content["conditions"] |= changes
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: path.write_text(""), "no tuning file, or not a whole one"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "no tuning file, or not a whole one"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "no tuning file, or not a whole one"),
        (lambda path: path.write_text("[1, 2]"), "no tuning file, or not a whole one"),
        (lambda path: _changed(path, torch="1.0"), "torch '1.0', here"),
        (lambda path: _changed(path, kernels="0" * 16), "kernels '0000000000000000', here"),
        (lambda path: _changed(path, device="cpu-riscv"), "device 'cpu-riscv', here"),
        (lambda path: _changed(path, threads=77), "threads 77, here"),
        (lambda path: path.write_text(path.read_text().replace('"choice"', '"chosen"')), "an entry lacks"),
        (lambda path: path.write_text(path.read_text().replace("50", '"many"')), "an entry lacks"),
        (lambda path: path.write_text(path.read_text().replace('"schema": 1', '"schema": 2')), "schema 2, expected 1"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    ],
)
def test_a_file_that_does_not_fit_is_ignored_and_says_why(path, spoil, reason):
    files.write(path, ENTRIES)
    spoil(path)
    loaded = files.loaded()
    assert loaded.table.choices == {} and loaded.path is None
    assert len(loaded.ignored) == 1 and str(path) in loaded.ignored[0] and reason in loaded.ignored[0]


def test_what_was_found_wrong_is_kept(path):
    files.write(path, [ENTRIES[0] | {"wrong": {"cpu": "relative error"}}])
    assert files.loaded().table.refused == {("single_query_attention", "cpu")}


def test_what_is_ignored_is_said_once(path, monkeypatch, caplog):
    files.write(path, ENTRIES)
    _changed(path, threads=77)
    monkeypatch.setattr(choices, "_in_force", None)
    for _ in range(2):
        choices.in_force()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "threads 77" in record.getMessage()


def test_an_entry_of_other_sizes_decides_nothing(path):
    files.write(path, [ENTRIES[0] | {"sizes": [2, 50, 32]}])
    assert files.loaded().table.choice(WORKLOAD) is None


def test_unknown_fields_are_none_of_its_business(path):
    files.write(path, [ENTRIES[0] | {"more": [1]}])
    content = json.loads(path.read_text()) | {"comment": "mine"}
    path.write_text(json.dumps(content))
    assert files.loaded().table.choice(WORKLOAD) == "reference"


def test_the_variable_turns_it_off(path, monkeypatch):
    files.write(path, ENTRIES)
    monkeypatch.setenv("TOKENFUSION_TUNING", "0")
    assert files.loaded().table.choices == {}


def test_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENFUSION_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.user_path() == tmp_path / "tokenfusion" / f"{machine.name()}.json"
    files.loaded.cache_clear()
    files.write(files.user_path(), ENTRIES)
    assert files.loaded().path == files.user_path()
    files.loaded.cache_clear()


def test_a_full_disk_leaves_the_old_file(path, monkeypatch):
    files.write(path, ENTRIES)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(path, [])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_two_writers_leave_a_whole_file(path):
    def write(count: int):
        for _ in range(30):
            files.write(path, ENTRIES * count)

    writers = [threading.Thread(target=write, args=(count,)) for count in (1, 40)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert len(files.read(path)) in (1, 40)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


PROGRAM = """
    import torch, tokenfusion
    from tokenfusion.kernels import dispatch
    tokens = torch.randn(2, 50, 32)
    with dispatch.observe() as seen:
        tokenfusion.kernels.single_query_attention(tokens[:, :3], tokens)
    print(seen.choices[0].backend)
"""


def test_another_process_follows_it(path, run_python):
    """Two of one job choose alike, and differ where the file is left out."""
    files.write(path, ENTRIES)
    one_thread = {"OMP_NUM_THREADS": str(machine.conditions()["threads"])}
    followed = [run_python(PROGRAM, TOKENFUSION_TUNING=str(path), **one_thread) for _ in range(2)]
    assert followed == ["reference\n"] * 2
    assert run_python(PROGRAM, TOKENFUSION_TUNING="0", **one_thread) == "cpu\n"


def test_packaged_files_are_of_their_device():
    for packaged in (ROOT / "tokenfusion" / "tuning" / "defaults").glob("*.json"):
        content = json.loads(packaged.read_text())
        assert content["conditions"]["device"] == packaged.stem
        assert files.choices_of(content["entries"])
