"""Bulk copies and boxes of tensors, in both directions."""

import numpy as np
import pytest
import torch

from .errors import PtxError
from .kernels import kernel, random_bits, run
from .launch import launch
from .memory import Memory
from .tensor_map import TensorMap

SETUP = """
    .shared .align 1024 .b8 s[4096]; .shared .align 8 .b8 b[8]; setp.eq.u32 %p1, %r0, 0; mul.wide.u32 %rd10, %r0, 16;
    mov.u32 %r1, s; shl.b32 %r2, %r0, 4; add.u32 %r2, %r1, %r2;
    @%p1 mbarrier.init.shared::cta.b64 [b], 1; fence.mbarrier_init.release.cluster; bar.sync 0;
"""
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], {0};\n"
LOAD = "@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], {0}, [b];\n"
WAIT = "$wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [b], 0; @!%p2 bra $wait;\n"
READ = "ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2];\n"
OUT = READ + "add.u64 %rd11, %rd1, %rd10; st.global.v4.b32 [%rd11], {%r4, %r5, %r6, %r7};\n"


def loaded(body, **options):
    a, out = random_bits(1, np.uint8, 1024), np.zeros(1024, np.uint8)
    run(SETUP + body, a, out, block=64, **options)
    return a, out


def fails(words, body, **options):
    with pytest.raises(PtxError, match=words) as caught:
        loaded(body, **options)
    return caught.value


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("order", [0, 1])
def test_a_bulk_copy_is_there_when_the_mbarrier_says_so(late, order):
    a, out = loaded(EXPECT.format(1024) + LOAD.format(1024) + WAIT + OUT, late=late, order=order)
    np.testing.assert_array_equal(out, a)


def test_reading_before_or_without_waiting_is_seen():
    fails("an asynchronous copy may be writing", EXPECT.format(1024) + LOAD.format(1024) + OUT + WAIT)
    fails("an asynchronous copy may be writing|a race", LOAD.format(1024) + EXPECT.format(1024) + "bar.sync 0;" + OUT)
    fails(
        "a race: reads shared memory that an asynchronous copy has written",
        EXPECT.format(1024) + LOAD.format(1024) + OUT,
        late=False,
    )
    # one thread waits, the others read without having been told
    fails(
        "asynchronous copy",
        EXPECT.format(1024) + LOAD.format(1024) + "@!%p1 bra $read;" + WAIT + "$read:" + OUT,
        late=False,
    )


def test_expecting_too_few_or_too_many_bytes():
    fails("deadlock.*16 bytes are missing", EXPECT.format(1040) + LOAD.format(1024) + WAIT + OUT)
    fails("asynchronous copy|deadlock", EXPECT.format(16) + LOAD.format(1024) + WAIT + OUT)


def test_sizes_bounds_and_alignment():
    fails("a bulk copy of 24 bytes", EXPECT.format(24) + LOAD.format(24))
    fails("not aligned to 16", "add.u64 %rd0, %rd0, 8;" + LOAD.format(16))
    fails("outside of every tensor", LOAD.format(1040))
    fails("reach beyond", "add.u32 %r1, %r1, 4096;" + LOAD.format(64))
    fails("ends without having waited for a bulk copy", EXPECT.format(64) + LOAD.format(64))
    fails("at an mbarrier or in a bulk group", "cp.async.bulk.shared::cluster.global [%r1], [%rd0], 16;")


def test_overwriting_what_others_still_read_is_seen():
    first = "st.shared.v4.b32 [%r2], {0, 0, 0, 0}; bar.sync 0;" + READ
    again = EXPECT.format(1024) + LOAD.format(1024) + WAIT + OUT
    loaded(first + "bar.sync 0;" + again)
    fails("a race: overwrites", first + again)


WRITTEN = (
    "add.u64 %rd11, %rd0, %rd10; ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd11]; "
    "st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7};\n"
)
FENCED = WRITTEN + "fence.proxy.async.shared::cta; bar.sync 0;\n"
STORE = "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 1024; @%p1 cp.async.bulk.commit_group;\n"
DONE = "@%p1 cp.async.bulk.wait_group{0} 0;\n"


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("read", ["", ".read"])
def test_bulk_stores(read, late):
    a, out = loaded(FENCED + STORE + DONE.format(read), late=late)
    np.testing.assert_array_equal(out, a)


