"""Loads and stores in every state space, and what is wrong with an address."""

import re

import numpy as np
import pytest
import torch

from .errors import PtxError
from .kernels import kernel, random_bits, run
from .launch import launch
from .memory import Memory

PLACE = "mul.wide.u32 %rd10, %r0, {0}; add.u64 %rd11, %rd10, %rd0; add.u64 %rd12, %rd10, %rd1;\n"


@pytest.mark.parametrize(
    "kind, bytes_",
    [
        ("b8", 1),
        ("u16", 2),
        ("b32", 4),
        ("f32", 4),
        ("b64", 8),
        ("v2.b32", 8),
        ("v4.b32", 16),
        ("v2.b64", 16),
        ("v4.u16", 8),
        ("v2.b8", 2),
    ],
)
@pytest.mark.parametrize("space", ["global", "shared", "local"])
def test_what_is_stored_is_loaded(space, kind, bytes_):
    count = int(kind[1]) if kind[0] == "v" else 1
    element = bytes_ // count
    register = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}[element]
    names = ", ".join(f"{register}{20 + number}" for number in range(count))
    names = f"{{{names}}}" if count > 1 else names
    body = PLACE.format(bytes_) + f"ld.global.{kind} {names}, [%rd11];\n"
    if space == "shared":
        body += ".shared .align 16 .b8 memory[1024]; mov.u64 %rd13, memory; add.u64 %rd13, %rd13, %rd10;"
    elif space == "local":
        body += ".local .align 16 .b8 memory[48]; mov.u64 %rd13, memory; add.u64 %rd13, %rd13, 16;"
    if space != "global":
        body += f"st.{space}.{kind} [%rd13+0], {names}; ld.{space}.{kind} {names}, [%rd13];\n"
    body += f"st.global.{kind} [%rd12], {names};"
    a, out = random_bits(1, np.uint8, 32 * bytes_), np.zeros(32 * bytes_, np.uint8)
    run(body, a, out, grid=3)
    np.testing.assert_array_equal(out, a)


def test_narrow_loads_are_extended_by_their_type():
    a, out = np.array([0x80, 0xFF], np.uint8), np.zeros(3, np.int32)
    run("""
        ld.global.s8 %r1, [%rd0]; ld.global.u8 %r2, [%rd0]; ld.global.s16 %r3, [%rd0];
        st.global.v2.b32 [%rd1], {%r1, %r2}; st.global.b32 [%rd1+8], %r3;
    """, a, out)  # fmt: skip
    assert out.tolist() == [-128, 128, -128]


def test_parameters_of_every_kind():
    plan = np.arange(24, dtype=np.uint8).tobytes()
    out = np.zeros(8, np.uint32)
    arguments = [
        (".param .u32 count", -5), (".param .f32 scale", 0.75), (".param .u8 flag", 200),
        (".param .align 8 .b8 plan[24]", plan), (".param .u16 short", 65535), (".param .f64 wide", -2.5),
    ]  # fmt: skip
    run("""
        ld.param.u32 %r1, [count]; ld.param.f32 %r2, [scale]; ld.param.u8 %r3, [flag]; ld.param.u32 %r4, [plan+4];
        ld.param.v2.u32 {%r5, %r6}, [plan+16]; ld.param.s16 %r7, [short]; ld.param.b64 %rd1, [wide];
        mov.b64 {_, %r8}, %rd1; mov.b64 %rd2, plan; ld.param.u8 %r9, [%rd2+9]; add.u32 %r8, %r8, %r9;
        st.global.v4.b32 [%rd0], {%r1, %r2, %r3, %r4}; st.global.v4.b32 [%rd0+16], {%r5, %r6, %r7, %r8};
    """, out, arguments=arguments)  # fmt: skip
    words = np.frombuffer(plan, np.uint32)
    wide = np.array([-2.5]).view(np.uint32)[1]
    scale = np.array([0.75], np.float32).view(np.uint32)[0]
    assert out.tolist() == [2**32 - 5, scale, 200, words[1], words[4], words[5], 2**32 - 1, wide + 9]


