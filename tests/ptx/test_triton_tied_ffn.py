"""Every tile and option of the Triton kernels of tied_ffn, compiled for GPUs and interpreted."""

import pytest

pytest.importorskip("triton")

from tests.ptx.triton_matrix import everything_of


@pytest.mark.parametrize("call, capability", everything_of("tied_ffn"), ids=str)
def test_parity(call, capability, run):
    run("tied_ffn", call, capability)
