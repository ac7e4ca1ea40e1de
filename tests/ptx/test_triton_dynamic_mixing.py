"""Every tile and option of the Triton kernels of dynamic_mixing, compiled for GPUs and interpreted."""

import pytest

pytest.importorskip("triton")

from tests.ptx import triton_matrix as matrix

CALLS = [each for dtype in matrix.TARGETS for each in matrix.tiles("dynamic_mixing", dtype)] + matrix.options(
    "dynamic_mixing"
)


@pytest.mark.parametrize("call, capability", CALLS, ids=str)
def test_parity(call, capability, run):
    run("dynamic_mixing", call, capability)
