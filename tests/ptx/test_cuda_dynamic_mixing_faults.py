"""The forward kernel of dynamic_mixing broken on purpose, in the PTX that nvcc made of it: each fault is seen."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.ptx.errors import PtxError
from tests.ptx.sources import MARKS, program
from tests.ptx.test_cuda_dynamic_mixing import Case, mix_compressed

pytestmark = MARKS

PATTERNS = {
    "bar.sync": r"bar\.sync[^;]*;",
    "bar.warp.sync": r"bar\.warp\.sync[^;]*;",
    "wait_group": r"cp\.async\.wait_group \d;",
}
COUNTS = {"bar.sync": 4, "bar.warp.sync": 8, "wait_group": 2}
# Passes of 16 targets and parts of a segment; then mixed in place, two tiles of rows, and 64, 80 and 48 channels.
CALLS = [
    (Case(17, 184, 1, 1, 2, 9, 99), False),
    *((Case(17, channels, 2, 2, 2, 9), with_mean) for channels in (128, 160, 96) for with_mean in (False, True)),
]


def mangled() -> str:
    return next(n for n in program("dynamic_mixing").names if "forward_kernelI13__nv_bfloat16Li32" in n)


def removed(pattern: str, number: int) -> Callable[[str], str]:
    def edit(text: str) -> str:
        match = list(re.finditer(pattern, text))[number]
        return text[: match.start()] + text[match.end() :]

    return edit


def run(edit: Callable[[str], str], case: Case, with_mean: bool) -> None:
    name = mangled()
    with case.gpu(edit=lambda other, module: edit(module) if other == name else module):
        x, *compress, weight, bias, _ = (each.detach() for each in case.inputs(torch.bfloat16))
        mix_compressed(x, F.linear(x, *compress), weight, bias, **case.options, with_mean=with_mean)


@pytest.mark.parametrize("case, with_mean", CALLS, ids=str)
def test_nothing_is_wrong_without_a_fault(case, with_mean):
    run(lambda text: text, case, with_mean)


def test_no_barrier_is_left_out_here():
    text = program("dynamic_mixing").modules[90][mangled()]
    assert {name: len(re.findall(pattern, text)) for name, pattern in PATTERNS.items()} == COUNTS


@pytest.mark.parametrize("name, number", [(name, n) for name, count in COUNTS.items() for n in range(count)])
def test_a_missing_barrier_or_wait(name, number):
    with pytest.raises(PtxError, match="a race: .* with no barrier in between|asynchronous copy may be writing it"):
        for call in CALLS:
            run(removed(PATTERNS[name], number), *call)
