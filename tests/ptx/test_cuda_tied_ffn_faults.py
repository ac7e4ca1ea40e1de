"""The CUDA kernels of tied_ffn broken on purpose, in the PTX that nvcc made of them: each fault is seen."""

import re
from collections.abc import Callable

import pytest
import torch

from tests.parity import assert_parity
from tests.ptx.errors import PtxError
from tests.ptx.sources import MARKS, program
from tests.ptx.test_cuda_faults import BEYOND, changed
from tests.ptx.test_cuda_tied_ffn import feed_forward, gpu, named
from tests.tied_ffn.cases import check_parity, make_inputs
from tokenfusion.kernels.tied_ffn import reference

pytestmark = MARKS

DIRECTIONS = ("forward", "backward")
CONSTANT = r"\b0f[0-9A-F]{8}\b"
PLAIN = {"0f00000000", "0f3F800000", "0fBF800000"}  # 0, 1 and -1


def gpu_with(direction: str, dtype: torch.dtype, activation: str, edit: Callable[[str], str]):
    """Where this kernel runs after an edit, and the others as they are."""
    name = named(direction, dtype, activation)
    return gpu(edit=lambda other, module: edit(module) if other == name else module)


def run(direction: str, edit: Callable[[str], str], dtype: torch.dtype = torch.bfloat16) -> None:
    """A call that takes every way through the kernel: four, two and one vector together, and elements by themselves."""
    with gpu_with(direction, dtype, "gelu", edit):
        check_parity(feed_forward, make_inputs(301, channels=4, features=171, dtype=dtype))


def constants(direction: str, activation: str) -> list[str]:
    text = program("tied_ffn").modules[90][named(direction, torch.float32, activation)]
    return sorted(set(re.findall(CONSTANT, text)) - PLAIN)


def doubled(constant: str) -> str:
    return f"0f{int(constant[2:], 16) + (1 << 23):08X}"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_is_wrong_without_a_fault(direction):
    run(direction, lambda text: text)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_a_wrong_constant_of_an_activation(activation):
    """In its derivative, which has all of them."""
    u = torch.linspace(-6, 6, 801)[:, None]
    weight, grad = torch.ones(1, 1), torch.ones(len(u), 1)

    def gradient(x, grad):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(reference.ACTIVATIONS[activation](x), x, grad)[0]

    def check(edit):
        with gpu_with("backward", torch.float32, activation, edit):
            operands = (t.clone() for t in (grad, u, weight))
            got, *_ = torch.ops.tokenfusion.tied_ffn_backward_cuda(
                *operands, None, torch.empty(0), activation, [True, False, False, False]
            )
        assert_parity(got, gradient(u, grad), gradient(u.double(), grad.double()))

    check(lambda text: text)
    for constant in constants("backward", activation):
        with pytest.raises(AssertionError, match="largest difference"):
            check(lambda text, constant=constant: text.replace(constant, doubled(constant)))


@pytest.mark.parametrize("number", [0, 4])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("opcode", ["ld", "st"])
def test_an_access_beyond_the_end(opcode, direction, number):
    """A vector further, after the last."""
    with pytest.raises((PtxError, AssertionError), match=f"{BEYOND}|largest difference"):
        run(direction, changed(rf"({opcode}\.global\.v4\.[ub]32\s+[^;]*\[%rd\d+)\]", r"\1+16]", number))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_vectors_taken_together_although_one_is_beyond_the_end(direction):
    with pytest.raises(PtxError, match=BEYOND):
        run(direction, changed(r"setp\.lt\.s64\s+(%p\d+), %rd\d+, %rd\d+;", r"setp.lt.s64 \1, 0, 0;"))


def test_a_part_of_a_sum_that_is_missing():
    with pytest.raises(AssertionError, match="bias_in: largest difference"):
        run("backward", changed(r"add(?:\.rn)?\.f32\s+(%f\d+), (%f\d+), %f\d+;", r"mov.f32 \1, \2;"))


@pytest.mark.parametrize("direction, number", [("forward", -2), ("backward", -3)])
def test_an_element_by_itself_that_is_not_stored(direction, number):
    """The last of three."""
    with pytest.raises(AssertionError, match="largest difference"):
        run(direction, changed(r"st\.global\.f32\s+[^;]*;", "", number), torch.float32)
