"""Every option of single_query_attention's Triton kernels, and real numbers of channels, compiled and interpreted."""

import pytest

pytest.importorskip("triton")

from tests.ptx.triton_matrix import options


@pytest.mark.parametrize("call, capability", options("single_query_attention"), ids=str)
def test_parity(call, capability, run):
    run("single_query_attention", call, capability)
