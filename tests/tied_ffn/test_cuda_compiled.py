"""The CUDA kernels of tied_ffn compiled for GPUs that are not here: no spill, wide accesses, few instructions."""

import pytest

from tests import sass
from tests.ptx.sources import MARKS, program
from tests.sass import CAPABILITIES

pytestmark = [*sass.MARKS, *MARKS]

KERNELS = 15  # of a direction
WIDE = {"forward": {"LDG": 5, "STG": 5}, "backward": {"LDG": 6, "STG": 7}}  # accesses of 16 bytes, at least
FULL_OCCUPANCY = 64  # registers with which a multiprocessor takes 1024 threads


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple[str, int], dict[str, sass.Function]]:
    return sass.assemble(program("tied_ffn").files, tmp_path_factory.mktemp("cubins"))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_spills_and_wide_accesses(compiled, direction, capability):
    functions = compiled[f"tied_ffn_{direction}", capability]
    assert len(functions) == KERNELS
    for name, function in functions.items():
        print(name, capability, function.registers)
        sass.assert_nothing_is_atomic_or_spilled(function, name)
        assert function.registers <= FULL_OCCUPANCY, name
        for opcode, count in WIDE[direction].items():
            assert len(function.texts(rf"\b{opcode}\.E\.128\b")) >= count, name
