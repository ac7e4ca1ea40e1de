"""Barriers that are missing, and those that are enough, in shared memory."""

import numpy as np
import pytest

from .errors import PtxError
from .kernels import run
from .schedule import Order

ORDERS = [Order.ROUND_ROBIN, Order.REVERSED, 0, 1]
# Thread t writes its number at 4 t (%r1), reads at %r2 and stores what it read in tensor 0.
SETUP = """
    .shared .align 16 .b8 s[1024]; mov.u32 %r1, s; mov.u32 %r9, s; shl.b32 %r2, %r0, 2; add.u32 %r1, %r1, %r2;
    mul.wide.u32 %rd1, %r0, 4;
    add.u64 %rd1, %rd1, %rd0; mov.u32 %r2, %r1;
"""
WRITE, READ = "st.shared.u32 [%r1], %r0;\n", "ld.shared.u32 %r3, [%r2];\n"
OTHER_WARP, OTHER_LANE = "xor.b32 %r2, %r2, 128;\n", "xor.b32 %r2, %r2, 4;\n"
STORE = "st.global.u32 [%rd1], %r3;\n"


def read(body, threads=128, **options):
    out = np.zeros(threads, np.uint32)
    run(SETUP + body + STORE, out, block=threads, **options)
    return out


def fails(words, body, **options):
    with pytest.raises(PtxError, match=words) as caught:
        read(body, **options)
    return caught.value


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 0;",
        "bar.sync 3, 128;",
        "barrier.sync 0;",
        "barrier.cta.sync.aligned 1;",
        "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;",
    ],
)
def test_a_barrier_shows_what_other_warps_wrote(barrier, order):
    out = read(WRITE + barrier + OTHER_WARP + READ, order=order)
    np.testing.assert_array_equal(out, np.arange(128) ^ 32)


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_is_seen_in_every_order(order):
    caught = fails(
        "a race: (reads|overwrites)|depends on memory that nothing has written", WRITE + OTHER_WARP + READ, order=order
    )
    assert caught.thread is not None and caught.block == (0, 0, 0)


def test_a_race_names_the_writer():
    assert "that thread 32 has written" in str(fails("a race", WRITE + OTHER_WARP + READ))


@pytest.mark.parametrize("order", ORDERS)
def test_overwriting_before_all_have_read_is_seen(order):
    once = WRITE + "bar.sync 0;" + OTHER_WARP + READ
    again = "st.shared.u32 [%r1], 5;"
    read(once + "bar.sync 0;" + again, order=order)
    words = "a race: overwrites shared memory that warp . has read|a race: reads"
    fails(words, once + again, order=order)


def test_two_writers_want_a_barrier_unless_they_agree():
    one = "setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [%r9], 1;"
    other = "setp.eq.u32 %p2, %r0, 40; @%p2 st.shared.u32 [%r9], 2; mov.u32 %r3, 0;"
    fails("a race: overwrites shared memory that thread 0 has written", one + other)
    read(one + "bar.sync 0;" + other)
    fails("store different values to one place at once", "st.shared.u32 [%r9], %r0; mov.u32 %r3, 0;")
    read("st.shared.u32 [%r9], 7; mov.u32 %r3, 0;")


def test_lanes_want_a_warp_barrier():
    """Of other collectives none orders memory."""
    np.testing.assert_array_equal(read(WRITE + "bar.warp.sync -1;" + OTHER_LANE + READ), np.arange(128) ^ 1)
    shuffle = "shfl.sync.bfly.b32 %r8, %r0, 1, 0x1F, -1;"
    for between in ("", shuffle, "membar.cta;"):
        assert fails("a race: reads", WRITE + between + OTHER_LANE + READ).thread == 0
    again = "bar.warp.sync -1;" + OTHER_LANE + READ + "{0}st.shared.u32 [%r1], 5;"
    read(WRITE + again.format("bar.warp.sync -1;"))
    fails("a race: overwrites shared memory that warp 0 has read", WRITE + again.format(shuffle))


def test_a_warp_barrier_says_nothing_of_other_warps():
    fails("a race", WRITE + "bar.warp.sync -1;" + OTHER_WARP + READ)


def test_a_thread_may_read_what_it_wrote_itself():
    np.testing.assert_array_equal(read(WRITE + READ + "st.shared.u32 [%r1], 9;" + READ), np.full(128, 9))


def test_matrices_are_read_by_whole_warps():
    text = """
        mov.u32 %r2, s; and.b32 %r8, %r0, 96; shl.b32 %r8, %r8, 2; add.u32 %r2, %r2, %r8;
        and.b32 %r8, %r0, 7; shl.b32 %r8, %r8, 4; add.u32 %r2, %r2, %r8;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];
    """
    read(WRITE + "bar.warp.sync -1;" + text)
    fails("a race: reads", WRITE + text)


@pytest.mark.parametrize("order", ORDERS)
def test_named_barriers_are_between_those_who_come(order):
    """Warps 0 and 1 exchange by barrier 1, warps 2 and 3 by barrier 2; neither says anything of the other pair."""
    pairs = "shr.u32 %r5, %r0, 6; add.u32 %r5, %r5, 1; bar.sync %r5, 64;\n"
    np.testing.assert_array_equal(read(WRITE + pairs + OTHER_WARP + READ, order=order), np.arange(128) ^ 32)
    fails("a race|nothing has written", WRITE + pairs + "xor.b32 %r2, %r2, 256;" + READ, order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_producers_arrive_and_consumers_wait(order):
    """Warps 0 and 1 write and go on; 2 and 3 wait for them."""
    text = """
        setp.lt.u32 %p1, %r0, 64; mov.u32 %r3, 0; @!%p1 bra $consume;
        st.shared.u32 [%r1], %r0; bar.arrive 5, 128; bra $end;
        $consume: {0} xor.b32 %r2, %r2, 256; ld.shared.u32 %r3, [%r2];
        $end:
    """
    expected = np.where(np.arange(128) < 64, 0, np.arange(128) - 64)
    np.testing.assert_array_equal(read(text.format("bar.sync 5, 128;"), order=order), expected)
    fails("a race|nothing has written", text.format("bar.arrive 5, 128;"), order=order)


def test_blocks_do_not_share():
    """In every block: its own writes and barriers, run together with other blocks."""
    out = np.zeros((6, 128), np.uint32)
    place = "mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd2, %r5, 512; add.u64 %rd1, %rd1, %rd2; add.u32 %r6, %r5, %r0;"
    run(SETUP + place + "st.shared.u32 [%r1], %r6; bar.sync 0;" + OTHER_WARP + READ + STORE, out, block=128, grid=6)
    np.testing.assert_array_equal(out, (np.arange(128) ^ 32) + np.arange(6)[:, None])