def test_only_predicated_threads_access_memory():
    a, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    run(PLACE.format(4) + "setp.lt.u32 %p1, %r0, 5; @%p1 ld.global.u32 %r1, [%rd11]; @!%p1 st.global.u32 [%rd12], 9;"
        "@%p1 st.global.u32 [%rd12], %r1;", a[:5].copy(), out)  # fmt: skip
    assert out.tolist() == [0, 1, 2, 3, 4] + [9] * 27


def fails(words, body, *arrays, thread=None, **options):
    with pytest.raises(PtxError, match=words) as caught:
        run(body, *arrays, **options)
    if thread is not None:
        assert caught.value.thread == thread, str(caught.value)
    return caught.value


def test_an_access_beyond_a_tensor_names_instruction_block_thread_and_offset():
    a = np.zeros(40, np.uint32)
    body = (
        "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, 32, %r0; "
        "mul.wide.u32 %rd1, %r1, 4; add.u64 %rd1, %rd1, %rd0;\nld.global.u32 %r2, [%rd1];"
    )
    caught = fails(
        "24 of 64 threads access global memory outside of every tensor.*offset 160 of a storage of 160 bytes",
        body,
        a,
        grid=2,
        thread=8,
    )
    assert caught.block == (1, 0, 0) and caught.text == "ld.global.u32 %r2, [%rd1]"
    assert re.search(r"in small, line \d+: ld.global.u32 %r2, \[%rd1\]\n    block \(1, 0, 0\), thread 8$", str(caught))


def test_before_a_tensor_between_two_and_across_its_end():
    a, b = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    fails("outside of every tensor", "ld.global.u32 %r1, [%rd0+-4];", a, b)
    fails("outside of every tensor", "st.global.u32 [%rd0+4096], %r1;", np.zeros(8, np.uint32))
    fails("outside of every tensor", "ld.global.v2.u32 {%r1, %r2}, [%rd0+8];", np.zeros(3, np.uint32))


def test_misaligned_accesses():
    a = np.zeros(64, np.uint32)
    fails("8 bytes at 0x[0-9a-f]+ are misaligned", "ld.global.b64 %rd1, [%rd0+4];", a, thread=0)
    fails("misaligned", "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];", a)
    fails("misaligned", ".shared .align 16 .b8 s[64]; st.shared.b32 [s+2], %r1;")
    fails("misaligned", ".local .align 16 .b8 s[64]; st.local.b32 [s+2], %r1;")


def test_a_tensor_that_is_only_read_is_not_written():
    memory, tensor = Memory(), torch.zeros(32)
    address = memory.allow(tensor, writable=False)
    with pytest.raises(PtxError, match="only read"):
        launch(kernel("st.global.u32 [%rd0], %r0;", 1), [address], 1, 32, memory=memory)
    launch(kernel("ld.global.u32 %r1, [%rd0];", 1), [address], 1, 32, memory=memory)


def test_beyond_shared_local_and_parameters():
    fails("beyond its 64 bytes", ".shared .b8 s[64]; ld.shared.b8 %h1, [s+64];")
    fails(
        "beyond its 96 bytes",
        "st.shared.b32 [dynamic+32], %r1;",
        declarations=".extern .shared .align 16 .b8 dynamic[];.shared .b8 s[64];",
        shared=32,
    )
    fails("local memory of 8 bytes", ".local .align 8 .b8 s[8]; st.local.b32 [s+8], %r1;")
    fails("outside of the parameters", "ld.param.u32 %r1, [p0+800];", np.zeros(1))


def test_dynamic_shared_memory_follows_the_static_one():
    out = np.zeros(2, np.uint32)
    body = """
        mov.u32 %r1, dynamic; mov.u32 %r2, %dynamic_smem_size; st.global.v2.u32 [%rd0], {%r1, %r2};
        st.shared.b32 [dynamic+28], 0;
    """
    declarations = ".extern .shared .align 16 .b8 dynamic[];.shared .b8 s[50];"
    run(body, out, declarations=declarations, shared=32, block=32)
    assert out.tolist() == [64, 32]


