"""Branches, barriers that never come together, and the order of warps."""

import numpy as np
import pytest

from .errors import PtxError
from .kernels import kernel, run
from .launch import launch
from .memory import Memory
from .observe import Observer
from .schedule import Order


def fails(words, body, **options):
    with pytest.raises(PtxError, match=words) as caught:
        run(body, **options)
    return caught.value


def test_a_barrier_that_a_warp_leaves_out_is_a_deadlock_which_says_who_waits():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra $end; bar.sync 2, 96; $end: bar.sync 0;"
    caught = fails("deadlock", body, block=96)
    assert "warps [1, 2] of block [0, 0, 0] wait at line" in str(caught) and "bar.sync 2, 96" in str(caught)
    assert "barrier 2, where 64 threads arrived" in str(caught)
    assert "warps [0] of block [0, 0, 0]" in str(caught) and "barrier 0, where 32 threads arrived" in str(caught)


def test_barriers_in_parts_of_a_warp():
    fails("divergent: only some threads of a warp come to the barrier", "setp.lt.u32 %p1, %r0, 7; @%p1 bar.sync 0;")
    fails("divergent", "setp.lt.u32 %p1, %r0, 7; @%p1 bra $end; bar.sync 0; $end:", block=64)


def test_threads_that_disagree_about_a_barrier():
    fails("disagree", "setp.lt.u32 %p1, %r0, 32; selp.u32 %r1, 64, 96, %p1; bar.sync 1, %r1;", block=96)
    fails("more threads arrive", "bar.sync 1, 64;", block=96)
    fails("multiple of a warp", "bar.sync 1, 40;", block=96)
    fails("16 barriers", "mov.u32 %r1, 17; bar.sync %r1;")


def test_threads_that_have_ended_are_not_waited_for():
    out = np.zeros(1, np.uint32)
    run("setp.lt.u32 %p1, %r0, 64; @%p1 ret; bar.sync 0; st.global.u32 [%rd0], 1;", out, block=96)
    assert out[0] == 1


@pytest.mark.parametrize("threads", [1, 33, 50])
def test_blocks_that_do_not_fill_a_warp(threads):
    out = np.zeros(64, np.uint32)
    run("mul.wide.u32 %rd1, %r0, 4; add.u64 %rd1, %rd1, %rd0; bar.sync 0; st.global.u32 [%rd1], 1;", out, block=threads)
    assert out.sum() == threads and out[:threads].all()


def test_an_endless_loop_ends(monkeypatch):
    monkeypatch.setattr("tests.ptx.schedule._MOST_STEPS", 1000)
    assert fails("more than 1000 steps", "$loop: bra.uni $loop;").text == "bra.uni $loop"


class Trace(Observer):
    def __init__(self):
        self.warps, self.accesses = [], []

    def issued(self, instruction, warps):
        if instruction.opcode == "xor":
            self.warps.append(warps.tolist())

    def accessed(self, instruction, space, addresses, width, threads):
        self.accesses.append((instruction.opcode, space, len(addresses), width, threads.tolist()))


def trace(order, body="xor.b32 %r1, %r1, 1; bar.sync 0; xor.b32 %r1, %r1, 1;", **options):
    watch = Trace()
    run(body, block=128, order=order, observers=[watch], **options)
    return watch


def test_orders():
    assert trace(Order.ROUND_ROBIN).warps == [[0, 1, 2, 3]] * 2
    assert trace(Order.REVERSED).warps == [[3], [2], [1], [0]] * 2
    seen = {str(trace(seed).warps) for seed in range(8)}
    assert len(seen) > 3, "seeds make no difference"
    for seed in range(8):
        warps = [warp for step in trace(seed).warps for warp in step]
        assert sorted(warps[:4]) == sorted(warps[4:]) == [0, 1, 2, 3], "a warp passes the barrier before all have come"
    assert trace(3).warps == trace(3).warps


def test_observers_hear_of_instructions_and_accesses():
    memory = (
        ".shared .align 16 .b8 s[512]; mul.wide.u32 %rd1, %r0, 4; add.u64 %rd1, %rd1, %rd0; setp.lt.u32 %p1, %r0, 5;"
    )
    watch = Trace()
    out = np.zeros(128, np.uint32)
    run(memory + "@%p1 xor.b32 %r1, %r1, 1; @%p1 st.global.u32 [%rd1], 3; st.shared.v4.b32 [s], {1, 1, 1, 1};", out,
        block=128, grid=2, observers=[watch])  # fmt: skip
    assert watch.warps == [list(range(8))]
    lanes = [*range(5), *range(128, 133)]
    assert watch.accesses == [("st", "global", 10, 4, lanes), ("st", "shared", 256, 16, list(range(256)))]


def test_chosen_blocks_alone_run():
    out = np.zeros(6, np.uint32)
    body = """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mad.lo.u32 %r1, %r2, 3, %r1; mul.wide.u32 %rd1, %r1, 4;
        add.u64 %rd1, %rd1, %rd0; st.global.u32 [%rd1], 1;
    """
    run(body, out, grid=(3, 2), blocks=[(2, 0, 0), (0, 1, 0)])
    assert out.tolist() == [0, 0, 1, 1, 0, 0]


def test_more_blocks_than_run_together():
    out = np.zeros((300, 128), np.uint32)
    body = """
        .shared .align 4 .b8 s[4]; mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 128, %r0; mul.wide.u32 %rd1, %r2, 4;
        add.u64 %rd1, %rd1, %rd0; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [s], %r1; bar.sync 0;
        ld.shared.u32 %r3, [s];
        st.global.u32 [%rd1], %r3;
    """
    run(body, out, grid=300, block=128)
    np.testing.assert_array_equal(out, np.repeat(np.arange(300), 128).reshape(300, 128))


def test_a_launch_that_does_not_fit_the_kernel():
    made = kernel("ret;", 1)
    with pytest.raises(PtxError, match="0 arguments for 1 parameters"):
        launch(made, [], 1, 32, memory=Memory())
    made.reqntid = (64, 1, 1)
    with pytest.raises(PtxError, match="blocks of"):
        launch(made, [0], 1, 32, memory=Memory())
    with pytest.raises(PtxError, match="20 bytes for 24 of plan"):
        run("ret;", arguments=[(".param .align 8 .b8 plan[24]", bytes(20))])
