"""cp.async: what is copied, when it is there, and reading too early."""

import numpy as np
import pytest

from .errors import PtxError
from .kernels import random_bits, run

# Thread t copies 16 bytes at 16 t of tensor 0 to %r1 and stores the 16 bytes at %r2 to tensor 1.
SETUP = """
    .shared .align 16 .b8 s[4096]; mul.wide.u32 %rd10, %r0, 16; add.u64 %rd11, %rd10, %rd0; add.u64 %rd12, %rd10, %rd1;
    mov.u32 %r1, s; shl.b32 %r2, %r0, 4; add.u32 %r1, %r1, %r2; mov.u32 %r2, %r1;
"""
LOAD = "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2];\n"
STORE = LOAD + "st.global.v4.b32 [%rd12], {%r4, %r5, %r6, %r7};\n"
COPY = "cp.async.cg.shared.global [%r1], [%rd11], 16;\n"
COMMIT, WAIT = "cp.async.commit_group;\n", "cp.async.wait_group 0;\n"


def copied(body, count=32, **options):
    a, out = random_bits(1, np.uint8, 16 * count).reshape(count, 16), np.zeros((count, 16), np.uint8)
    run(SETUP + body + STORE, a, out, block=count, **options)
    return a, out


@pytest.mark.parametrize("late", [True, False])
def test_a_copy_is_there_after_the_wait(late):
    for wait in (COMMIT + WAIT, "cp.async.wait_all;\n"):
        a, out = copied(COPY + wait, late=late)
        np.testing.assert_array_equal(out, a)


def test_what_is_copied_is_what_the_source_is_at_the_end():
    """Late: whoever overwrites the source before the wait copies something else."""
    a = np.arange(32 * 4, dtype=np.uint32)
    out = np.zeros(32 * 4, np.uint32)
    run(SETUP + COPY + COMMIT + "st.global.b32 [%rd11], 77;" + WAIT + STORE, a, out)
    assert (out[::4] == 77).all()


@pytest.mark.parametrize("size", [0, 3, 4, 8, 16])
def test_bytes_beyond_the_source_size_are_zeros(size):
    a, out = copied(f"cp.async.ca.shared.global [%r1], [%rd11], 16, {size};" + COMMIT + WAIT)
    np.testing.assert_array_equal(out[:, :size], a[:, :size])
    assert (out[:, size:] == 0).all()


def test_nothing_is_read_beyond_the_source_size():
    """The last thread's source has but 4 bytes."""
    a, out = random_bits(1, np.uint8, 16 * 31 + 4), np.zeros(512, np.uint8)
    sizes = "setp.eq.u32 %p1, %r0, 31; selp.u32 %r3, 4, 16, %p1;\n"
    run(SETUP + sizes + "cp.async.cg.shared.global [%r1], [%rd11], 16, %r3;" + COMMIT + WAIT + STORE, a, out)
    np.testing.assert_array_equal(out[: len(a)], a)
    with pytest.raises(PtxError, match="outside of every tensor"):
        run(SETUP + COPY + COMMIT + WAIT, a, out)


@pytest.mark.parametrize("width", [4, 8, 16])
def test_widths(width):
    a, out = random_bits(1, np.uint8, 512), np.zeros(512, np.uint8)
    fill = "st.shared.v4.b32 [%r1], {0, 0, 0, 0};\n"
    run(SETUP + fill + f"cp.async.ca.shared.global.L2::128B [%r1], [%rd11], {width};" + COMMIT + WAIT + STORE, a, out)
    expected = a.reshape(32, 16).copy()
    expected[:, width:] = 0
    np.testing.assert_array_equal(out.reshape(32, 16), expected)


def test_wait_group_leaves_the_latest_groups_under_way():
    """Two stages: the first may be read while the second is under way, which may not."""
    second = "add.u32 %r1, %r1, 512;\n" + COPY + COMMIT
    copied(COPY + COMMIT + second + "cp.async.wait_group 1;")
    fails(
        "reads shared memory while an asynchronous copy may be writing it",
        COPY + COMMIT + second + "cp.async.wait_group 1; add.u32 %r2, %r2, 512;",
    )
    copied(COPY + COMMIT + second + WAIT + "add.u32 %r2, %r2, 512;")


def fails(words, body, **options):
    with pytest.raises(PtxError, match=words) as caught:
        copied(body, **options)
    return caught.value


def test_waiting_too_early_or_for_too_few_is_seen():
    words = "reads shared memory while an asynchronous copy may be writing it"
    assert fails(words, COPY + COMMIT).text.startswith("ld.shared")
    fails(words, WAIT + COPY + COMMIT)
    fails(words, COPY + WAIT + COMMIT)  # not committed when it waits
    fails(words, COPY + COMMIT + "cp.async.wait_group 1;")


def test_writing_into_a_copy_under_way_is_seen():
    fails(
        "writes shared memory while an asynchronous copy may be writing it",
        COPY + COMMIT + "st.shared.b32 [%r1], 0;" + WAIT,
    )
    fails("that another operation is at", COPY + COPY + COMMIT + WAIT)


def test_other_threads_copies_want_a_barrier():
    """Each thread reads what its neighbour has copied."""
    neighbour = "xor.b32 %r2, %r2, 512;\n"
    a, out = copied(COPY + COMMIT + WAIT + neighbour + "bar.sync 0;", count=64)
    np.testing.assert_array_equal(out, np.roll(a, 32, axis=0))
    fails("a race", COPY + COMMIT + WAIT + neighbour, count=64)
    fails("asynchronous copy may be writing", COPY + COMMIT + "bar.sync 0;" + neighbour, count=64)
    fails("a race", COPY + COMMIT + "bar.sync 0;" + WAIT + neighbour, count=64)


def test_a_stage_is_not_filled_again_before_all_have_read_it():
    """The ring's slot is read by the neighbour and filled again, with and without the barrier between the two."""
    first = COPY + COMMIT + WAIT + "bar.sync 0; xor.b32 %r2, %r2, 512;" + LOAD
    again = COPY + COMMIT + WAIT + "bar.sync 0;"
    copied(first + "bar.sync 0;" + again, count=64)
    assert fails("a race: overwrites shared memory that warp . has read", first + again, count=64).text.startswith(
        "cp.async"
    )


def test_copies_that_do_not_exist():
    for text in ("cp.async.cg.shared.global [%r1], [%rd11], 8;", "cp.async.ca.shared.global [%r1], [%rd11], 12;"):
        fails("cp.async of", text)
    fails("misaligned", "add.u32 %r1, %r1, 8;" + COPY)
    fails("misaligned", "add.u64 %rd11, %rd11, 8;" + COPY)


def test_mbarriers_hear_of_copies_that_are_done():
    """Without wait_group: the arrival comes when the copies have."""
    barrier = """
        .shared .align 8 .b8 b[8]; setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [b], 64; bar.sync 0;
    """
    arrive = "cp.async.mbarrier.arrive.noinc.shared.b64 [b];\n"
    wait = "$wait: mbarrier.try_wait.parity.shared.b64 %p2, [b], 0; @!%p2 bra $wait;\n"
    neighbour = "xor.b32 %r2, %r2, 512;\n"
    a, out = copied(barrier + COPY + arrive + neighbour + wait, count=64)
    np.testing.assert_array_equal(out, np.roll(a, 32, axis=0))
    fails("asynchronous copy may be writing", barrier + COPY + arrive + neighbour, count=64)
    fails("a race|asynchronous copy may be writing", barrier + arrive + COPY + neighbour + wait, count=64)
