"""Every tile and option of the Triton kernels of wide, compiled for GPUs and interpreted."""

import pytest

pytest.importorskip("triton")

from tests.ptx import triton_matrix as matrix

CALLS = [each for dtype in matrix.TARGETS for each in matrix.tiles("wide", dtype)] + matrix.options("wide")


@pytest.mark.parametrize("call, capability", CALLS, ids=str)
def test_parity(call, capability, run):
    run("wide", call, capability)
