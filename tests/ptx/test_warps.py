"""What the threads of a warp do together."""

import numpy as np
import pytest

from .errors import PtxError
from .kernels import evaluate, random_bits, run

LANES = np.arange(32)


def shuffled(mode, values, by, clamp):
    """From the pseudocode of the PTX ISA for shfl.sync, lane by lane."""
    results, predicates = [], []
    for warp in range(0, len(values), 32):
        for lane in range(32):
            b, c = by[warp + lane], clamp[warp + lane]
            segment, limit = c >> 8 & 31, c & 31
            last, first = (lane & segment) | (limit & ~segment), lane & segment
            if mode == "up":
                j = lane - (b & 31)
                inside = j >= last
            elif mode == "down":
                j = lane + (b & 31)
                inside = j <= last
            elif mode == "bfly":
                j = lane ^ (b & 31)
                inside = j <= last
            else:
                j = first | (b & 31 & ~segment)
                inside = j <= last
            results.append(values[warp + (j if inside else lane)])
            predicates.append(inside)
    return results, predicates


@pytest.mark.parametrize("clamp", [0x1F, 0x00, 0x181F, 0x1C1F, 0x1807])
@pytest.mark.parametrize("mode", ["bfly", "idx", "up", "down"])
def test_shfl(mode, clamp):
    values = random_bits(1, np.uint32, 128)
    by = np.random.default_rng(0).integers(0, 32, 128).astype(np.uint32)
    clamps = np.full(128, clamp, np.uint32)
    expected, inside = shuffled(mode, values.tolist(), by.tolist(), clamps.tolist())
    text = f"shfl.sync.{mode}.b32 %d, %a, %b, %c, -1;"
    np.testing.assert_array_equal(evaluate(text, np.uint32, values, by, clamps), expected)
    text = f"shfl.sync.{mode}.b32 %r9|%p1, %a, %b, %c, 0xFFFFFFFF; selp.b32 %d, 1, 0, %p1;"
    np.testing.assert_array_equal(evaluate(text, np.uint32, values, by, clamps), np.array(inside, int))


def test_vote():
    votes = np.random.default_rng(0).random(128) < 0.5
    votes[32:64], votes[64:96] = True, False
    by_warp = votes.reshape(-1, 32)
    ballot = np.repeat([sum(1 << int(lane) for lane in np.flatnonzero(each)) for each in by_warp], 32)
    np.testing.assert_array_equal(evaluate("vote.sync.ballot.b32 %d, %a, -1;", np.uint32, votes), ballot)
    for mode, function in (("any", np.any), ("all", np.all), ("uni", lambda v, axis: v.all(axis) | ~v.any(axis))):
        expected = np.repeat(function(by_warp, axis=1), 32)
        np.testing.assert_array_equal(evaluate(f"vote.sync.{mode}.pred %d, %a, -1;", bool, votes), expected)


@pytest.mark.parametrize("mode, kind, reduce", [
    ("add", "u32", np.add), ("min", "s32", np.minimum), ("max", "u32", np.maximum), ("and", "b32", np.bitwise_and),
    ("or", "b32", np.bitwise_or), ("xor", "b32", np.bitwise_xor),
])  # fmt: skip
def test_redux(mode, kind, reduce):
    dtype = np.int32 if kind[0] == "s" else np.uint32
    values = random_bits(1, dtype, 128)
    expected = np.repeat(reduce.reduce(values.reshape(-1, 32), axis=1, dtype=dtype), 32)
    np.testing.assert_array_equal(evaluate(f"redux.sync.{mode}.{kind} %d, %a, -1;", dtype, values), expected)


def test_elect_takes_the_lowest_lane_of_the_mask():
    text = "elect.sync %r1|%p1, {0}; selp.b32 %d, 100, 0, %p1; add.u32 %d, %d, %r1;"
    lanes = np.zeros(32, np.uint32)
    expected = np.where(LANES == 0, 100, 0)
    np.testing.assert_array_equal(evaluate(text.format("0xFFFFFFFF"), np.uint32, lanes), expected)
    half = "setp.ge.u32 %p2, %r0, 16; @!%p2 bra $done; elect.sync %r1|%p1, 0xFFFF0000; selp.b32 %d, 100, 0, %p1; $done:"
    expected = np.where(LANES == 16, 100, 0)
    np.testing.assert_array_equal(evaluate(half, np.uint32, lanes), expected)


