"""The CUDA sources as the interpreter takes them: an operator's host, compiled for tensors of the CPU and launches that
a test receives, and its kernels in PTX.
"""

import ctypes
import fcntl
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.ptx.parse import Kernel, parse
from tests.sass import CAPABILITIES, NVCC
from tests.test_install import plan

COMPILER = plan.cpp_compiler()[0]
MARKS = [
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER})"),
]

_LIMITS = {  # of csrc/cuda/common/limits.h
    "single_query_attention": "single_query_attention_cuda_max_channels",
    "dynamic_mixing": "dynamic_mixing_cuda_max_reduced",
}
_HOST = ROOT / "tests/ptx/cuda"
_BUILT = ROOT / "build/ptx"
_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Program:
    """An operator's host, and the PTX of its kernels: compute capability -> mangled name -> a module of that kernel."""

    operator: str
    host: ctypes.CDLL
    modules: dict[int, dict[str, str]]

    @functools.cached_property
    def names(self) -> list[str]:
        return sorted(self.modules[CAPABILITIES[0]])


@functools.cache
def program(operator: str) -> Program:
    """Compiled once for the same sources, by whichever process comes first."""
    folder = _BUILT / operator / _digest()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                for old in filter(Path.is_dir, folder.parent.iterdir()):
                    shutil.rmtree(old)
                _compile(operator, folder)
    texts = {c: [path.read_text() for path in folder.glob(f"*.compute_{c}.ptx")] for c in CAPABILITIES}
    modules = {c: {n: m for text in of for n, m in _split(text).items()} for c, of in texts.items()}
    return Program(operator, ctypes.CDLL(str(folder / "host.so")), modules)


@functools.cache
def kernel(operator: str, capability: int, name: str) -> Kernel:
    return parse(program(operator).modules[capability][name])[name]


def _split(text: str) -> dict[str, str]:
    """A module of each kernel by itself, with all that the kernels of the text share."""
    shared, *kernels = re.split(r"^(?=\.visible \.entry )", text, flags=re.MULTILINE)
    return {re.match(r"\.visible \.entry (\w+)", each)[1]: shared + each for each in kernels}


def _digest() -> str:
    """Of what is compiled and of the compilers."""
    digest = hashlib.sha256(repr((NVCC, torch.__version__, plan.compiler_version(plan.cpp_compiler()))).encode())
    for path in sorted(path for folder in (ROOT / "csrc", _HOST) for path in folder.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def _compile(operator: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        place = Path(temporary)
        headers = [_TORCH / "include", _TORCH / "include/torch/csrc/api/include", f"{NVCC.home}/include"]
        cpp = [COMPILER, "-std=c++17", "-O0", "-fPIC", f"-I{_HOST}", f"-I{ROOT}/csrc/cuda"]
        cpp += [f"-isystem{header}" for header in headers]
        defined = [f'-DHOST="{operator}.cpp"', f"-DLIMIT={_LIMITS[operator]}"]
        architectures = [f"-gencode=arch=compute_{c},code=compute_{c}" for c in CAPABILITIES]
        nvcc = [f"{NVCC.home}/bin/nvcc", "-std=c++17", *plan.NVCC_FLAGS, *architectures, "-Xcompiler=-fPIC"]
        nvcc += ["--keep", f"--keep-dir={place}"]  # the PTX
        sources = {
            **{path: nvcc for path in (ROOT / "csrc/cuda").glob(f"{operator}_*.cu")},
            **{path: [*cpp, *defined] for path in _HOST.glob("*.cpp")},
        }
        _run(*([*command, "-c", str(path), "-o", str(place / f"{path.stem}.o")] for path, command in sources.items()))
        objects = [str(place / f"{path.stem}.o") for path in sources]
        result = place / "result"
        result.mkdir()
        libraries = [f"-L{_TORCH}/lib", "-lc10", "-ltorch_cpu"]
        _run([COMPILER, "-shared", "-Wl,-Bsymbolic", *objects, *libraries, "-o", f"{result}/host.so"])
        for path in place.glob("*.ptx"):
            path.rename(result / path.name)
        result.rename(folder)


def _run(*commands: list[str]) -> None:
    """Side by side."""
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    for process in running:
        log, _ = process.communicate()
        assert process.returncode == 0, log
