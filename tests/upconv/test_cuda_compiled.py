"""The CUDA kernels of the up-convolutions compiled for GPUs that are not here: no spill, wide accesses."""

import re

import pytest

from tests import sass
from tests.ptx.sources import MARKS, program
from tests.sass import CAPABILITIES

pytestmark = [*sass.MARKS, *MARKS]

KERNELS = 20  # of a direction
FULL_OCCUPANCY = 64  # registers with which a multiprocessor takes 1024 threads
WIDE = {"forward": {"LDG": 2, "STG": 2}, "backward": {"LDG": 1, "STG": 1}}  # accesses of 16 bytes, at least
BY_NUMBERS = r"_kernelI\w+Li1E"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple[str, int], dict[str, sass.Function]]:
    return sass.assemble(program("upconv").files, tmp_path_factory.mktemp("cubins"))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_spills_and_wide_accesses(compiled, direction, capability):
    functions = compiled[f"upconv_{direction}", capability]
    assert len(functions) == KERNELS
    for name, function in functions.items():
        print(name, capability, function.registers)
        sass.assert_nothing_is_atomic_or_spilled(function, name)
        assert function.registers <= FULL_OCCUPANCY, name
        if not re.search(BY_NUMBERS, name):
            for opcode, count in WIDE[direction].items():
                if not ("backward_planes" in name and opcode == "STG"):  # in the product, a number for each offset
                    assert len(function.texts(rf"\b{opcode}\.E\.128\b")) >= count, name
