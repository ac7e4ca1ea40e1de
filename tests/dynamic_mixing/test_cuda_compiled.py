"""The CUDA kernels of dynamic_mixing compiled for GPUs that are not here: no spill, wide loads, tensor cores."""

import re

import pytest

from tests import sass
from tests.ptx.sources import MARKS, program
from tests.sass import CAPABILITIES, ELEMENTS

pytestmark = [*sass.MARKS, *MARKS]

KERNELS = {"forward": (3, 3), "backward": (5, 4), "generator": (1, 1)}  # name: instantiations in 16 bits, in 32
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


def found(functions: dict[str, sass.Function], kernel: str, element: str) -> dict[str, sass.Function]:
    wanted = re.compile(rf"{len(kernel) + 7}{kernel}_kernelI{element}(Li\d+E(Lb\dE)?)?E")
    of_kernel = {name: f for name, f in functions.items() if wanted.search(name)}
    assert len(of_kernel) == KERNELS[kernel][element == "f"]
    return of_kernel


@pytest.mark.parametrize("element", ELEMENTS, ids=ELEMENTS.get)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_spilled(compiled, kernel, capability, element):
    for name, function in found(compiled[capability], kernel, element).items():
        print(kernel, capability, ELEMENTS[element], function.registers)
        sass.assert_nothing_is_atomic_or_spilled(function, name)


@pytest.mark.parametrize("element", ELEMENTS, ids=ELEMENTS.get)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_forward_loads_widely(compiled, capability, element):
    for name, function in found(compiled[capability], "forward", element).items():
        assert function.registers <= (TWO_BLOCKS if "Li16E" in name and element != "f" else OF_FORWARD)
        assert function.texts(r"\bHMMA\b")
        assert len(function.texts(r"\bLDG\.E\.128\b")) >= 2, "the generator's weight"
        assert function.texts(r"\bLDGSTS\.E\.BYPASS\.128\b"), "the tokens"


@pytest.mark.parametrize("element", ELEMENTS, ids=ELEMENTS.get)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_backward_moves_vectors(compiled, capability, element):
    for function in found(compiled[capability], "backward", element).values():
        assert function.registers <= (255 if element == "f" else 128)
        assert function.texts(r"\bHMMA\b")
        assert len(function.texts(r"\bLDGSTS\.E\.BYPASS\.128\b")) >= 3, "the generator, tokens and gradients"
        assert len(function.texts(r"\bSTG\.E\.128\b")) >= 3, "gradients of tokens and logits, and inputs"
        assert len(function.texts(r"\bLDS\.128\b")) >= 3, "the same"


def test_all_kernels_are_seen(compiled):
    for functions in compiled.values():
        assert len(functions) == sum(2 * in_16_bits + in_32 for in_16_bits, in_32 in KERNELS.values())
