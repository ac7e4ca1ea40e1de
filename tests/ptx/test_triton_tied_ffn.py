"""Every tile and option of the Triton kernels of tied_ffn, compiled for GPUs and interpreted."""

import pytest

pytest.importorskip("triton")

from tests.ptx import triton_matrix as matrix

CALLS = [each for dtype in matrix.TARGETS for each in matrix.tiles("tied_ffn", dtype)] + matrix.options("tied_ffn")


@pytest.mark.parametrize("call, capability", CALLS, ids=str)
def test_parity(call, capability, run):
    run("tied_ffn", call, capability)
