"""The CUDA kernels of the up-convolutions broken on purpose, in the PTX that nvcc made of them: each fault is seen."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from tests.gradients import Tensors, with_gradients
from tests.ptx.errors import PtxError
from tests.ptx.observe import Observer
from tests.ptx.sources import MARKS, program
from tests.ptx.test_cuda_faults import BEYOND, OF_THE_BLOCK, RACE, changed, removed
from tests.ptx.test_cuda_upconv import (
    PIXEL_NUMBERS,
    PIXEL_VECTORS,
    PLANE_NUMBERS,
    PLANE_VECTORS,
    TILES,
    TILES_AND_A_REST,
    gpu,
    named,
)
from tests.upconv.cases import OPS, check, make_inputs

pytestmark = MARKS

DTYPE = torch.bfloat16
DIRECTIONS = ("forward", "backward")
WAYS = {
    ("pixels", 8): [PIXEL_VECTORS | {"size": (12, 20)}],
    ("pixels", 1): [PIXEL_NUMBERS | {"size": (20, 21)}],
    ("planes", 8, 4): [PLANE_VECTORS | {"size": (16, 32)}],
    ("planes", 1, 1): [PLANE_NUMBERS],
    ("tiles",): [TILES | {"channels": (3, 10, 100)}, TILES_AND_A_REST],
}
IDS = [" ".join(map(str, way)) for way in WAYS]


def name_of(direction: str, way: tuple) -> str:
    return named(direction, way[0], DTYPE, *way[1:])


def calls(way: tuple) -> Iterator[tuple[str, Tensors]]:
    """Of all that the kernels of this way do; in the last, a skip is copied that is no whole vectors."""
    for case in WAYS[way]:
        yield "concat", make_inputs("concat", dtype=DTYPE, **case)
    yield "add", make_inputs("add", dtype=DTYPE, **WAYS[way][0])
    x, weight, bias, skip, grad = make_inputs("concat", dtype=DTYPE, **WAYS[way][0])
    wide = F.pad(skip.detach(), (1, 2, 0, 0, 1, 0))
    yield "concat", (x, weight, bias, wide[:, 1:, :, 1:-2].requires_grad_(), grad)


def run(direction: str, way: tuple, edit: Callable[[str], str], number: int | None = None) -> None:
    """Calls, or the one of this number, whose kernel of this direction runs after an edit."""
    name = name_of(direction, way)
    with gpu(edit=lambda other, module: edit(module) if other == name else module) as device:
        for op, inputs in list(calls(way))[number : None if number is None else number + 1]:
            check(op, inputs)
    assert name in {each.kernel for each in device.launches}


class Reached(Observer):
    """The first call of those that reach an access to global memory, by its line."""

    def __init__(self):
        self.call, self.lines = 0, {}

    def accessed(self, instruction, space, addresses, width, threads):
        if space == "global" and len(threads):
            self.lines.setdefault(instruction.line, self.call)


def reached(direction: str, way: tuple) -> dict[int, int]:
    """The lines of the accesses that the kernel makes, each with the number of a call."""
    observer = Reached()
    with gpu(interpret=name_of(direction, way).__eq__, observers=[observer]):
        for observer.call, (op, inputs) in enumerate(calls(way)):
            with_gradients(OPS[op][0], inputs)
    return observer.lines


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_nothing_is_wrong_without_a_fault(way):
    for direction in DIRECTIONS:
        run(direction, way, lambda text: text)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_missing_barrier(direction):
    assert len(re.findall(OF_THE_BLOCK, program("upconv").modules[90][name_of(direction, ("tiles",))])) == 1
    with pytest.raises(PtxError, match=RACE):
        run(direction, ("tiles",), removed(OF_THE_BLOCK))


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_access_that_is_elsewhere(direction, way):
    """Each that is reached by itself, further by its own width."""
    text = program("upconv").modules[90][name_of(direction, way)]
    pattern = r"((?:ld|st)\.global\.(?:v4\.)?[ubf](\d+)\s+[^;]*?\[%rd\d+)(?:\+(\d+))?\]"
    lines, seen = reached(direction, way), 0
    for number, match in enumerate(re.finditer(pattern, text)):
        call = lines.get(text.count("\n", 0, match.start()) + 1)
        if call is None:
            continue
        width = int(match[2]) // 8 * (4 if ".v4" in match[0] else 1)
        with pytest.raises((PtxError, AssertionError), match=f"{BEYOND}|largest difference|is not aligned"):
            run(direction, way, changed(pattern, rf"\1+{int(match[3] or 0) + width}]", number), call)
        seen += 1
    assert seen == len(lines) > 0


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_a_part_of_a_sum_that_is_missing(way):
    """The last addition: of what a lane or a line has seen."""
    with pytest.raises(AssertionError, match="bias: "):
        run("backward", way, changed(r"add(?:\.rn)?\.f32\s+(%f\d+), (%f\d+), %f\d+;", r"mov.f32 \1, \2;", -1))


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_a_bias_that_is_not_added(way):
    with pytest.raises(AssertionError, match="out: "):
        run("forward", way, changed(r"add(?:\.rn)?\.f32\s+(%f\d+), (%f\d+), %f\d+;", r"mov.f32 \1, 0f00000000;"))
