import json

import pytest

from tests.tuning.test_search import INFERENCE, one_lane_wrong, with_implementation  # noqa: F401
from tokenfusion.cli import main as cli
from tokenfusion.tuning import files, search


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_SECONDS", 0.05)
    monkeypatch.setenv("TOKENFUSION_TUNING", str(tmp_path / "tuning.json"))
    files.loaded.cache_clear()
    yield tmp_path / "tuning.json"
    files.loaded.cache_clear()


@pytest.fixture
def calls(tmp_path):
    found = tmp_path / "calls.json"
    found.write_text(json.dumps([INFERENCE]))
    return found


def test_tune_writes_the_file_and_info_shows_it(path, calls, capsys):
    assert cli.main(["tune", "--calls", str(calls)]) == 0
    text = capsys.readouterr().out
    assert "float32, inference, B 2, N 40, C 32, Q 3" in text and f"Written to {path}" in text
    assert len(files.read(path)) == 1
    assert cli.main(["info"]) == 0
    assert f"{path}, 1 choices" in capsys.readouterr().out


def test_a_wrong_kernel_is_named_and_fails(path, calls, capsys, with_implementation):  # noqa: F811
    with_implementation("single_query_attention", one_lane_wrong)
    for command in (["tune"], ["verify"]):
        assert cli.main([*command, "--calls", str(calls)]) == 1
        text = capsys.readouterr().out
        assert "cpu:mine" in text and "relative error" in text


def test_verify_writes_nothing(path, calls, capsys):
    assert cli.main(["verify", "--calls", str(calls)]) == 0
    assert "1 calls tried on every backend that runs here, 0 with a wrong one." in capsys.readouterr().out
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--calls", "nowhere.json"], "--calls: nowhere.json: "),
        (["crossvit_9_240", "--calls", "nowhere.json"], "--calls: a model is named, too"),
        (["--batch", "2"], "--batch: no model is named"),
        (["no_such_model"], "MODEL: got 'no_such_model'"),
        (["--dtype", "float16"], "there is no call of an operator to measure"),
    ],
)
def test_arguments_that_cannot_be_used(path, capsys, arguments, message):
    assert cli.main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--batch", "1,x"], ["--train", "--infer"]])
def test_arguments_of_the_wrong_kind(path, capsys, arguments):
    with pytest.raises(SystemExit):
        cli.main(["tune", *arguments])


@pytest.mark.parametrize(
    "calls",
    [
        "{}",
        "[[1]]",
        "[[",
        '[["no_op", ["float32", "inference"], [1]]]',
        '[["tied_ffn", ["float32", "inference"], [8, 8]]]',
        '[["tied_ffn", ["float32", "inference"], [8, 8, "8"]]]',
        '[["tied_ffn", ["float32", "inference"], [8, 8, 0]]]',
        '[["tied_ffn", ["float32"], [8, 8, 8]]]',
        '[["tied_ffn", ["float99", "inference"], [8, 8, 8]]]',
        '[["tied_ffn", ["float32", "sideways"], [8, 8, 8]]]',
        '[["tied_ffn", ["float32", "inference", "rows"], [8, 8, 8]]]',
        '[["upconv_concat", ["float32", "inference"], [8, 8, 8, 8]]]',
        '[["upconv_concat", ["float32", "inference", "k two", "contiguous"], [8, 8, 8, 8]]]',
    ],
)
def test_files_of_calls_that_are_none(path, tmp_path, capsys, calls):
    (tmp_path / "calls.json").write_text(calls)
    assert cli.main(["tune", "--calls", str(tmp_path / "calls.json")]) == 2
    assert "--calls: " in capsys.readouterr().err


def test_a_file_that_cannot_be_written(path, calls, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENFUSION_TUNING", str(tmp_path / "file" / "tuning.json"))
    assert cli.main(["tune", "--calls", str(calls)]) == 2
    assert "the file cannot be written" in capsys.readouterr().err


def test_an_interruption_says_what_there_is(path, calls, capsys, monkeypatch):
    def interrupted(workload, limit):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "_measured", interrupted)
    assert cli.main(["tune", "--calls", str(calls)]) == 130
    captured = capsys.readouterr()
    assert "0 of 1 calls measured" in captured.out and "interrupted" in captured.err


def test_what_does_not_fit_memory_is_named(path, calls, capsys, monkeypatch):
    def hungry(workload, limit):
        raise MemoryError

    monkeypatch.setattr(search, "_proven", hungry)
    for command in ("tune", "verify"):
        assert cli.main([command, "--calls", str(calls)]) == 0
        text = capsys.readouterr().out
        assert "Left out" in text and "ran out of memory" in text and "0 " in text
    (entry,) = files.read(path)
    assert entry["choice"] is None and "ran out of memory" in entry["skipped"]
