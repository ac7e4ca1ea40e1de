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
CALLS = [  # every kernel in every way, in a dtype that changes from kernel to kernel
    (way, group, *call)
    for i, group in enumerate(matrix.GROUPS)
    for j, way in enumerate(WAYS)
    for dtype, capability in [list(matrix.OTHERS.items())[(i + j) % len(matrix.OTHERS)]]
    for call in matrix.once(group, dtype, capability)
]


@pytest.mark.parametrize("way, group, call, capability", CALLS, ids=str)
def test_parity(way, group, call, capability, run):
    run(group, call, capability, **WAYS[way])
