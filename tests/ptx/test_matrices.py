"""Products of a warp and the moves of their operands; layouts are those of the figures in the PTX ISA."""

import numpy as np
import pytest

from .errors import PtxError
from .exact import bf16_bits
from .kernels import random_bits, run

STORE = "mul.wide.u32 %rd10, %r0, {0}; add.u64 %rd11, %rd10, %rd{1};\n"


def load_words(count, tensor, register, per_thread):
    """Words of a thread's own from [threads, per_thread]."""
    body = STORE.format(4 * per_thread, tensor)
    return body + "".join(
        f"ld.global.b32 %{register}{number}, [%rd11+{4 * index}];\n" for index, number in enumerate(count)
    )


# Rows and columns of the elements that lane l holds, written out from "Matrix Fragments for mma.m16n8k16" and its like:
# group = l / 4, of_group = l % 4; element i of A, B, C.
def place_a(shape, lane, i):
    group, of_group = divmod(lane, 4)
    if shape == "m16n8k16":
        row = group if i < 2 or 4 <= i < 6 else group + 8
        return row, of_group * 2 + (i & 1) + (8 if i >= 4 else 0)
    if shape == "m16n8k8":
        return group if i < 2 else group + 8, of_group * 2 + (i & 1)
    row = group if i in (0, 2) else group + 8  # tf32
    return row, of_group + (4 if i >= 2 else 0)


def place_b(shape, lane, i):
    group, of_group = divmod(lane, 4)
    if shape in ("m16n8k16", "m16n8k8"):
        return of_group * 2 + (i & 1) + (8 if i >= 2 else 0), group
    return of_group + 4 * i, group


def place_c(lane, i):
    group, of_group = divmod(lane, 4)
    return group if i < 2 else group + 8, of_group * 2 + (i & 1)


# Shape, type, k, registers of A, registers of B.
CASES = [
    ("m16n8k16", "f16", 16, 4, 2),
    ("m16n8k16", "bf16", 16, 4, 2),
    ("m16n8k8", "f16", 8, 2, 1),
    ("m16n8k8", "bf16", 8, 2, 1),
    ("m16n8k8", "tf32", 8, 4, 2),
    ("m16n8k4", "tf32", 4, 2, 1),
]


def fragments(matrix, place, shape, registers, kind):
    """[32, registers] words of the lanes."""
    per = 1 if kind == "tf32" else 2
    values = np.array(
        [
            [matrix[place(shape if kind != "tf32" else "", lane, i)] for i in range(registers * per)]
            for lane in range(32)
        ]
    )
    return encode(values, kind).view(np.uint32)


def encode(values, kind):
    if kind == "tf32":
        return np.ascontiguousarray(values, np.float32)
    return bf16_bits(values) if kind == "bf16" else values.astype(np.float16)


def small_numbers(seed, shape, kind):
    """Numbers of the format, whose products and sums are exact in float32."""
    return np.random.default_rng(seed).integers(-16, 17, shape) / 4.0


@pytest.mark.parametrize("shape, kind, depth, registers_a, registers_b", CASES)
def test_mma_is_the_product_of_the_fragments(shape, kind, depth, registers_a, registers_b):
    a, b, c = small_numbers(1, (16, depth), kind), small_numbers(2, (depth, 8), kind), small_numbers(3, (16, 8), kind)
    words_a, words_b = fragments(a, place_a, shape, registers_a, kind), fragments(b, place_b, shape, registers_b, kind)
    words_c = np.array([[c[place_c(lane, i)] for i in range(4)] for lane in range(32)], np.float32)
    out = np.zeros((32, 4), np.float32)
    ra, rb = range(10, 10 + registers_a), range(20, 20 + registers_b)
    names = lambda letter, numbers: "{" + ", ".join(f"%{letter}{number}" for number in numbers) + "}"  # noqa: E731
    d = names("f", range(4))
    body = load_words(ra, 0, "r", registers_a) + load_words(rb, 1, "r", registers_b) + load_words(range(4), 2, "f", 4)
    body += f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {d}, {names('r', ra)}, {names('r', rb)}, {d};"
    run(body + STORE.format(16, 3) + f"st.global.v4.f32 [%rd11], {d};", words_a, words_b, words_c, out)
    product = a @ b + c
    expected = np.array([[product[place_c(lane, i)] for i in range(4)] for lane in range(32)])
    np.testing.assert_array_equal(out, expected)


def test_mma_with_accumulators_of_float16():
    a, b, c = (small_numbers(seed, shape, "f16") for seed, shape in ((1, (16, 16)), (2, (16, 8)), (3, (16, 8))))
    words_a, words_b = fragments(a, place_a, "m16n8k16", 4, "f16"), fragments(b, place_b, "m16n8k16", 2, "f16")
    halves = np.array([[c[place_c(lane, i)] for i in range(4)] for lane in range(32)]).astype(np.float16)
    out = np.zeros((32, 4), np.float16)
    body = load_words(range(10, 14), 0, "r", 4) + load_words(range(20, 22), 1, "r", 2)
    body += (
        load_words(range(30, 32), 2, "r", 2)
        + """
        mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16
            {%r1, %r2}, {%r10, %r11, %r12, %r13}, {%r20, %r21}, {%r30, %r31};
    """
    )
    body += STORE.format(8, 3) + "st.global.v2.b32 [%rd11], {%r1, %r2};"
    run(body, words_a, words_b, halves.view(np.uint32), out)
    product = (a @ b + c).astype(np.float16)
    np.testing.assert_array_equal(out, [[product[place_c(lane, i)] for i in range(4)] for lane in range(32)])


