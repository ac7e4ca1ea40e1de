"""The file of a machine: found, followed where it fits, ignored with a reason where it does not, never half written."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.parity import assert_runs
from tokenfusion.kernels import choices, single_query_attention
from tokenfusion.kernels.choices import Workload
from tokenfusion.tuning import files, machine

ENTRY = {"operator": "single_query_attention", "kind": ["float32", "inference"], "sizes": [2, 50, 32, 3]}
ENTRIES = [ENTRY | {"choice": "reference", "seconds": {"cpu": 2.0, "reference": 1.0}, "wrong": {}}]
WORKLOAD = Workload("single_query_attention", ("float32", "inference"), (2, 50, 32, 3))


@pytest.fixture
def fresh():
    """What was read before counts for nothing, nor what is read now for anybody later."""
    files.loaded.cache_clear()
    yield
    files.loaded.cache_clear()


@pytest.fixture
def path(tmp_path, monkeypatch, fresh) -> Path:
    found = tmp_path / "tuning.json"
    monkeypatch.setenv("TOKENFUSION_TUNING", str(found))
    return found


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


def _with_conditions(path: Path, conditions) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"conditions": conditions}))


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda path: path.unlink(), "there is no such file"),
        (lambda path: path.write_text(""), "no tuning file, or not a whole one"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "no tuning file, or not a whole one"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "no tuning file, or not a whole one"),
        (lambda path: path.write_text("[1, 2]"), "no tuning file, or not a whole one"),
        (lambda path: path.write_text("[" * 100_000), "no tuning file, or not a whole one"),
        (lambda path: _with_conditions(path, None), "no tuning file, or not a whole one"),
        (lambda path: _with_conditions(path, []), "device None, here"),
        (lambda path: _changed(path, torch="1.0"), "torch '1.0', here"),
        (lambda path: _changed(path, kernels="0" * 16), "kernels '0000000000000000', here"),
        (lambda path: _changed(path, device="cpu-riscv"), "device 'cpu-riscv', here"),
        (lambda path: _changed(path, threads=77), "threads 77, here"),
        (lambda path: path.write_text(path.read_text().replace('"choice"', '"chosen"')), "an entry lacks"),
        (lambda path: path.write_text(path.read_text().replace(" 50,", ' "many",')), "an entry lacks"),
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


def test_the_users_folder(tmp_path, monkeypatch, fresh):
    monkeypatch.delenv("TOKENFUSION_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.user_path() == tmp_path / "tokenfusion" / f"{machine.name()}.json"
    files.write(files.user_path(), ENTRIES)
    assert files.loaded().path == files.user_path()


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_user_without_a_home(monkeypatch, fresh):
    for variable in ("TOKENFUSION_TUNING", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", _no_home)
    assert files.loaded().ignored == ()
    with pytest.raises(OSError, match="home"):
        files.user_path()


def test_an_empty_variable_is_none(tmp_path, monkeypatch, fresh):
    monkeypatch.setenv("TOKENFUSION_TUNING", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    named = files.loaded()
    monkeypatch.delenv("TOKENFUSION_TUNING")
    files.loaded.cache_clear()
    assert (named.path, named.ignored) == (files.loaded().path, files.loaded().ignored)


def test_a_full_disk_leaves_the_old_file(path, monkeypatch):
    files.write(path, ENTRIES)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(path, [])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written(path, monkeypatch):
    files.write(path, ENTRIES)

    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system")

    for name in ("tempfile.mkstemp", "os.replace"):
        with monkeypatch.context() as patched:
            patched.setattr(name, read_only)
            with pytest.raises(OSError, match="Read-only"):
                files.write(path, [])
    assert files.read(path) == ENTRIES and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_that_may_not_be_read_is_ignored(path, monkeypatch):
    files.write(path, ENTRIES)
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    loaded = files.loaded()
    assert loaded.table.choices == {} and "Permission denied" in loaded.ignored[0]


@pytest.mark.parametrize("choice", ["cpu:of tomorrow", "rocm", ""])
def test_a_choice_that_nobody_here_knows_changes_nothing(path, choice):
    files.write(path, [ENTRIES[0] | {"choice": choice}, ENTRY | {"operator": "of_tomorrow", "choice": "cpu"}])
    tokens = torch.randn(2, 50, 32)
    with choices.using(files.loaded().table), assert_runs("single_query_attention_cpu"):
        single_query_attention(tokens[:, :3], tokens)


@pytest.fixture
def fake_gpu(monkeypatch):
    """What a process sees of a machine with one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(machine, "_driver", lambda: "580.1")
    return monkeypatch


def test_the_table_of_a_gpu(tmp_path, fake_gpu):
    """Triton's interpreter stands for the kernels, which run for want of such a table by name alone."""
    fake_gpu.delenv("TOKENFUSION_TUNING")
    fake_gpu.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = ENTRY | {"sizes": [2, 5, 16, 3], "choice": "triton:split"}
    assert files.user_path().name == "nvidia-h100-80gb-hbm3.json"
    files.write(files.user_path(), [small])
    files.loaded.cache_clear()
    loaded = files.loaded()
    files.loaded.cache_clear()
    assert loaded.path == files.user_path() and loaded.remark is None
    tokens = torch.randn(2, 5, 16)
    with choices.using(loaded.table), assert_runs("single_query_attention_triton"):
        single_query_attention(tokens[:, :3], tokens)


@pytest.mark.parametrize(
    "name, changed, reason",
    [
        ("get_device_capability", (10, 0), "compute capability '9.0', here '10.0'"),
        ("get_device_name", "NVIDIA B200", "device 'nvidia-h100-80gb-hbm3', here 'nvidia-b200'"),
        ("is_available", False, "device 'nvidia-h100-80gb-hbm3', here 'cpu-"),
    ],
)
def test_the_table_of_another_gpu_is_ignored(path, fake_gpu, name, changed, reason):
    files.write(path, ENTRIES)
    fake_gpu.setattr(torch.cuda, name, lambda: changed)
    loaded = files.loaded()
    assert loaded.path is None and reason in loaded.ignored[0]


def test_another_driver_is_warned_about(path, fake_gpu, caplog):
    files.write(path, ENTRIES)
    fake_gpu.setattr(machine, "_driver", lambda: "590.2")
    fake_gpu.setattr(choices, "_in_force", None)
    for _ in range(2):
        assert choices.in_force().choice(WORKLOAD) == "reference"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "driver 580.1, here 590.2" in record.getMessage()


@pytest.mark.parametrize("noted", [None, [], "words", {"driver": 7}])
def test_notes_that_are_none_change_nothing(path, noted):
    files.write(path, ENTRIES)
    content = json.loads(path.read_text()) | {"noted": noted}
    path.write_text(json.dumps(content))
    assert files.loaded().table.choice(WORKLOAD) == "reference"


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
