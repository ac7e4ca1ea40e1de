"""What setup.py builds on this machine, and why it leaves the rest out."""

import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SWITCHES = {"cpp": "TOKENFUSION_CPP", "cuda": "TOKENFUSION_CUDA"}
TITLES = {"cpp": "C++ extension", "cuda": "CUDA kernels"}
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
NVCC_FLAGS = ["-O3"]

_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
_ISA_FLAGS = {"default": [], "avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": _AVX512}


class BuildRefused(SystemExit):
    """Something was insisted on and is impossible."""


def isa_flags() -> dict[str, list[str]]:
    """Instruction set -> compiler flags, for each one that the kernels are compiled for."""
    x86_64 = platform.machine().lower() in ("x86_64", "amd64")
    return _ISA_FLAGS if x86_64 else {"default": []}


def jobs() -> int:
    """How many compilers may run at once: MAX_JOBS, or one a processor."""
    wanted = os.environ.get("MAX_JOBS", "")
    return max(int(wanted), 1) if wanted.isdigit() else os.cpu_count() or 1


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Variables of the environment for the length of a with-block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def digest_of_sources() -> str:
    """Of what the extension is compiled from."""
    digest = hashlib.sha256()
    for path in sorted(Path("csrc").rglob("*")):
        if path.is_file():
            digest.update(path.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def requested(part: str) -> bool | None:
    """What the part's environment variable says: True (insist), False (leave out), None (build if possible)."""
    value = os.environ.get(SWITCHES[part], "")
    if value not in ("", "0", "1"):
        raise BuildRefused(f"{SWITCHES[part]}: got {value!r}, expected 0 (leave out), 1 (insist) or nothing")
    return {"": None, "0": False, "1": True}[value]


def reason_to_leave_out(part: str, obstacle: str | None) -> str | None:
    """None when the part is to be built, otherwise the reason why not.

    Raises:
        BuildRefused: the part is insisted on and there is an obstacle.
    """
    wanted = requested(part)
    if wanted is False:
        return f"{SWITCHES[part]}=0 was set when tokenfusion was installed"
    if wanted and obstacle is not None:
        raise BuildRefused(f"{SWITCHES[part]}=1 insists on the {TITLES[part]}, but {obstacle}")
    return obstacle


def cpp_compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def compiler_version(command: list[str]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def cpp_obstacle(openmp: bool) -> str | None:
    """Why no C++ can be compiled here, or None."""
    if sys.platform == "win32":
        return "the C++ sources are written for GCC and Clang, and this is Windows"
    command = cpp_compiler()
    name = shlex.join(command)
    if shutil.which(command[0]) is None:
        origin = "as CXX says" if os.environ.get("CXX") else "and CXX is not set"
        return (
            f"no C++ compiler was found: {name!r} is not there, {origin} "
            "(install g++ or clang++, then install tokenfusion again)"
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <vector>\nint probe() { return std::vector<int>(1)[0]; }\n")
        flags = ["-std=c++17", "-fPIC", "-shared", *(["-fopenmp"] if openmp else [])]
        probe = subprocess.run(
            [*command, *flags, str(source), "-o", str(source.with_suffix(".so"))], capture_output=True, text=True
        )
    if probe.returncode != 0:
        complaint = (probe.stderr.strip() or f"exit status {probe.returncode}").splitlines()[0]
        return f"the C++ compiler {name!r} failed on a trial program with {' '.join(flags)}: {complaint}"
    return None


@dataclass(frozen=True)
class Nvcc:
    home: str
    version: str


def find_nvcc() -> Nvcc | None:
    """The CUDA compiler of CUDA_HOME, else of PATH, else of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for path in candidates:
        if path is None or not os.access(path, os.X_OK):
            continue
        banner = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        steps = subprocess.run([path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        version = re.search(r"release (\d+\.\d+)", banner)
        top = re.search(r"TOP=(\S+)", steps)
        if version:
            return Nvcc(os.path.realpath(top[1]) if top else str(Path(path).parent.parent), version[1])
    return None


def cuda_obstacle(
    sources: list[str], cpp_reason: str | None, torch_version: str, torch_cuda: str | None, nvcc: Nvcc | None
) -> str | None:
    """Why no CUDA can be compiled, or None.

    Args:
        sources: the .cu files.
        cpp_reason: why the C++ extension, which would hold the kernels, is left out; or None.
        torch_cuda: torch.version.cuda.
    """
    if not sources:
        return "this version has no CUDA sources (csrc/cuda/*.cu)"
    if cpp_reason is not None:
        return f"they are part of the C++ extension, which is left out: {cpp_reason}"
    if torch_cuda is None:
        return f"torch {torch_version} was built without CUDA (install a CUDA build of torch first)"
    if nvcc is None:
        return (
            "nvcc was not found in CUDA_HOME, on PATH or in /usr/local/cuda "
            f"(install the CUDA {torch_cuda} toolkit, then install tokenfusion again)"
        )
    if nvcc.version.split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"nvcc in {nvcc.home} is of CUDA {nvcc.version} and torch {torch_version} of CUDA {torch_cuda}: "
            "their major versions must agree (set CUDA_HOME to a matching toolkit)"
        )
    return None


def report(info: dict) -> str:
    """The build record as a few lines for a person."""
    lines = [f"tokenfusion {info['version']} for torch {info['torch']}, Python {info['python']}, {info['platform']}"]
    for part, detail in (("cpp", ", ".join(info["cpp"]["isas"])), ("cuda", ", ".join(info["cuda"]["archs"]))):
        outcome = f"built ({detail})" if info[part]["built"] else f"left out: {info[part]['reason']}"
        lines.append(f"  {TITLES[part]}: {outcome}")
    return "\n".join(lines)