def test_poison_is_refused_where_a_value_depends_on_it():
    shared = (
        ".shared .align 16 .b8 s[256]; mul.lo.u32 %r1, %r0, 4; "
        "mov.u32 %r2, s; add.u32 %r2, %r2, %r1; ld.shared.u32 %r3, [%r2];\n"
    )
    out = np.zeros(32, np.uint32)
    nothing = "depends on memory that nothing has written"
    fails(f"stores a value that {nothing}", shared + "add.u32 %r4, %r3, 1; st.global.u32 [%rd0], %r4;", out, thread=0)
    fails(f"a predicate {nothing}", shared + "setp.eq.u32 %p1, %r3, 0; @%p1 mov.u32 %r5, 1;", out)
    fails(f"a predicate {nothing}", shared + "setp.eq.u32 %p1, %r3, 0; @%p1 bra $end; $end: mov.u32 %r5, 1;", out)
    fails(
        f"an address {nothing}",
        shared + "cvt.u64.u32 %rd2, %r3; add.u64 %rd2, %rd2, %rd0; ld.global.u32 %r5, [%rd2];",
        out,
    )
    fails(
        f"stores a value that {nothing}",
        shared + "st.shared.u32 [%r2], %r3; ld.shared.u32 %r9, [%r2]; st.global.u32 [%rd0], %r9;",
        out,
    )
    fails(f"stores a value that {nothing}", ".local .b8 l[8]; ld.local.u32 %r3, [l+4]; st.global.u32 [%rd0], %r3;", out)
    moved = "mov.u32 %r4, %ctaid.x; mov.u32 %r5, 7; st.global.u32 [%rd0], %r4;"
    run(shared + moved, out)
    half = "st.shared.u16 [%r2], 5; ld.shared.u32 %r3, [%r2]; mov.b32 {%h1, %h2}, %r3; st.global.u16 [%rd0], %h"
    run(shared + half + "1;", out)
    fails(f"stores a value that {nothing}", shared + half + "2;", out)


def test_poison_that_is_selected_away_is_harmless():
    out = np.zeros(32, np.uint32)
    run("""
        .shared .align 16 .b8 s[128]; mul.wide.u32 %rd1, %r0, 4; add.u64 %rd1, %rd1, %rd0; cvt.u32.u64 %r5, %rd1;
        mul.lo.u32 %r1, %r0, 4; mov.u32 %r2, s; add.u32 %r2, %r2, %r1; setp.lt.u32 %p1, %r0, 7;
        @%p1 st.shared.u32 [%r2], %r0; ld.shared.u32 %r3, [%r2]; selp.u32 %r4, %r3, 99, %p1; st.global.u32 [%rd1], %r4;
        mov.u32 %r3, 1; st.global.u32 [%rd1+0], %r4;
    """, out)  # fmt: skip
    assert out.tolist() == [*range(7), *[99] * 25]


@pytest.mark.parametrize("order", [0, 1])
def test_atomics_count_every_thread(order):
    out, seen = np.zeros(2, np.uint32), np.zeros(96, np.uint32)
    run(PLACE.format(4).replace("%rd12", "%rd13") + """
        mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd5, %r1, 128; add.u64 %rd6, %rd1, %rd10; add.u64 %rd6, %rd6, %rd5;
        atom.global.add.u32 %r2, [%rd0], 1; st.global.u32 [%rd6], %r2; red.global.max.u32 [%rd0+4], %r0;
    """, out, seen, grid=3, order=order)  # fmt: skip
    assert out.tolist() == [96, 31] and sorted(seen) == list(range(96))


def test_atomic_sums_of_floats():
    out = np.zeros(1, np.float32)
    run("cvt.rn.f32.u32 %f1, %r0; red.global.add.f32 [%rd0], %f1;", out)
    assert out[0] == sum(range(32))