def test_an_operand_that_is_not_rounded_to_tf32_is_refused():
    body = ("mov.b32 %r1, 0f3F800001; mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 "
            "{%f0, %f1, %f2, %f3}, {%r1, %r1}, {%r1}, {%f0, %f1, %f2, %f3};")  # fmt: skip
    with pytest.raises(PtxError, match="not rounded to tf32"):
        run(body)


SHARED = ".shared .align 16 .b8 s[1024]; mov.u32 %r1, s;\n"
COPY_IN = (
    SHARED
    + STORE.format(16, 0)
    + """
        shl.b32 %r2, %r0, 4; add.u32 %r2, %r2, %r1; ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd11];
        st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6}; bar.warp.sync -1;
    """
)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    """Rows lie 16 bytes apart in an order of their own: lane 8 i + j points to row j of matrix i."""
    elements = random_bits(1, np.uint16, 256).reshape(32, 8)
    order = np.random.default_rng(0).permutation(32)
    out = np.zeros((32, count, 2), np.uint16)
    names = ", ".join(f"%r{20 + number}" for number in range(count))
    body = COPY_IN + STORE.format(4, 1) + "ld.global.b32 %r7, [%rd11]; shl.b32 %r7, %r7, 4; add.u32 %r7, %r7, %r1;\n"
    body += f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16 {{{names}}}, [%r7];\n"
    body += STORE.format(4 * count, 2) + "".join(f"st.global.b32 [%rd11+{4 * n}], %r{20 + n};" for n in range(count))
    run(body, elements, order.astype(np.uint32), out)
    for lane in range(32):
        for matrix in range(count):
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                if transposed:
                    row, column = column, row
                assert out[lane, matrix, half] == elements[order[8 * matrix + row], column]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_is_the_inverse_of_ldmatrix(count, transposed):
    registers, out = random_bits(1, np.uint32, 32 * count).reshape(32, count), np.zeros((32, 8), np.uint16)
    names = ", ".join(f"%r{20 + number}" for number in range(count))
    suffix = f"x{count}{'.trans' if transposed else ''}"
    body = SHARED + load_words(range(20, 20 + count), 0, "r", count)
    body += "shl.b32 %r2, %r0, 4; add.u32 %r2, %r2, %r1; st.shared.v4.b32 [%r2], {0, 0, 0, 0}; bar.warp.sync -1;"
    body += f"stmatrix.sync.aligned.m8n8.{suffix}.shared.b16 [%r2], {{{names}}}; bar.warp.sync -1;"
    body += (
        "ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2];"
        + STORE.format(16, 1)
        + "st.global.v4.b32 [%rd11], {%r3, %r4, %r5, %r6};"
    )
    run(body, registers, out)
    halves = registers.view(np.uint16).reshape(32, count, 2)
    for matrix in range(4):
        block = out[8 * matrix : 8 * matrix + 8]
        for lane in range(32):
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                if transposed:
                    row, column = column, row
                assert block[row, column] == (halves[lane, matrix, half] if matrix < count else 0)


def test_movmatrix_transposes():
    words, out = random_bits(1, np.uint32, 32), np.zeros(32, np.uint32)
    body = load_words([1], 0, "r", 1) + "movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;"
    run(body + STORE.format(4, 1) + "st.global.b32 [%rd11], %r2;", words, out)
    matrix = words.view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(8, 8), matrix.T)


def test_poison_spoils_rows_and_columns_and_no_others():
    """Rows 8 to 15 of A were never written; the upper half of the result may be stored, the lower may not."""
    out = np.zeros((32, 4), np.float32)
    body = SHARED + """
        shl.b32 %r2, %r0, 4; add.u32 %r2, %r2, %r1; setp.lt.u32 %p1, %r0, 8;
        @%p1 st.shared.v4.b32 [%r2], {0, 0, 0, 0}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r20, %r21}, [%r2]; mov.b32 %r22, 0;
        mov.f32 %f0, 0f3F800000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
        mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32
            {%f0, %f1, %f2, %f3}, {%r20, %r21}, {%r22}, {%f0, %f1, %f2, %f3};
    """ + STORE.format(16, 0)  # fmt: skip
    run(body + "st.global.v2.f32 [%rd11], {%f0, %f1};", out)
    assert (out == [1, 1, 0, 0]).all()
    with pytest.raises(PtxError, match="stores a value that depends on memory that nothing has written"):
        run(body + "st.global.v2.f32 [%rd11+8], {%f2, %f3};", out)


def test_matrices_beyond_shared_memory_or_misaligned():
    for offset, words in ((1024, "beyond its 1024 bytes"), (8, "misaligned")):
        with pytest.raises(PtxError, match=words):
            run(SHARED + f"add.u32 %r1, %r1, {offset}; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r2}}, [%r1];")