def test_what_is_wrong_with_a_store():
    fails("without fence.proxy.async", WRITTEN + "bar.sync 0;" + STORE + DONE.format(""))
    fails("a race", WRITTEN + "fence.proxy.async.shared::cta;" + STORE + DONE.format(""))
    fails("ends without having waited for its bulk stores", FENCED + STORE)
    fails(
        "an asynchronous operation may be reading it",
        FENCED + STORE + "bar.sync 0; st.shared.b32 [%r2], 0;" + DONE.format(""),
    )
    fails("a race: overwrites", FENCED + STORE + DONE.format("") + "st.shared.b32 [%r2], 0;")
    fails("stores what nothing has written", "fence.proxy.async.shared::cta; bar.sync 0;" + STORE + DONE.format(""))
    loaded(FENCED + STORE + DONE.format("") + "bar.sync 0; st.shared.b32 [%r2], 0;")


# Boxes ---------------------------------------------------------------------------------------------------------------


def box_run(body, tensors, boxes, block=32, map_in_memory=False, **options):
    """Runs the body with the maps as parameters m0, m1, ..., whose addresses are in %rd40, ..."""
    memory = Memory()
    addresses = [memory.allow(each) for each in tensors]
    maps = [each.encode() for each in boxes]
    text = SETUP
    if map_in_memory:
        held = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in maps]
        parameters = [f".param .u64 m{number}" for number in range(len(maps))]
        text += "".join(f"ld.param.u64 %rd4{number}, [m{number}];\n" for number in range(len(maps)))
        maps = [memory.allow(each) for each in held]
    else:
        parameters = [f".param .align 64 .b8 m{number}[128]" for number in range(len(maps))]
        text += "".join(f"mov.b64 %rd4{number}, m{number};\n" for number in range(len(maps)))
    made = kernel(text + body, len(tensors), parameters=parameters)
    launch(made, [*addresses, *maps], 1, block, memory=memory, **options)


def tensor_load(rank, bytes_, coordinates, target="%r1"):
    names = "".join(f"mov.u32 %r{20 + axis}, {value};" for axis, value in enumerate(coordinates))
    listed = ", ".join(f"%r{20 + axis}" for axis in range(rank))
    return (
        names
        + EXPECT.format(bytes_)
        + (
            f"@%p1 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{target}], "
            f"[%rd40, {{{listed}}}], [b];\n"
        )
    )


DUMP = """
    mov.u32 %r9, 0; mov.u32 %r2, s; shl.b32 %r10, %r0, 4; add.u32 %r2, %r2, %r10; add.u64 %rd11, %rd1, %rd10;
    $dump: ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2]; st.global.v4.b32 [%rd11], {%r4, %r5, %r6, %r7};
    add.u32 %r2, %r2, 512; add.u64 %rd11, %rd11, 512; add.u32 %r9, %r9, 512; setp.lt.u32 %p3, %r9, {0}; @%p3 bra $dump;
"""


