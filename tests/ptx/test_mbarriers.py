"""mbarriers: phases, arrivals, bytes that are to come, and what waiters know."""

import numpy as np
import pytest

from .errors import PtxError
from .kernels import run
from .schedule import Order

ORDERS = [Order.ROUND_ROBIN, Order.REVERSED, 0, 1]
SETUP = """
    .shared .align 16 .b8 s[1024]; .shared .align 8 .b8 b[16]; setp.eq.u32 %p1, %r0, 0; mul.wide.u32 %rd1, %r0, 4;
    add.u64 %rd1, %rd1, %rd0;
    mov.u32 %r1, s; shl.b32 %r2, %r0, 2; add.u32 %r1, %r1, %r2; mov.u32 %r2, %r1; mov.u32 %r3, 0;
    @%p1 mbarrier.init.shared::cta.b64 [b], {count}; fence.mbarrier_init.release.cluster; bar.sync 0;
"""
ARRIVE = "mbarrier.arrive.shared::cta.b64 %rd5, [b];\n"
WRITE, READ = "st.shared.u32 [%r1], %r0;\n", "ld.shared.u32 %r3, [%r2];\n"
OTHER_WARP = "xor.b32 %r2, %r2, 128;\n"
STORE = "st.global.u32 [%rd1], %r3;\n"


def wait(label, condition="parity.shared::cta.b64 %p2, [b], 0", what="try_wait"):
    return f"${label}: mbarrier.{what}.{condition}; @!%p2 bra ${label};\n"


def read(body, count=128, threads=128, **options):
    out = np.zeros(threads, np.uint32)
    run(SETUP.format(count=count) + body + STORE, out, block=threads, **options)
    return out


def fails(words, body, **options):
    with pytest.raises(PtxError, match=words) as caught:
        read(body, **options)
    return caught.value


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", ["try_wait", "test_wait"])
@pytest.mark.parametrize("condition", ["parity.shared::cta.b64 %p2, [b], 0", "shared::cta.b64 %p2, [b], %rd5",
                                       "parity.acquire.cta.shared::cta.b64 %p2, [b], 0"])  # fmt: skip
def test_waiters_see_what_was_written_before_the_arrivals(condition, what, order):
    out = read(WRITE + ARRIVE + OTHER_WARP + wait("w", condition, what) + READ, order=order)
    np.testing.assert_array_equal(out, np.arange(128) ^ 32)


@pytest.mark.parametrize("order", ORDERS)
def test_without_the_wait_it_is_a_race(order):
    fails("a race|nothing has written", WRITE + ARRIVE + OTHER_WARP + READ, order=order)
    late = ARRIVE + WRITE + OTHER_WARP + wait("w") + READ  # written after the arrival
    fails("a race|nothing has written", late, order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_phases_follow_each_other(order):
    """Three rounds of writing and reading, each between two phases."""
    body = ""
    for phase in range(6):
        body += "add.u32 %r3, %r3, 1; st.shared.u32 [%r1], %r3;\n" if phase % 2 == 0 else READ
        body += "xor.b32 %r2, %r2, 128;\n" if phase == 0 else ""
        body += ARRIVE + wait(f"w{phase}", f"parity.shared::cta.b64 %p2, [b], {phase % 2}")
    assert (read(body, order=order) == 3).all()


def test_the_wrong_phase_is_a_deadlock_which_says_who_waits_where():
    fails("deadlock", ARRIVE + wait("w") + wait("v", "parity.shared::cta.b64 %p2, [b], 1"))
    caught = fails("deadlock", ARRIVE + wait("w"), count=129)
    assert "warps [0, 1, 2, 3] of block [0, 0, 0] wait at line" in str(caught)
    assert "the mbarrier at" in str(caught) and "in phase 0, 1 arrivals and 0 bytes are missing" in str(caught)


def test_a_phase_that_lies_behind_is_complete_at_once():
    """The parity of the phase before the first counts as complete: so producers find their ring empty."""
    read(wait("w", "parity.shared::cta.b64 %p2, [b], 1"))


def test_counts_of_arrivals():
    read("@%p1 mbarrier.arrive.shared::cta.b64 _, [b], 128;" + wait("w"))
    fails("more arrivals", "@%p1 mbarrier.arrive.shared::cta.b64 _, [b], 127;" + ARRIVE)


def test_bytes_that_are_expected_hold_the_phase():
    one = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 64;\n"
    assert "0 arrivals and 64 bytes are missing" in str(fails("deadlock", one + wait("w"), count=1))
    two = "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [b], 32; @%p1 mbarrier.arrive.shared::cta.b64 _, [b];"
    assert "0 arrivals and 32 bytes are missing" in str(fails("deadlock", two + wait("w"), count=1))


def test_mbarriers_that_are_none():
    fails("no mbarrier is initialised at", "mbarrier.arrive.shared::cta.b64 _, [b+8];")
    fails("no mbarrier is initialised at", "@%p1 mbarrier.inval.shared::cta.b64 [b]; bar.sync 0;" + ARRIVE)
    fails("initialised twice", "@%p1 mbarrier.init.shared::cta.b64 [b], 3;")
    fails("initialised twice", "mbarrier.init.shared::cta.b64 [b+8], 3;")
    fails("misaligned", "mbarrier.arrive.shared::cta.b64 _, [b+4];")
    fails("beyond", "mbarrier.arrive.shared::cta.b64 _, [b+64];")
    fails("parity is 0 or 1", "mbarrier.test_wait.parity.shared::cta.b64 %p2, [b], 2;")
    read(
        "@%p1 mbarrier.inval.shared::cta.b64 [b]; @%p1 mbarrier.init.shared::cta.b64 [b], 128; bar.sync 0;"
        + ARRIVE
        + wait("w")
    )


def test_blocks_have_their_own():
    out = np.zeros((5, 128), np.uint32)
    place = "mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd2, %r5, 512; add.u64 %rd1, %rd1, %rd2;"
    run(
        SETUP.format(count=128) + place + WRITE + ARRIVE + OTHER_WARP + wait("w") + READ + STORE, out, block=128, grid=5
    )
    np.testing.assert_array_equal(out, np.tile(np.arange(128) ^ 32, (5, 1)))
