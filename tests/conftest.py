import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on the CPU

import tokenfusion
from tests import garbage
from tokenfusion import precision
from tokenfusion.kernels import extension

precision.use_ieee()  # eager's error in TF32 would allow any
os.environ["TOKENFUSION_TUNING"] = "0"  # what was measured on this machine decides nothing here
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # inductor compiles for each instruction set to see: 20 s
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what it runs in the background
for _device in (torch.cuda, torch.xpu, torch.mtia):
    if not _device.is_available():  # torch.manual_seed formats the whole stack for each that may yet start: 2 ms
        _device.manual_seed_all = lambda seed: None

ROOT = Path(__file__).parent.parent
SLOW = {  # marker: where its tests are
    "install": ("test_install.py",),
    "aot": ("test_aot.py", "test_cuda_compiled.py"),
    "ptx": ("tests/ptx/test_cuda_*.py", "tests/ptx/test_triton_*.py"),
    "benchmarks": ("tests/benchmarks/*.py", "tests/gpu_check/*.py"),
}


def pytest_configure(config):
    if _is_worker(config):
        torch.set_num_threads(1)  # the workers share the processors,
        os.environ["OMP_NUM_THREADS"] = "1"  # and so do the programs that they start
        del os.environ["PYTEST_XDIST_WORKER"]  # what a test starts is none


def _is_worker(config) -> bool:
    """Of pytest-xdist."""
    return hasattr(config, "workerinput")


def pytest_itemcollected(item):
    for marker, places in SLOW.items():
        if any(map(item.path.match, places)):
            item.add_marker(marker)


def pytest_collection_modifyitems(config, items):
    if _is_worker(config):  # long files first, so that no worker waits for the last one
        items.sort(key=lambda item: not any(map(item.get_closest_marker, SLOW)))


def pytest_collection_finish():
    garbage.look_among_what_comes()


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty gives NaN, so that a value that nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def marked_backend(request):
    """The backend in force is that of the test's marker, if it has one."""
    marker = request.node.get_closest_marker("backend")
    with tokenfusion.backend(*marker.args) if marker else contextlib.nullcontext():
        yield


@pytest.fixture
def set_threads():
    """torch.set_num_threads, for the length of a test."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(set_threads):
    """Threads that wait for each other take many times as long where other programs run."""
    set_threads(1)


@pytest.fixture(params=["amx", "vectors"])
def amx_or_vectors(request):
    """Products of bfloat16 by either on one processor, of which a processor's own choice is one alone."""
    if extension.why_not() is not None:
        pytest.skip("no C++ extension")
    from tokenfusion import _C

    if request.param == "amx" and not extension.amx_allowed():
        pytest.skip("no AMX here")
    _C.allow_amx(request.param == "amx")
    yield
    _C.allow_amx(True)


@pytest.fixture(autouse=True)
def small_calls_are_fused(monkeypatch):
    """As large ones are, so that tests with small tensors reach the operators."""
    for layer in ("conv_transpose", "multihead_attention"):
        monkeypatch.setattr(f"tokenfusion.layers.{layer}._LEAST_WORTHWHILE", 0)
    monkeypatch.setattr("tokenfusion.kernels.attention._FEWEST_SCORES", 0)
    monkeypatch.setattr("tokenfusion.kernels.mlp._LEAST_ROWS", 1)


@pytest.fixture
def within_a_model(monkeypatch):
    """Parts of fused models that are called by themselves defer, as in the model's forward."""
    monkeypatch.setattr("tokenfusion.layers.settled._running.frames", [None])


@pytest.fixture
def run_python():
    """Runs a program in a fresh interpreter, with changes to the environment; returns what it prints."""

    def run(program: str, **environment: str) -> str:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
