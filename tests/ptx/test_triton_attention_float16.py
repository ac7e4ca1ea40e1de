"""Every tile of single_query_attention's Triton kernels in float16, compiled for a GPU and interpreted."""

import pytest

pytest.importorskip("triton")

from tests.ptx.triton_matrix import tiles


@pytest.mark.parametrize("call, capability", tiles("single_query_attention", "float16"), ids=str)
def test_parity(call, capability, run):
    run("single_query_attention", call, capability)
