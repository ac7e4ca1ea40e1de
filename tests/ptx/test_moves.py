"""Moves between registers and special registers."""

import numpy as np
import pytest

from .kernels import evaluate, random_bits, run


def test_moves_keep_every_bit():
    for kind, dtype in (("b16", np.uint16), ("f32", np.uint32), ("b64", np.uint64), ("f64", np.uint64)):
        a = random_bits(1, dtype)
        np.testing.assert_array_equal(evaluate(f"mov.{kind} %d, %a;", dtype, a), a)


def test_constants():
    assert evaluate("mov.f32 %d, 0f40490FDB;", np.float32)[0] == np.float32(np.pi)
    assert evaluate("mov.f64 %d, 0d400921FB54442D18;", np.float64)[0] == np.pi
    assert evaluate("mov.b32 %d, -2;", np.int32)[0] == -2
    assert evaluate("mov.u32 %d, 0xFFFFFFFFU;", np.uint32)[0] == 2**32 - 1
    assert evaluate("mov.u64 %d, 9223372036854775808;", np.uint64)[0] == 2**63
    assert evaluate("mov.b32 %d, 017;", np.int32)[0] == 15


def test_the_first_element_is_the_least_significant():
    a = np.array([0x1122334455667788], np.uint64)
    assert evaluate("mov.b64 {%r5, %r6}, %a; mov.b32 %d, %r5;", np.uint32, a)[0] == 0x55667788
    assert evaluate("mov.b64 {%h1, %h2, %h3, %h4}, %a; mov.b16 %d, %h2;", np.uint16, a)[0] == 0x5566
    assert evaluate("mov.b64 {_, %r6}, %a; mov.b32 %d, %r6;", np.uint32, a)[0] == 0x11223344
    low, high = np.array([0x7788], np.uint16), np.array([0x5566], np.uint16)
    assert evaluate("mov.b32 %d, {%a, %b};", np.uint32, low, high)[0] == 0x55667788
    assert evaluate("mov.b64 %d, {%a, 1};", np.uint64, np.array([7], np.uint32))[0] == (1 << 32) + 7


def test_threads_and_blocks_know_where_they_are():
    """A grid of 2 x 3 x 2 blocks of 4 x 2 x 8 threads, each writing all that it knows at its own place."""
    names = [f"%{base}.{axis}" for base in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + [
        "%laneid",
        "%warpid",
    ]
    grid, block = (2, 3, 2), (4, 2, 8)
    out = np.zeros((12, 64, len(names)), np.uint32)
    body = (
        """
        mov.u32 %r1, %ctaid.z; mad.lo.u32 %r1, %r1, 3, 0; mov.u32 %r2, %ctaid.y; add.u32 %r1, %r1, %r2;
        mov.u32 %r2, %ctaid.x; mad.lo.u32 %r1, %r1, 2, %r2;
        mov.u32 %r3, %tid.z; mov.u32 %r4, %tid.y; mad.lo.u32 %r3, %r3, 2, %r4; mad.lo.u32 %r3, %r3, 4, %r0;
        mad.lo.u32 %r1, %r1, 64, %r3;
    """
        + f"mul.wide.u32 %rd1, %r1, {4 * len(names)}; add.u64 %rd1, %rd1, %rd0;\n"
    )
    for number, name in enumerate(names):
        body += f"mov.u32 %r5, {name}; st.global.u32 [%rd1+{4 * number}], %r5;\n"
    run(body, out, grid=grid, block=block)
    for index, (z, y, x) in enumerate(np.ndindex(2, 3, 2)):
        for thread, (k, j, i) in enumerate(np.ndindex(8, 2, 4)):
            expected = [i, j, k, *block, x, y, z, *grid, thread % 32, thread // 32]
            assert out[index, thread].tolist() == expected


@pytest.mark.parametrize(
    "name, expected", [("lt", lambda n: (1 << n) - 1), ("eq", lambda n: 1 << n), ("ge", lambda n: 2**32 - (1 << n))]
)
def test_masks_of_lanes(name, expected):
    out = np.zeros(32, np.uint32)
    run(
        f"mov.u32 %r1, %lanemask_{name}; mul.wide.u32 %rd1, %r0, 4; add.u64 %rd1, %rd1, %rd0;"
        "st.global.u32 [%rd1], %r1;",
        out,
    )
    assert out.tolist() == [expected(lane) for lane in range(32)]


def test_generic_addresses_lead_into_their_windows():
    out = np.zeros(3, np.uint32)
    body = """
        mov.u32 %r1, cell; cvt.u64.u32 %rd1, %r1; cvta.shared.u64 %rd2, %rd1;
        isspacep.shared %p1, %rd2; isspacep.global %p2, %rd2; isspacep.global %p3, %rd0;
        @!%p1 trap; @%p2 trap; @!%p3 trap;
        setp.ne.u32 %p4, %r0, 0; @%p4 ret;
        mov.u32 %r2, 7; st.u32 [%rd2+4], %r2; ld.shared.u32 %r3, [cell+4]; st.global.u32 [%rd0], %r3;
        cvta.to.shared.u64 %rd3, %rd2; cvt.u32.u64 %r4, %rd3; sub.u32 %r4, %r4, %r1; st.global.u32 [%rd0+4], %r4;
        mov.u64 %rd4, frame; cvta.local.u64 %rd5, %rd4; st.u32 [%rd5], %r2; ld.local.u32 %r5, [frame];
        st.u32 [%rd0+8], %r5;
    """
    run(".local .align 8 .b8 frame[16]; .shared .align 4 .b8 cell[8];" + body, out)
    assert out.tolist() == [7, 0, 7]
