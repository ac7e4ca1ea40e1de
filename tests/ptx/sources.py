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

_LIMITS = {  # of csrc/cuda/common/limits.h, where the operator has one
    "dynamic_mixing": "dynamic_mixing_cuda_max_reduced",
}
_HOST = ROOT / "tests/ptx/cuda"
_DEPENDENCIES = ROOT / "csrc/cuda", ROOT / "csrc/common", _HOST
_BUILT = ROOT / "build/ptx"
_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Program:
    """An operator's host, and the PTX of its kernels.

    files: (name of the source, compute capability) -> its PTX; modules: compute capability -> mangled name -> a module
    of that kernel alone.
    """

    operator: str
    host: ctypes.CDLL
    files: dict[tuple[str, int], Path]
    modules: dict[int, dict[str, str]]

    @functools.cached_property
    def names(self) -> list[str]:
        return sorted(self.modules[CAPABILITIES[0]])


def stem_of(operator: str) -> str:
    """Of the files in csrc/cuda that have the operator, whose name begins with it."""
    return next(path.stem for path in (ROOT / "csrc/cuda").glob("*.cpp") if operator.startswith(path.stem))


@functools.cache
def program(operator: str) -> Program:
    """Compiled once for the same sources, by whichever process comes first."""
    folder = _BUILT / operator / _digest(operator)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                for old in filter(Path.is_dir, folder.parent.iterdir()):
                    shutil.rmtree(old)
                _compile(operator, folder)
    names = [path.stem for path in _sources(operator) if path.suffix == ".cu"]
    files = {(name, c): folder / f"{name}.compute_{c}.ptx" for name in names for c in CAPABILITIES}
    modules = {c: {} for c in CAPABILITIES}
    for (_, capability), path in files.items():
        modules[capability] |= _split(path.read_text())
    return Program(operator, ctypes.CDLL(str(folder / "host.so")), files, modules)


@functools.cache
def kernel(operator: str, capability: int, name: str) -> Kernel:
    return parse(program(operator).modules[capability][name])[name]


def _split(text: str) -> dict[str, str]:
    """A module of each kernel by itself, with all that the kernels of the text share."""
    shared, *kernels = re.split(r"^(?=\.visible \.entry )", text, flags=re.MULTILINE)
    return {re.match(r"\.visible \.entry (\w+)", each)[1]: shared + each for each in kernels}


def _sources(operator: str) -> dict[Path, list[str]]:
    """What is compiled, each with its command."""
    headers = [_TORCH / "include", _TORCH / "include/torch/csrc/api/include", f"{NVCC.home}/include"]
    cpp = [COMPILER, "-std=c++17", "-O0", "-fPIC", f"-I{_HOST}", f"-I{ROOT}/csrc/cuda"]
    cpp += [*(f"-isystem{each}" for each in headers), f'-DHOST="{operator}.cpp"']
    if operator in _LIMITS:
        cpp.append(f"-DLIMIT={_LIMITS[operator]}")
    architectures = [f"-gencode=arch=compute_{c},code=compute_{c}" for c in CAPABILITIES]
    nvcc = [f"{NVCC.home}/bin/nvcc", "-std=c++17", *plan.NVCC_FLAGS, *architectures, "-Xcompiler=-fPIC", "--keep"]
    return {
        **{path: nvcc for path in sorted((ROOT / "csrc/cuda").glob(f"{operator}_*.cu"))},
        **{path: cpp for path in sorted(_HOST.glob("*.cpp"))},
    }


def _digest(operator: str) -> str:
    """Of what is compiled, and how."""
    commands = sorted((path.name, command) for path, command in _sources(operator).items())
    versions = NVCC, torch.__version__, plan.compiler_version(plan.cpp_compiler())
    digest = hashlib.sha256(repr((commands, versions)).encode())
    for path in sorted(path for folder in _DEPENDENCIES for path in folder.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(operator: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        place = Path(temporary)
        sources = _sources(operator)
        _run(place, *([*command, "-c", str(path), "-o", f"{path.stem}.o"] for path, command in sources.items()))
        objects = [f"{path.stem}.o" for path in sources]
        result = place / "result"
        result.mkdir()
        libraries = [f"-L{_TORCH}/lib", "-lc10", "-ltorch_cpu"]
        _run(place, [COMPILER, "-shared", "-Wl,-Bsymbolic", *objects, *libraries, "-o", "result/host.so"])
        for path in place.glob("*.ptx"):
            path.rename(result / path.name)
        result.rename(folder)


def _run(folder: Path, *commands: list[str]) -> None:
    """Side by side, in the folder."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = [subprocess.Popen(command, cwd=folder, **pipes) for command in commands]
    for process in running:
        log, _ = process.communicate()
        assert process.returncode == 0, log


def check_same_code(operator: str) -> None:
    """What runs for one compute capability runs for the other: the instructions differ in how bfloat16 is widened."""
    first, second = ({n: _widening(m) for n, m in program(operator).modules[c].items()} for c in CAPABILITIES)
    assert first == second


def _widening(module: str) -> str:
    module = re.sub(r"^\.target .*", "", module, flags=re.MULTILINE)
    module = re.sub(r"cvt\.f32\.bf16 (%\w+), (%\w+);", r"widen \1, \2;", module)
    return re.sub(r"mov\.b32 (%\w+), \{%?\w+, ?(%\w+)\};", r"widen \1, \2;", module)
