"""CUDA kernels broken on purpose, in the PTX that nvcc made of them: each fault is seen."""

import re
from collections.abc import Callable

import pytest
import torch

from tests.dynamic_mixing.cases import check_parity as check_mixing
from tests.gradients import with_gradients
from tests.ptx import test_cuda_dynamic_mixing as mixing
from tests.ptx import test_cuda_single_query_attention as attention
from tests.ptx.errors import PtxError
from tests.ptx.sources import MARKS, program
from tests.single_query_attention.cases import check_parity as check_attention

pytestmark = MARKS

WHOLE = ("forward", "backward")
STRIPS = ("forward of a strip", "backward of a strip")
ATTENTION = (*WHOLE, *STRIPS)
MIXING = ("resident", "streamed")  # the backward pass, by whether its generator stays in shared memory
OF_THE_BLOCK, OF_A_WARP = r"bar\.sync[^;]*;", r"bar\.warp\.sync[^;]*;"
WAIT = r"cp\.async\.wait_group (\d);"
RACE = "a race: .* with no barrier in between"
BEYOND = "access global memory outside of every tensor"


def mangled(kernel: str) -> str:
    """The kernel for bfloat16 and the fewest queries or, where a test does not say so, tokens; of strips, the most."""
    operator = "single_query_attention" if kernel in ATTENTION else "dynamic_mixing"
    name = "backward" if kernel in MIXING else kernel.removesuffix(" of a strip")
    variant = dict(resident="Li2ELb1E", streamed="Li2ELb0E").get(kernel, "")
    start = f"{operator}{len(name) + 7}{name}_kernelI13__nv_bfloat16{variant}"
    names = [name for name in program(operator).names if start in name]
    return max(names) if kernel in STRIPS else min(names)


def changed(pattern: str, to: str, number: int = 0) -> Callable[[str], str]:
    """Replaces occurrence `number` of what the pattern matches."""

    def edit(text: str) -> str:
        match = list(re.finditer(pattern, text))[number]
        return text[: match.start()] + match.expand(to) + text[match.end() :]

    return edit


def removed(pattern: str, number: int = 0) -> Callable[[str], str]:
    return changed(pattern, "", number)


# Of the mixing: two tiles of rows, of whole segments and of parts.
CALLS = {
    "resident": [mixing.Case(17, 48, 2, 1, 2, 9), mixing.Case(17, 184, 1, 1, 2, 9, 99)],
    "streamed": [
        mixing.Case(17, 16, 2, 2, 2, 9, 99),
        mixing.Case(17, 184, 1, 2, 2, 9, 99),
        mixing.Case(17, 8, 1, 8, 2, 2, 99),  # the bias among 16 columns
        mixing.Case(17, 8, 1, 16, 2, 2, 99),  # several pairs of targets a warp
    ],
}


def run(
    kernel: str, edit: Callable[[str], str], with_results: bool = False, alone: bool = False, call: int = 0
) -> None:
    """The kernel after an edit; with results, those of the whole operator are compared with the reference."""
    name = mangled(kernel)

    def edit_one(other: str, module: str) -> str:
        return edit(module) if other == name else module

    options = dict(edit=edit_one, interpret=with_results or name.__eq__)
    if kernel in ATTENTION:  # three groups of two warps, three or four tiles each; or one warp with one tile
        case = attention.Case(5, 10 if alone else 150, 96 if alone else 208, multiprocessors=0)
        if kernel in STRIPS:  # of several warps, or of one
            case = attention.Case(20, 40, 320 if alone else 960, 18 if alone else 60, multiprocessors=0)
        function, check, of_case = attention.attend, check_attention, dict(normalize=True)
    else:
        case, function, check = CALLS[kernel][call], mixing.mix, check_mixing
        of_case = case.options
    with case.gpu(**options):
        inputs = case.inputs(torch.bfloat16)
        if kernel in ATTENTION:
            inputs[1].data.add_(10)  # tokens far from zero, which are shifted
        (check if with_results else with_gradients)(function, inputs, **of_case)


@pytest.mark.parametrize("kernel", [*ATTENTION, *MIXING])
def test_nothing_is_wrong_without_a_fault(kernel):
    run(kernel, lambda text: text)


BARRIERS = dict(forward=(5, 4), backward=(5, 6), resident=(15, 6), streamed=(14, 15))
BARRIERS |= {"forward of a strip": (7, 6), "backward of a strip": (7, 8)}
# several have barriers of their group in their place
OF_A_LONE_WARP = {("forward", 2), ("forward", 3), ("backward", 2), ("backward", 5)}
OF_A_LONE_WARP |= {(STRIPS[0], 3), (STRIPS[0], 5), (STRIPS[1], 3), (STRIPS[1], 7)}
# without an access to shared memory in between, or with accesses of the same threads to the same places
ANOTHER_FOLLOWS = {("resident", 1), ("streamed", 7)}
OF_LANES_THAT_READ_WHAT_THEY_WROTE = {(kernel, 1) for kernel in STRIPS}  # where a warp is alone
WAITS = dict(resident=range(4), streamed=(0, 1, 3, 4, 5))  # 2: what a warp needs of the generator was waited for
ANOTHER_OF_THE_BLOCK_FOLLOWS = {("resident", 5), ("resident", 8), ("streamed", 4), ("streamed", 7)}


