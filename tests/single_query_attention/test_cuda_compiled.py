"""The CUDA kernels of single_query_attention compiled for GPUs that are not here: no spill, one wide read of the tokens."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_install import plan

NVCC = plan.find_nvcc()
FOLDERS = [Path(NVCC.home) / "bin"] if NVCC else []
if triton := importlib.util.find_spec("triton"):
    FOLDERS.append(Path(triton.origin).parent / "backends/nvidia/bin")
CUOBJDUMP = next((tool for folder in FOLDERS if (tool := shutil.which("cuobjdump", path=str(folder)))), None)

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump was not found"),
    pytest.mark.timeout(600),
]

DIRECTIONS = ("forward", "backward")
CAPABILITIES = (80, 90)
ELEMENTS = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}  # mangled: dtype
QUERY_TILES = (1, 2, 4)


def _usage(log: str) -> dict[str, dict]:
    """Kernel -> what ptxas -v says of it."""
    usage = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        usage[part.partition("'")[0]] = dict(spilled=sum(map(int, numbers.groups())), registers=int(registers[1]))
    return usage


def _functions(sass: str) -> dict[str, list[tuple[int, str]]]:
    """Function -> its instructions, each with its address."""
    parts = re.split(r"Function : (\S+)", sass)[1:]
    instruction = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
    return {
        name: [(int(address, 16), text) for address, text in instruction.findall(code)]
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def _main_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """The shortest loop around all matrix instructions."""
    matrix = [address for address, text in instructions if "HMMA" in text]
    loops = []
    for address, text in instructions:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) <= matrix[0] and matrix[-1] <= address:
            loops.append([t for a, t in instructions if int(target[1], 16) <= a <= address])
    return min(loops, key=len)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple[str, int], tuple[dict, dict]]:
    """(direction, compute capability) -> usage and instructions of its kernels; all compiled side by side."""
    folder = tmp_path_factory.mktemp("cubins")
    running = {}
    for direction in DIRECTIONS:
        for capability in CAPABILITIES:
            source = ROOT / f"csrc/cuda/single_query_attention_{direction}.cu"
            cubin = folder / f"{direction}{capability}.cubin"
            flags = [*plan.NVCC_FLAGS, f"-arch=sm_{capability}", "-cubin", "-Xptxas", "-v"]
            command = [f"{NVCC.home}/bin/nvcc", "-std=c++17", *flags, str(source), "-o", str(cubin)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            running[direction, capability] = process, cubin
    results = {}
    for key, (process, cubin) in running.items():
        log, _ = process.communicate()
        assert process.returncode == 0, log
        sass = subprocess.run([CUOBJDUMP, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        results[key] = _usage(log), _functions(sass)
    return results


def _name(names, direction: str, element: str, query_tiles: int) -> str:
    wanted = f"{len(direction) + 7}{direction}_kernelI{element}Li{query_tiles}E"
    (name,) = [name for name in names if wanted in name]
    return name


@pytest.mark.parametrize("query_tiles", QUERY_TILES)
@pytest.mark.parametrize("element", ELEMENTS, ids=ELEMENTS.get)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_spills_and_wide_loads_in_the_main_loop(compiled, direction, capability, element, query_tiles):
    usage, functions = compiled[direction, capability]
    name = _name(usage, direction, element, query_tiles)
    print(direction, capability, ELEMENTS[element], query_tiles, usage[name])
    assert usage[name]["spilled"] == 0, usage[name]
    assert usage[name]["registers"] <= 255, usage[name]
    loop = _main_loop(functions[name])
    reads = [text for text in loop if re.search(r"\b(LDG|LDGSTS)\b", text)]
    assert reads
    assert all(re.search(r"\bLDGSTS\.E\.BYPASS\b.*?\.128\b", text) for text in reads), reads
    if direction == "backward":
        writes = [text for text in loop if re.search(r"\bSTG\b", text)]
        assert writes
        assert all(".128" in text for text in writes)


def test_nothing_is_atomic_or_spilled(compiled):
    for key, (usage, functions) in compiled.items():
        assert len(usage) == len(ELEMENTS) * (len(QUERY_TILES) + 1), key  # and one that combines the splits
        for name, numbers in usage.items():
            assert numbers["spilled"] == 0, (key, name, numbers)
            atomic = [
                text for _, text in functions[name] if re.search(r"\b(ATOM|ATOMG|ATOMS|RED|REDG|LDL|STL)\b", text)
            ]
            assert not atomic, (key, name)
