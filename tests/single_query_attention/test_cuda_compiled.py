"""The CUDA kernels of single_query_attention compiled for GPUs that are not here: no spill, one read of tokens."""

import re

import pytest

from tests import sass
from tests.ptx.sources import MARKS, program
from tests.sass import CAPABILITIES, ELEMENTS

pytestmark = [*sass.MARKS, *MARKS]

DIRECTIONS = ("forward", "backward")
VARIANTS = [  # element, tiles of queries, whether each warp has as many channels as it can
    (element, query_tiles, full)
    for element, name in ELEMENTS.items()
    for query_tiles, full in ((1, False), (1, True), (2, False), (2, True), (4, False))
    if (name, query_tiles, full) != ("float16", 2, True)
]


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
def compiled(tmp_path_factory) -> dict[tuple[str, int], dict[str, sass.Function]]:
    """(direction, compute capability) -> its kernels."""
    results = sass.assemble(program("single_query_attention").files, tmp_path_factory.mktemp("cubins"))
    return {(name.rpartition("_")[2], capability): functions for (name, capability), functions in results.items()}


def _name(names, direction: str, element: str, query_tiles: int, full: bool) -> str:
    wanted = f"{len(direction) + 7}{direction}_kernelI{element}Li{query_tiles}ELb{int(full)}E"
    (name,) = [name for name in names if wanted in name]
    return name


@pytest.mark.parametrize("element, query_tiles, full", VARIANTS)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_spills_and_wide_loads_in_the_main_loop(compiled, direction, capability, element, query_tiles, full):
    functions = compiled[direction, capability]
    kernel = functions[_name(functions, direction, element, query_tiles, full)]
    print(direction, capability, ELEMENTS[element], query_tiles, full, kernel.registers)
    assert kernel.spilled == 0, kernel.spilled
    assert kernel.registers <= 255, kernel.registers
    loop = _main_loop(kernel.instructions)
    is_cut = query_tiles == 4  # which reads and writes what other launches make, too
    reads = [text for text in loop if re.search(r"\bLDGSTS\b" if is_cut else r"\b(LDG|LDGSTS)\b", text)]
    assert reads
    assert all(re.search(r"\bLDGSTS\.E\.BYPASS\b.*?\.128\b", text) for text in reads), reads
    if direction == "backward":
        writes = [text for text in loop if re.search(r"\bSTG\b", text)]
        assert writes
        assert all(re.search(r"\.(128|64)\b" if is_cut else r"\.128\b", text) for text in writes), writes


def test_nothing_is_atomic_or_spilled(compiled):
    for key, functions in compiled.items():
        assert len(functions) == len(VARIANTS) + len(ELEMENTS), key  # and those that combine the splits
        for name, function in functions.items():
            sass.assert_nothing_is_atomic_or_spilled(function, (key, name))