def run_all(kernel: str, edit: Callable[[str], str], alone: bool = False) -> None:
    for call in range(len(CALLS.get(kernel, [None]))):
        run(kernel, edit, alone=alone, call=call)


@pytest.mark.parametrize("kernel, number", [(k, n) for k, (count, _) in BARRIERS.items() for n in range(count)])
def test_a_missing_barrier_of_a_block(kernel, number):
    if (kernel, number) in ANOTHER_OF_THE_BLOCK_FOLLOWS:
        run_all(kernel, removed(OF_THE_BLOCK, number))
    else:
        with pytest.raises(PtxError, match=RACE):
            run_all(kernel, removed(OF_THE_BLOCK, number))


@pytest.mark.parametrize("kernel, number", [(k, n) for k, (_, count) in BARRIERS.items() for n in range(count)])
def test_a_missing_barrier_of_a_warp(kernel, number):
    alone = (kernel, number) in OF_A_LONE_WARP
    if (kernel, number) in ANOTHER_FOLLOWS | OF_LANES_THAT_READ_WHAT_THEY_WROTE:
        run_all(kernel, removed(OF_A_WARP, number), alone)
    else:
        with pytest.raises(PtxError, match=RACE):
            run_all(kernel, removed(OF_A_WARP, number), alone)


def test_no_barrier_is_left_out_here():
    for kernel, counts in BARRIERS.items():
        module = program("single_query_attention" if kernel in ATTENTION else "dynamic_mixing").modules[90]
        text = module[mangled(kernel)]
        assert tuple(len(re.findall(each, text)) for each in (OF_THE_BLOCK, OF_A_WARP)) == counts, kernel


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_a_barrier_for_fewer_threads(kernel):
    with pytest.raises(PtxError, match=f"{RACE}|more threads arrive|deadlock"):
        run(kernel, changed(r"(bar\.sync %r\d+), %r\d+;", r"\1, 64;", -1))


@pytest.mark.parametrize("kernel", ATTENTION)
def test_a_wait_for_one_copy_less(kernel):
    with pytest.raises(PtxError, match="reads shared memory while an asynchronous copy may be writing it"):
        run(kernel, changed(WAIT, "cp.async.wait_group 1;"))


@pytest.mark.parametrize("kernel, number", [(k, n) for k, those in WAITS.items() for n in those])
def test_a_wait_for_no_copy(kernel, number):
    with pytest.raises(PtxError, match="asynchronous copy may be writing it"):
        run_all(kernel, removed(WAIT, number))


@pytest.mark.parametrize("kernel", ["forward", "backward", *MIXING])
def test_a_matrix_from_the_wrong_place(kernel):
    with pytest.raises(AssertionError, match="largest difference|depends on memory that nothing has written"):
        run(kernel, changed(r"(ldmatrix[^\[]*\[%r\d+)\]", r"\1+16]", 1), with_results=True)


def test_a_misaligned_matrix():
    with pytest.raises(PtxError, match="misaligned"):
        run("forward", changed(r"(ldmatrix[^\[]*\[%r\d+)\]", r"\1+8]"))


def test_operands_of_a_product_changed_places():
    with pytest.raises(AssertionError, match="largest difference"):
        run("forward", changed(r"(mma\.sync.*?\}, \{%r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2"), with_results=True)


@pytest.mark.parametrize("kernel", WHOLE)
def test_a_store_beyond_the_end(kernel):
    with pytest.raises(PtxError, match=f"{BEYOND}.*offset 2080 of a storage of 2080 bytes"):
        run(kernel, changed(r"(st\.global\.v4\.u16\s+\[%rd\d+)\]", r"\1+416]"))  # the row behind each of five


def test_a_copy_of_what_is_beyond_the_end():
    with pytest.raises(PtxError, match=BEYOND):
        run("forward", changed(r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+)\]", r"\1+62400]"))


def test_shared_memory_beyond_the_end():
    with pytest.raises(PtxError, match="access shared memory beyond its"):
        run("forward", changed(r"(st\.shared\.f32\s+\[%r\d+)\]", r"\1+232448]"))


def test_a_shuffle_of_some_lanes():
    odd = "{ .reg .b32 %lane; .reg .pred %odd; mov.u32 %lane, %laneid; setp.lt.u32 %odd, %lane, 9;"
    with pytest.raises(PtxError, match="divergent"):
        run("forward", changed(r"(shfl\.sync[^;]*;)", odd + r" @%odd \1 }"))


def test_an_instruction_that_is_not_known():
    with pytest.raises(PtxError, match="(?s)frobnicate.*forward_kernel"):
        run("forward", changed(r"bar\.sync", "frobnicate.sync"))