def test_activemask_are_those_who_are_here():
    text = "setp.lt.u32 %p1, %r0, 5; @%p1 bra $few; activemask.b32 %d; bra $done; $few: activemask.b32 %d; $done:"
    got = evaluate(text, np.uint32, np.zeros(32, np.uint32))
    np.testing.assert_array_equal(got, np.where(LANES < 5, 31, 2**32 - 32))


def test_membermask_names_who_takes_part():
    """The lower half of a warp shuffles by itself, while the other one is elsewhere."""
    text = """
        mov.b32 %d, %a; setp.ge.u32 %p1, %r0, 16; @%p1 bra $done;
        shfl.sync.bfly.b32 %d, %a, 3, 0x1F, 0x0000FFFF;
        vote.sync.any.pred %p2, %p1, 0xFFFF; @%p2 trap;
        $done:
    """
    a = random_bits(1, np.uint32, 32)
    expected = np.where(LANES < 16, a[LANES ^ 3], a)
    np.testing.assert_array_equal(evaluate(text, np.uint32, a), expected)


def fails(words, body, **options):
    with pytest.raises(PtxError, match=words) as caught:
        run("setp.lt.u32 %p1, %r0, 7; " + body, **options)
    return caught.value


SHUFFLE = "shfl.sync.bfly.b32 %r1, %r0, 1, 0x1F, -1;"


def test_divergent_collectives_are_refused():
    fails("divergent: only some threads of a warp execute this", "@%p1 " + SHUFFLE)
    fails("divergent: a warp's other threads do not come", f"@%p1 bra $end; {SHUFFLE} $end:")
    fails("divergent", "@%p1 vote.sync.any.pred %p2, %p1, -1;")
    fails("divergent", "@%p1 bra $end; bar.warp.sync -1; $end:")
    fails("divergent", "@%p1 bra $end; redux.sync.add.u32 %r1, %r0, -1; $end:")
    fails("divergent", "@%p1 bra $end; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2]; $end:")
    fails("divergent", "@%p1 ret; mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
          "{%f0,%f1,%f2,%f3}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%f0,%f1,%f2,%f3};")  # fmt: skip


def test_masks_and_lanes_that_do_not_fit():
    fails(
        "a thread executes this instruction that its membermask does not name",
        "shfl.sync.bfly.b32 %r1, %r0, 1, 0x1F, 0xFF;",
    )
    fails("different membermasks", "shfl.sync.bfly.b32 %r1, %r0, 1, 0x1F, %r0;")
    fails("a lane that does not take part", "@!%p1 bra $end; shfl.sync.idx.b32 %r1, %r0, 20, 0x1F, 0x7F; $end:")


def test_threads_that_diverge_and_meet_again_may_shuffle():
    text = """
        setp.lt.u32 %p1, %r0, 7; @%p1 bra $few; add.u32 %a, %a, 1; bra $join; $few: add.u32 %a, %a, 2;
        $join: shfl.sync.bfly.b32 %d, %a, 31, 0x1F, -1;
    """
    np.testing.assert_array_equal(evaluate(text, np.uint32, np.zeros(32, np.uint32)), np.where(LANES > 24, 2, 1))


@pytest.mark.parametrize("order", [0, 1])
def test_loops_of_different_lengths(order):
    """Each thread counts to its own number; then the warp adds up."""
    text = """
        mov.u32 %d, 0; $loop: setp.ge.u32 %p1, %d, %a; @%p1 bra $out; add.u32 %d, %d, 1; bra $loop;
        $out: redux.sync.add.u32 %d, %d, -1;
    """
    counts = np.random.default_rng(0).integers(0, 20, 256).astype(np.uint32)
    expected = np.repeat(counts.reshape(-1, 32).sum(1), 32)
    np.testing.assert_array_equal(evaluate(text, np.uint32, counts, order=order), expected)
