import json
import os
import subprocess
import sys

import pytest
import torch

import tokenfusion
from tokenfusion.cli import main as cli
from tokenfusion.kernels import dispatch, extension


def _info(capsys, *arguments) -> str:
    assert cli.main(["info", *arguments]) == 0
    return capsys.readouterr().out


def _row(text: str, title: str, name: str) -> str:
    """The state shown for `name` in the section `title`."""
    section = text[text.index(title) :].split("\n\n")[0]
    (line,) = [line for line in section.splitlines() if line.strip().startswith(f"{name} ")]
    return line.strip().removeprefix(name).strip()


def test_shows_versions_backends_and_operators(capsys):
    text = _info(capsys)
    assert _row(text, "Versions", "tokenfusion") == tokenfusion.__version__
    assert _row(text, "Versions", "torch") == torch.__version__
    for name, reason in tokenfusion.backends().items():
        assert _row(text, "Backends", name) == (reason or "runs")
    for operator in dispatch.OPERATORS:
        assert _row(text, operator, "reference") == "runs"


def test_shows_the_backend_in_force_and_that_of_the_process(capsys):
    with tokenfusion.backend("reference"):
        assert _row(_info(capsys), "Backends", "chosen") == "reference; for the whole process: auto"


def test_json_agrees_with_the_package(capsys):
    facts = json.loads(_info(capsys, "--json"))
    assert facts["build"] == extension.build_info()
    assert (facts["backend"], facts["backend of the process"]) == (dispatch.get_backend(), dispatch.process_backend())
    assert {name: entry["reason"] for name, entry in facts["backends"].items()} == tokenfusion.backends()
    assert facts["operators"].keys() == dispatch.OPERATORS.keys()
    assert facts["operators"]["single_query_attention"]["reference"] == {
        "runs": True,
        "automatic": True,
        "reason": None,
    }


@pytest.mark.parametrize("reason", [None, "no CUDA device is available"])
def test_kernels_without_a_record_are_marked(capsys, monkeypatch, reason):
    monkeypatch.setattr(tokenfusion, "backends", lambda: dict.fromkeys(dispatch.BACKENDS) | {"triton": reason})
    shown = _row(_info(capsys), "single_query_attention", "triton")
    note = "by name only until a GPU record exists"
    assert shown == (note if reason is None else f"{reason}; {note}")


def test_backend_without_an_implementation_is_said_so(capsys, monkeypatch):
    monkeypatch.setitem(dispatch.OPERATORS, "probe", dispatch.Operator("probe", ()))
    assert _row(_info(capsys), "probe", "cuda") == "no implementation for this backend"


def test_long_reasons_stay_whole_and_on_one_line(capsys, monkeypatch):
    reason = "built for torch 1, and cannot load ([Errno 2] :warning: " + "no such symbol " * 40 + ")"
    monkeypatch.setattr(extension, "_error", reason)
    text = _info(capsys)
    assert _row(text, "Built", "C++ extension") == reason
    assert _row(text, "Backends", "cpu") == reason


def test_needs_no_timm(tmp_path):
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from tokenfusion.cli.main import main\n"
        "sys.exit(main(['info', '--json']))"
    )
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(tokenfusion.__file__))}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["torch"] == torch.__version__


def test_unknown_command_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fly"])
    error = capsys.readouterr().err
    assert "'fly'" in error
    assert all(command in error for command in cli.COMMANDS)
