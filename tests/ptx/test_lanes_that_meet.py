"""Lanes of a warp that store to one place of shared memory at once: one of them stays. Warps that do so race."""

import numpy as np
import pytest

from .errors import PtxError
from .kernels import run
from .schedule import Order

STORE = """
    .shared .align 4 .b8 memory[64]; mov.u32 %r1, memory;
    st.shared.b32 [%r1], {value}; bar.sync 0; ld.shared.b32 %r2, [%r1]; st.global.b32 [%rd1], %r2;
"""


@pytest.mark.parametrize("order, stays", [(Order.ROUND_ROBIN, 31), (Order.REVERSED, 0)])
def test_one_lane_stays(order, stays):
    out = np.zeros(1, np.int32)
    run(STORE.format(value="%r0"), np.zeros(1, np.int32), out, order=order)
    assert out.item() == stays


def test_warps_that_store_different_values_race():
    with pytest.raises(PtxError, match="a race"):
        run(STORE.format(value="%r0"), np.zeros(1, np.int32), np.zeros(1, np.int32), block=64)


@pytest.mark.parametrize("order", Order)
def test_warps_may_store_the_same(order):
    out = np.zeros(1, np.int32)
    run(STORE.format(value="7"), np.zeros(1, np.int32), out, block=64, order=order)
    assert out.item() == 7
