"""Products of a warpgroup: operands by descriptor in every swizzle, and what is wrong while they are under way."""

import numpy as np
import pytest

from .errors import PtxError
from .exact import bf16_bits
from .kernels import run
from .schedule import Order

THREADS = 128
# Shared memory is filled from tensor 0, 16 bytes a thread at a time; then asynchronous operations may see it.
FILL = """
    .shared .align 1024 .b8 s[{bytes}];
    mul.wide.u32 %rd20, %r0, 16; add.u64 %rd21, %rd20, %rd0; mov.u32 %r1, s; shl.b32 %r2, %r0, 4; add.u32 %r2, %r2, %r1;
    mov.u32 %r3, 0;
    $fill: ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd21]; st.shared.v4.b32 [%r2], {{%r4, %r5, %r6, %r7}};
    add.u64 %rd21, %rd21, 2048; add.u32 %r2, %r2, 2048; add.u32 %r3, %r3, 2048; setp.lt.u32 %p1, %r3, {bytes};
    @%p1 bra $fill;
"""
READY = "fence.proxy.async.shared::cta; bar.sync 0;\n"
FENCE = "wgmma.fence.sync.aligned;\n"
DONE = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"


def descriptor(start, leading, stride, swizzle):
    """From the table "Matrix Descriptor Format" of the PTX ISA."""
    mode = {128: 1, 64: 2, 32: 3, 0: 0}[swizzle]
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62


