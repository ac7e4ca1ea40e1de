"""PTX compiled for GPUs that are not here, and what tests want to know of the result."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_install import plan

NVCC = plan.find_nvcc()
FOLDERS = [Path(NVCC.home) / "bin"] if NVCC else []
if triton := importlib.util.find_spec("triton"):
    FOLDERS.append(Path(triton.origin).parent / "backends/nvidia/bin")
CUOBJDUMP = next((tool for folder in FOLDERS if (tool := shutil.which("cuobjdump", path=str(folder)))), None)

MARKS = [
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump was not found"),
    pytest.mark.timeout(600),
]

CAPABILITIES = (80, 90)
ELEMENTS = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}  # mangled: dtype


@dataclass
class Function:
    registers: int
    spilled: int  # bytes
    instructions: list[tuple[int, str]]  # each with its address

    def texts(self, pattern: str) -> list[str]:
        return [text for _, text in self.instructions if re.search(pattern, text)]


def assemble(files: Mapping[tuple[str, int], Path], folder: Path) -> dict[tuple[str, int], dict[str, Function]]:
    """Of each (name, compute capability) the functions by mangled name; files are of PTX, all compiled side by side."""
    running = {}
    for (name, capability), path in files.items():
        cubin = folder / f"{name}{capability}.cubin"
        command = [f"{NVCC.home}/bin/ptxas", "-v", f"-arch=sm_{capability}", str(path), "-o", str(cubin)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running[name, capability] = process, cubin
    results = {}
    for key, (process, cubin) in running.items():
        log, _ = process.communicate()
        assert process.returncode == 0, log
        sass = subprocess.run([CUOBJDUMP, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        instructions = _instructions(sass)
        results[key] = {name: Function(*numbers, instructions[name]) for name, numbers in _usage(log).items()}
    return results


def _usage(log: str) -> dict[str, tuple[int, int]]:
    """Kernel -> registers and spilled bytes, as ptxas -v says."""
    usage = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        usage[part.partition("'")[0]] = int(registers[1]), sum(map(int, numbers.groups()))
    return usage


def _instructions(sass: str) -> dict[str, list[tuple[int, str]]]:
    parts = re.split(r"Function : (\S+)", sass)[1:]
    instruction = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
    return {
        name: [(int(address, 16), text) for address, text in instruction.findall(code)]
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def assert_nothing_is_atomic_or_spilled(function: Function, key) -> None:
    assert function.spilled == 0, (key, function.spilled)
    assert not function.texts(r"\b(ATOM|ATOMG|ATOMS|RED|REDG|LDL|STL)\b"), key
