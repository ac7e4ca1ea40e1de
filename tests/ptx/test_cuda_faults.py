"""CUDA kernels broken on purpose, in the PTX that nvcc made of them: each fault is seen, and this says as what."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from tests.dynamic_mixing.cases import check_parity as check_mixing
from tests.ptx import test_cuda_dynamic_mixing as mixing
from tests.ptx import test_cuda_single_query_attention as attention
from tests.ptx.errors import PtxError
from tests.ptx.sources import MARKS
from tests.single_query_attention.cases import check_parity as check_attention

pytestmark = MARKS

ATTENTION = attention.Case(5, 150, 144, multiprocessors=0)  # two groups of three warps, five tiles each
MIXING = mixing.Case(17, 40, 2, dim=2)  # two tiles of targets
RACE = "a race: .* with no barrier in between"


def removed(pattern: str, number: int = 0) -> Callable[[str], str]:
    return changed(pattern, "", number)


def changed(pattern: str, to: str, number: int = 0) -> Callable[[str], str]:
    """Replaces occurrence `number` of what the pattern matches."""

    def edit(text: str) -> str:
        match = list(re.finditer(pattern, text))[number]
        return text[: match.start()] + match.expand(to) + text[match.end() :]

    return edit


@dataclass(frozen=True)
class Fault:
    kernel: str
    edit: Callable[[str], str]
    seen: str
    number: int

    def __str__(self):
        return f"{self.kernel} {self.number}"


def run(kernel: str, edit: Callable[[str], str] | None = None, **options) -> None:
    """The operator that has this kernel, in bfloat16, with `edit` done to that kernel."""

    def edit_one(module: str) -> str:
        return edit(module) if edit is not None and f"{kernel}_kernel" in module else module

    if kernel in ("forward", "backward"):
        with ATTENTION.gpu(edit=edit_one, **options):
            check_attention(attention.attend, ATTENTION.inputs(torch.bfloat16), normalize=True)
    else:
        with MIXING.gpu(edit=edit_one, **options):
            check_mixing(mixing.mix, MIXING.inputs(torch.bfloat16), **MIXING.options)


BLOCK_BARRIER, WARP_BARRIER = r"bar\.sync[^;]*;", r"bar\.warp\.sync[^;]*;"


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_a_missing_barrier(kernel, number):
    with pytest.raises(PtxError, match=RACE):
        run(kernel, removed(BLOCK_BARRIER, number))
