import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tokenfusion import environment
from tokenfusion.cli import main


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(environment, "collect", lambda: signal.raise_signal(signal.SIGINT))
    assert main.main(["info"]) == 130
    assert capsys.readouterr().err == "tokenfusion info: interrupted\n"


@pytest.mark.parametrize("output, arguments", [("full device", []), ("closed pipe", ["--json"])])
def test_an_output_that_takes_nothing(output, arguments):
    if output == "full device":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    command = [sys.executable, "-m", "tokenfusion", "info", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(stdout)
    assert done.returncode == 1
    expected = "tokenfusion info: error: [Errno 28] No space left on device\n" if output == "full device" else ""
    assert done.stderr == expected


def test_a_closed_output_is_none(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main.main(["info"]) == 0
    assert capsys.readouterr().err == ""


def test_characters_that_a_terminal_lacks_are_escaped(capfdbinary, monkeypatch):
    with open(1, "w", encoding="ascii", closefd=False) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(environment, "collect", lambda: print("caf\xe9") or sys.exit(0))
        with pytest.raises(SystemExit):
            main.main(["info"])
    assert capfdbinary.readouterr().out == rb"caf\xe9" + b"\n"


def test_nothing_is_said_of_a_missing_gpu(tmp_path):
    """torch.utils.cpp_extension, which torch.compile imports, looks for a GPU where it finds CUDA's tools."""
    program = "from tokenfusion.cli.main import main\nmain(['info'])\nimport torch.utils.cpp_extension\n"
    environ = os.environ | {"CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
