"""What the tests of CUDA kernels on the emulated GPU of tests/cuda_emulation share."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from tests.conftest import ROOT

COMPILER = (os.environ.get("CXX") or "c++").split()[0]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # numbered as in Dtype
SCHEDULES = [
    dict(backwards=backwards, one_warp_ahead=ahead, late_copies=late)
    for backwards in (False, True)
    for ahead in (False, True)
    for late in (False, True)
]
_GUARD = 64  # elements


def compile_library(operator: str) -> ctypes.CDLL:
    """The operator's kernels, compiled for emulated blocks."""
    folder = Path(tempfile.mkdtemp())
    sources = ROOT / "tests/cuda_emulation"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{ROOT}/csrc/cuda", f"-I{sources}"]
    command = [COMPILER, *flags, str(sources / f"{operator}.cpp"), "-o", str(folder / "emulated.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "emulated.so"))
    shutil.rmtree(folder)
    return library


class Guarded:
    """Uninitialised tensors between guard bands."""

    def __init__(self):
        self.memory = []

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(shape).numel()
        memory = torch.full((_GUARD + size + _GUARD,), torch.nan, dtype=dtype)
        self.memory.append((memory, size))
        return memory[_GUARD : _GUARD + size].view(shape)

    def check(self) -> None:
        for memory, size in self.memory:
            assert memory[:_GUARD].isnan().all() and memory[_GUARD + size :].isnan().all(), "a guard band was written"