def dump(size):
    return DUMP.replace("{0}", str(size))


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("map_in_memory", [True, False])
def test_a_box_of_a_matrix_with_zeros_outside(map_in_memory, late):
    """16 rows of 32 halves, from row 5 and column -8 of a matrix of 10 rows and 40 columns with a pitch of 48."""
    whole = torch.randn(10, 48).to(torch.bfloat16)
    matrix, out = whole[:, :40], torch.zeros(16, 32, dtype=torch.bfloat16)
    made = TensorMap.of(matrix, (16, 32))
    box_run(
        tensor_load(2, 1024, (-8, 5)) + WAIT + dump(1024), [whole, out], [made], map_in_memory=map_in_memory, late=late
    )
    expected = torch.zeros(16, 32, dtype=torch.bfloat16)
    expected[:5, 8:] = matrix[5:, :24]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_ranks(rank):
    shape, box = (3, 4, 5, 6, 32)[-rank:], (2, 2, 2, 2, 16)[-rank:]
    start = (1, 1, 2, 3, 8)[-rank:]
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    size = 4 * int(np.prod(box))
    out = torch.zeros(-(-size // 512) * 128)
    text = tensor_load(rank, size, start[::-1]) + WAIT
    text += (
        "mov.u32 %r30, {0}; setp.lt.u32 %p4, %r0, %r30; @!%p4 bra $out;".replace("{0}", str(min(32, size // 16)))
        + dump(size)
        + "$out:"
    )
    box_run(text, [tensor, out], [TensorMap.of(tensor, box)])
    expected = tensor[tuple(slice(at, at + extent) for at, extent in zip(start, box))]
    np.testing.assert_array_equal(out[: size // 4].numpy(), expected.reshape(-1).numpy())


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzles_exchange_chunks_of_16_bytes(swizzle):
    """From the figures in "Swizzling Modes": chunk c of line l of 128 bytes goes to c xor (l mod 8, 4 or 2 lines)."""
    columns, rows = swizzle // 2, 2048 // swizzle
    matrix, out = (
        torch.arange(rows * columns, dtype=torch.int16).reshape(rows, columns),
        torch.zeros(1024, dtype=torch.int16),
    )
    box_run(
        tensor_load(2, 2048, (0, 0)) + WAIT + dump(2048),
        [matrix, out],
        [TensorMap.of(matrix, (rows, columns), swizzle)],
    )
    lines = matrix.reshape(16, 8, 8).numpy()
    expected = np.empty_like(lines)
    for line in range(16):
        for chunk in range(8):
            bits = {32: line % 8 >> 2 << 0, 64: line % 8 >> 1, 128: line % 8}[swizzle]
            bits = {32: line & 1, 64: line & 3, 128: line & 7}[swizzle] if bits is not None else 0
            expected[line, chunk ^ bits] = lines[line, chunk]
    np.testing.assert_array_equal(out.numpy().reshape(16, 8, 8), expected)


def test_nan_outside():
    matrix, out = torch.ones(4, 16), torch.zeros(8, 16)
    box_run(tensor_load(2, 512, (0, 2)) + WAIT + dump(512), [matrix, out], [TensorMap.of(matrix, (8, 16), fill="nan")])
    assert (out[:2] == 1).all() and out[2:].isnan().all()


@pytest.mark.parametrize("swizzle", [0, 64])
def test_a_box_is_stored_where_it_lies_in_the_tensor(swizzle):
    """Loaded and stored elsewhere by a map of the same swizzle; what lies outside is left alone."""
    source, target = torch.randn(8, 32).to(torch.float16), torch.zeros(10, 40, dtype=torch.float16)
    body = (
        tensor_load(2, 512, (0, 0))
        + WAIT
        + """
        mov.u32 %r20, 16; mov.u32 %r21, 6;
        @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd41, {%r20, %r21}], [%r1];
        @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0;
    """
    )
    box_run(body, [source, target], [TensorMap.of(source, (8, 32), swizzle), TensorMap.of(target, (8, 32), swizzle)])
    expected = torch.zeros(10, 40, dtype=torch.float16)
    expected[6:, 16:] = source[:4, :24]
    assert torch.equal(target, expected)


def test_what_is_wrong_with_a_box():
    matrix, out = torch.zeros(8, 32, dtype=torch.float16), torch.zeros(1024, dtype=torch.float16)
    good = [TensorMap.of(matrix, (8, 32))]

    def fails_box(words, body, maps=good):
        with pytest.raises(PtxError, match=words):
            box_run(body, [matrix, out], maps)

    fails_box("not aligned to 128 bytes", "add.u32 %r1, %r1, 64;" + tensor_load(2, 512, (0, 0)))
    fails_box("beyond", "add.u32 %r1, %r1, 3840;" + tensor_load(2, 512, (0, 0)))
    fails_box("a tensor map of 2 dimensions", tensor_load(3, 512, (0, 0, 0)))
    fails_box("no tensor map", "add.u64 %rd40, %rd0, 0;" + tensor_load(2, 512, (0, 0)))
    fails_box("deadlock", tensor_load(2, 528, (0, 0)) + WAIT)
    larger = TensorMap(matrix.data_ptr(), 2, (32, 9), (64,), (32, 8))
    fails_box("outside of every tensor", tensor_load(2, 512, (0, 4)), [larger])
