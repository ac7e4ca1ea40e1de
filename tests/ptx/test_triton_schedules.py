"""Triton's kernels whatever the order of warps, early or late asynchronous copies, and inexact special functions."""

import pytest

pytest.importorskip("triton")

from tests.ptx import triton_matrix as matrix
from tests.ptx.schedule import Order

WAYS = {
    "early": dict(late=False),
    "reversed": dict(order=Order.REVERSED),
    "random, approximate": dict(order=7, approximate=True),
}
CALLS = [
    (group, *call)
    for group in matrix.GROUPS
    for dtype, capability in matrix.OTHERS.items()
    for call in matrix.once(group, dtype, capability)
]


@pytest.mark.parametrize("group, call, capability", CALLS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_parity(way, group, call, capability, run):
    run(group, call, capability, **WAYS[way])
