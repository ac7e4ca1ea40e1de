"""Every tile and option of the Triton kernels of upconv, compiled for GPUs and interpreted."""

import pytest

pytest.importorskip("triton")

from tests.ptx import triton_matrix as matrix

CALLS = [each for dtype in matrix.TARGETS for each in matrix.tiles("upconv", dtype)] + matrix.options("upconv")


@pytest.mark.parametrize("call, capability", CALLS, ids=str)
def test_parity(call, capability, run):
    run("upconv", call, capability)
