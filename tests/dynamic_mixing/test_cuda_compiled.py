"""The CUDA kernels of dynamic_mixing compiled for GPUs that are not here: no spill, wide loads, tensor cores."""

import re

import pytest

from tests import sass
from tests.ptx.sources import MARKS, program
from tests.sass import CAPABILITIES, ELEMENTS

pytestmark = [*sass.MARKS, *MARKS]

KERNELS = {"forward": 3, "grad_x": 2, "grad_compressed": 2, "grad_weight": 2}  # name: instantiations per dtype
OF_FORWARD = 255  # registers: one block of 8 warps on a multiprocessor
TWO_BLOCKS = 128  # two of them, for up to 16 tokens in 16 bits


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, dict[str, sass.Function]]:
    """Compute capability -> kernels."""
    kernels = {c: {} for c in CAPABILITIES}
    functions = sass.assemble(program("dynamic_mixing").files, tmp_path_factory.mktemp("cubins"))
    for (_, capability), of in functions.items():
        kernels[capability] |= of
    return kernels


@pytest.mark.parametrize("element", ELEMENTS, ids=ELEMENTS.get)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_spills_and_wide_loads(compiled, kernel, capability, element):
    wanted = re.compile(rf"{len(kernel) + 7}{kernel}_kernelI{element}(Li\d+E)?E")
    functions = {name: f for name, f in compiled[capability].items() if wanted.search(name)}
    assert len(functions) == KERNELS[kernel]
    for name, function in functions.items():
        print(kernel, capability, ELEMENTS[element], function.registers)
        sass.assert_nothing_is_atomic_or_spilled(function, name)
        if kernel == "forward":
            assert function.registers <= (TWO_BLOCKS if "Li16E" in name and element != "f" else OF_FORWARD)
        else:
            assert function.registers <= 128
        assert function.texts(r"\bHMMA\b")
        assert len(function.texts(r"\bLDG\.E\.128\b")) >= 2, "the generator's weight"
        assert function.texts(r"\bLDGSTS\.E\.BYPASS\.128\b"), "the tokens or the gradients"


def test_all_kernels_are_seen(compiled):
    for functions in compiled.values():
        assert len(functions) == sum(KERNELS.values()) * len(ELEMENTS)