def swizzled(rows: np.ndarray, span: int) -> np.ndarray:
    """Bytes [rows, span]: in a repeat of 1024, 512 or 256 bytes, 16-byte chunks are exchanged by the 128-byte line."""
    flat = rows.reshape(-1, 16)
    chunk = np.arange(len(flat))
    mask = {128: 7, 64: 3, 32: 1}[span]
    out = np.empty_like(flat)
    out[chunk ^ (chunk // 8 & mask)] = flat
    return out.reshape(-1)


def encode(values, kind):
    if kind == "tf32":
        return np.ascontiguousarray(values, np.float32)
    return bf16_bits(values) if kind == "bf16" else values.astype(np.float16)


def k_major(matrix, kind, swizzle):
    """[rows, k] as it lies in shared memory, and the descriptor of a slice of 32 bytes along k, from `start`."""
    data = encode(matrix, kind).view(np.uint8).reshape(len(matrix), -1)
    if swizzle:
        assert data.shape[1] == swizzle
        return swizzled(data, swizzle), lambda start: descriptor(start, 0, 8 * swizzle, swizzle)
    cores = data.reshape(len(matrix) // 8, 8, -1, 16).swapaxes(1, 2)  # of 8 rows and 16 bytes
    step = cores.shape[1] * 128
    return np.ascontiguousarray(cores).reshape(-1), lambda start: descriptor(start, 128, step, 0)


def mn_major(matrix, kind, swizzle):
    """[rows, k] with rows contiguous: blocks of as many rows as the swizzle spans, each [k, span]."""
    data = encode(matrix.T, kind)
    depth, count = data.shape
    if swizzle:
        per = swizzle // 2
        blocks = [
            swizzled(np.ascontiguousarray(data[:, at : at + per]).view(np.uint8), swizzle)
            for at in range(0, count, per)
        ]
        return np.concatenate(blocks), lambda start: descriptor(start, depth * swizzle, 8 * swizzle, swizzle)
    cores = data.reshape(depth // 8, 8, count // 8, 8).transpose(2, 0, 1, 3)  # [rows / 8, k / 8, 8, 8]
    step = depth // 8 * 128
    return np.ascontiguousarray(cores).view(np.uint8).reshape(-1), lambda start: descriptor(start, 128, step, 0)


def place_d(thread, register):
    """Row and column of an accumulator, from the figure of wgmma .m64nNk16's D."""
    warp, lane = divmod(thread, 32)
    return 16 * warp + lane // 4 + 8 * (register // 2 % 2), 8 * (register // 4) + lane % 4 * 2 + register % 2


def numbers(seed, *shape):
    return np.random.default_rng(seed).integers(-16, 17, shape) / 4.0


def accumulators(columns):
    return "{" + ", ".join(f"%f{number}" for number in range(columns // 2)) + "}"


def store(columns, tensor=1):
    body = f"mul.wide.u32 %rd20, %r0, {columns * 2}; add.u64 %rd20, %rd20, %rd{tensor};\n"
    return body + "".join(f"st.global.f32 [%rd20+{4 * n}], %f{n};\n" for n in range(columns // 2))


def product(matrix_a, matrix_b, kind, layout_a, layout_b, swizzle, add=0.0, **options):
    """A [64, k] times B [columns, k] transposed, by as many wgmma as it takes, on an accumulator that is `add`."""
    data_a, describe_a = layout_a(matrix_a, kind, swizzle)
    data_b, describe_b = layout_b(matrix_b, kind, swizzle)
    at_b = -(-len(data_a) // 1024) * 1024
    size = -(-(at_b + len(data_b)) // 2048) * 2048
    memory = np.zeros(size, np.uint8)
    memory[: len(data_a)], memory[at_b : at_b + len(data_b)] = data_a, data_b
    columns, step = len(matrix_b), 8 if kind == "tf32" else 16
    flags = "1, 1" + (f", {int(layout_a is mn_major)}, {int(layout_b is mn_major)}" if kind != "tf32" else "")
    text = FILL.format(bytes=size) + READY + "setp.eq.u32 %p2, 1, 1;\n"
    text += "".join(f"mov.f32 %f{n}, 0f{np.float32(add).view(np.uint32):08X};\n" for n in range(columns // 2)) + FENCE
    for index in range(matrix_a.shape[1] // step):
        names = []
        for number, (layout, describe, start) in enumerate(((layout_a, describe_a, 0), (layout_b, describe_b, at_b))):
            if layout is mn_major:
                start += index * 16 * swizzle if swizzle else index * 2 * 128
            else:
                start += index * 32 if swizzle else index * 2 * 128
            text += f"mov.b64 %rd{30 + number}, {describe(start)};\n"
            names.append(f"%rd{30 + number}")
        text += (f"wgmma.mma_async.sync.aligned.m64n{columns}k{step}.f32.{kind}.{kind} {accumulators(columns)}, "
                 f"{', '.join(names)}, %p2, {flags};\n")  # fmt: skip
    out = np.zeros((THREADS, columns // 2), np.float32)
    run(text + DONE + store(columns), memory, out, block=THREADS, **options)
    result = np.zeros((64, columns))
    for thread in range(THREADS):
        for register in range(columns // 2):
            result[place_d(thread, register)] = out[thread, register]
    return result


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("swizzle", [128, 64, 32, 0])
@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_operands_along_k(kind, swizzle, late):
    depth = (swizzle or 64) // (4 if kind == "tf32" else 2)
    a, b = numbers(1, 64, depth), numbers(2, 24, depth)
    np.testing.assert_array_equal(product(a, b, kind, k_major, k_major, swizzle, add=3, late=late), a @ b.T + 3)


@pytest.mark.parametrize("swizzle", [128, 64, 32, 0])
@pytest.mark.parametrize("layouts", [(mn_major, mn_major), (k_major, mn_major), (mn_major, k_major)])
def test_operands_across_k(layouts, swizzle):
    depth = (swizzle or 64) // 2
    a, b = numbers(1, 64, depth), numbers(2, 128, depth)
    np.testing.assert_array_equal(product(a, b, "bf16", *layouts, swizzle), a @ b.T)


@pytest.mark.parametrize("columns", [8, 96, 256])
def test_all_widths(columns):
    a, b = numbers(1, 64, 64), numbers(2, columns, 64)
    np.testing.assert_array_equal(product(a, b, "f16", k_major, k_major, 128), a @ b.T)


@pytest.mark.parametrize("order", [Order.REVERSED, 0, 1, 2])
def test_warps_come_in_any_order(order):
    a, b = numbers(1, 64, 64), numbers(2, 24, 64)
    np.testing.assert_array_equal(product(a, b, "f16", k_major, k_major, 128, order=order), a @ b.T)


def b_alone(columns=8, depth=16, **changes):
    """Text that leaves B [columns, 16] of ones without swizzle in shared memory, described by %rd31."""
    data, describe = k_major(np.ones((columns, depth)), "f16", 0)
    memory = np.zeros(2048, np.uint8)
    memory[: len(data)] = data
    return memory, FILL.format(bytes=2048) + changes.get(
        "ready", READY
    ) + f"mov.b64 %rd31, {describe(0)}; setp.eq.u32 %p2, 1, 1;\n"


REGISTERS_A = "mov.b32 %r10, 0x3C003C00; mov.b32 %r11, %r10; mov.b32 %r12, %r10; mov.b32 %r13, %r10;\n"
ONE = """
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {%f0, %f1, %f2, %f3}, {%r10, %r11, %r12, %r13}, %rd31, %p2, 1, 1, 0;
"""


def test_a_in_registers_and_scale_d():
    memory, text = b_alone()
    out = np.zeros((THREADS, 4), np.float32)
    twice = REGISTERS_A + FENCE + ONE + ONE + DONE
    run(text + twice + store(8), memory, out, block=THREADS)
    assert (out == 32).all()
    run(
        text + "mov.f32 %f0, 0f7FC00000; setp.eq.u32 %p2, 1, 0;" + REGISTERS_A + FENCE + ONE + DONE + store(8),
        memory,
        out,
        block=THREADS,
    )
    assert (out == 16).all()


def fails(words, body, ready=READY, **options):
    memory, text = b_alone(ready=ready)
    with pytest.raises(PtxError, match=words) as caught:
        run(
            text + REGISTERS_A + body + "wgmma.wait_group.sync.aligned 0;",
            memory,
            np.zeros((THREADS, 4), np.float32),
            block=THREADS,
            **options,
        )
    return caught.value


def test_accumulators_are_not_touched_before_the_wait():
    touched = "%f0 is touched before the wgmma that uses it is waited for"
    commit, wait = DONE.split(" ", 1)
    issue = FENCE + ONE + commit
    fails(touched, issue + "st.global.f32 [%rd1], %f0;")
    fails(touched, issue + "mov.f32 %f0, 0f00000000;")
    fails(touched, issue + "wgmma.wait_group.sync.aligned 1; add.f32 %f9, %f0, %f0;")
    fails(touched, FENCE + ONE + "wgmma.wait_group.sync.aligned 0; mov.f32 %f9, %f0;")  # not committed
    fails("%r12 is touched", issue + "mov.b32 %r12, 0;")
    memory, text = b_alone()
    run(text + REGISTERS_A + issue + wait + "mov.f32 %f9, %f0;", memory, np.zeros(4, np.float32), block=THREADS)


def test_shared_operands_are_not_written_before_the_wait():
    caught = fails("writes shared memory while an asynchronous operation may be reading it",
                   FENCE + ONE + "wgmma.commit_group.sync.aligned; st.shared.b32 [s], 0;")  # fmt: skip
    assert caught.text.startswith("st.shared")


def test_registers_written_without_a_fence():
    fails("wgmma.fence", FENCE + "add.f32 %f0, %f1, %f1;" + ONE + DONE)
    fails("wgmma.fence", FENCE + "and.b32 %r10, %r10, 0;" + ONE + DONE)
    fails("wgmma.fence", ONE + DONE)


def test_writes_of_threads_want_a_proxy_fence():
    words = "reads what threads have written without fence.proxy.async"
    fails(words, FENCE + ONE + DONE, ready="bar.sync 0;")
    of_another_warp = f"mov.b64 %rd31, {descriptor(512, 128, 256, 0)};"
    fails("a race", of_another_warp + FENCE + ONE + DONE, ready="fence.proxy.async.shared::cta;")
    memory, text = b_alone(ready="bar.sync 0; fence.proxy.async.shared::cta;")
    run(text + REGISTERS_A + FENCE + ONE + DONE, memory, np.zeros(4, np.float32), block=THREADS)


def test_wrong_descriptors():
    for text, words in (
        (f"mov.b64 %rd31, {descriptor(2048, 128, 256, 0)};", "beyond 2048 bytes"),
        (f"mov.b64 %rd31, {descriptor(0, 128, 256, 0) | 1 << 49};", "base offset"),
        ("cvt.u64.u32 %rd31, %r0;", "different descriptors"),
    ):
        fails(words, text + FENCE + ONE + DONE)


def test_divergence_and_part_of_a_warpgroup():
    fails("divergent", "setp.lt.u32 %p3, %r0, 32; @%p3 bra $end;" + FENCE + ONE + DONE + "$end:")
    fails("divergent", "setp.lt.u32 %p3, %r0, 7; @%p3 bra $end;" + FENCE + ONE + DONE + "$end:")


def test_a_swizzle_that_is_off_by_one_gives_another_result():
    """The descriptor says 64 where the operand lies in 128; the interpreter is to see no excuse for that."""
    a, b = numbers(1, 64, 64), numbers(2, 24, 64)
    data, _ = k_major(b, "bf16", 128)
    wrong = lambda matrix, kind, swizzle: (data, lambda start: descriptor(start, 0, 1024, 64))  # noqa: E731
    assert (product(a, b, "bf16", k_major, wrong, 128) != a @ b.T).any()
