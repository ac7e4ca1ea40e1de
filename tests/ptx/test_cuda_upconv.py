"""The CUDA kernels of the up-convolutions as nvcc compiles them, launched by their own host, against PyTorch."""

import contextlib
import ctypes
import re
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import tokenfusion
from tests.gradients import check_frozen, in_float64, with_gradients
from tests.parity import assert_parity, assert_runs
from tests.ptx.gpu import Gpu, Launch
from tests.ptx.schedule import Order
from tests.ptx.sources import MARKS, check_same_code, program
from tests.sass import ELEMENTS
from tests.upconv.cases import FORMATS, MIXED, OPS, UNIFORM, check, check_out_and_its_slice, make_inputs
from tokenfusion.kernels import extension, upconv_add, upconv_concat
from tokenfusion.kernels.upconv.shapes import gives_channels_last
from tokenfusion.layers.deferred import defer

pytestmark = MARKS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL = re.compile(r"\d(forward|backward)_(pixels|planes|tiles)_kernelI(f|6__half|13__nv_bfloat16)((?:Li\d+E)*)E")
FAR = 2**31 + 64


class Map(ctypes.Structure):
    """UpconvMap of csrc/cuda/upconv.h."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("image", "row", "step"))]


class Copy(ctypes.Structure):
    """UpconvCopy."""

    _fields_ = [
        ("from_", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("from_strides", ctypes.c_int64 * 3),
        ("to_strides", ctypes.c_int64 * 3),
        ("runs", ctypes.c_int32 * 3),
        ("run", ctypes.c_int32),
        ("has_vectors", ctypes.c_int32),
        ("units", ctypes.c_uint32),
    ]


class Pass(ctypes.Structure):
    """UpconvPass."""

    _fields_ = [
        ("product", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("product_step", "product_offset", "product_image")),
        ("map", Map),
        *((name, ctypes.c_int32) for name in ("images", "channels", "height", "width", "log_scale")),
        ("lines", ctypes.c_uint32),
        ("depth", ctypes.c_int32),
        ("parts", ctypes.c_int32),
        ("tile", ctypes.c_uint32),
        ("tile_bytes", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("added", Map),
        ("bias", ctypes.c_void_p),
        ("copy", Copy),
        ("sums", ctypes.c_void_p),
    ]


@contextlib.contextmanager
def gpu(**device) -> Iterator[Gpu]:
    """Where the public functions run the CUDA backend, on tensors of the CPU that are made meanwhile."""
    there_is = mock.patch.object(extension, "why_not_cuda_tensor", lambda tensor: None)
    with Gpu("upconv", **device) as device, there_is, tokenfusion.backend("cuda"):
        yield device


def described(mangled: str) -> tuple:
    """Direction, way through the map, dtype, and its numbers: those taken of the map and of the product together."""
    direction, way, element, numbers = KERNEL.search(mangled).groups()
    return direction, way, getattr(torch, ELEMENTS[element]), *map(int, re.findall(r"\d+", numbers))


def named(*description) -> str:
    return next(name for name in program("upconv").names if described(name) == description)


def ways(device: Gpu) -> list[tuple]:
    return [described(each.kernel) for each in device.launches]


def pass_of(found: Launch) -> Pass:
    return Pass.from_buffer_copy(found.arguments[0])


def vector_of(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", UNIFORM + MIXED, ids="-".join)
@pytest.mark.parametrize("op", OPS)
def test_formats(op, formats, dtype):
    with gpu():
        check(op, make_inputs(op, size=(3, 5), formats=formats, dtype=dtype))


# Channels of x, weight and skip, and the size of x, for each way through the map.
PIXEL_VECTORS = {"channels": (3, 16, 8), "size": (3, 2), "formats": UNIFORM[1]}
PIXEL_NUMBERS = {"channels": (3, 5, 3), "size": (2, 3), "formats": UNIFORM[1]}
PLANE_VECTORS = {"channels": (3, 2, 3), "formats": UNIFORM[0]}
PLANE_NUMBERS = {"channels": (3, 2, 1), "size": (28, 29), "formats": UNIFORM[0]}
TILES = {"channels": (3, 10, 4), "size": (3, 5), "formats": UNIFORM[0]}
TILES_AND_A_REST = TILES | {"channels": (3, 9, 5)}  # of an image, beyond the last vector


def kinds_of(dtype: torch.dtype) -> list[tuple]:
    """Of the kernels of a direction."""
    n = vector_of(dtype)
    together = sorted({max(n // scale, 1) for scale in (2, 4, 8)})
    planes = [("planes", dtype, n, each) for each in together]
    return [("pixels", dtype, n), ("pixels", dtype, 1), *planes, ("planes", dtype, 1, 1), ("tiles", dtype)]


def test_these_are_all_kernels():
    expected = {
        (direction, *kind) for direction in ("forward", "backward") for dtype in DTYPES for kind in kinds_of(dtype)
    }
    found = [described(name) for name in program("upconv").names]
    assert len(found) == len(expected) and set(found) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "way, numbers, case",
    [
        ("pixels", "vector", PIXEL_VECTORS),
        ("pixels", 1, PIXEL_NUMBERS),
        ("planes", 1, PLANE_NUMBERS),
        ("tiles", None, TILES),
    ],
    ids=["pixels in vectors", "pixels", "planes", "tiles"],
)
@pytest.mark.parametrize("op", OPS)
def test_ways(op, way, numbers, case, dtype):
    if op == "project":
        case = case | {"projected": case["channels"][1]}
    with gpu() as device:
        check(op, make_inputs(op, dtype=dtype, **case))
    taken = {"vector": (vector_of(dtype),), 1: (1,), None: ()}[numbers]
    assert [(each[1], each[3:4]) for each in ways(device)] == [(way, taken)] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_that_end_within_a_vector(dtype):
    with gpu() as device:
        check("concat", make_inputs(dtype=dtype, **TILES_AND_A_REST))
    assert [each[1] for each in ways(device)] == ["tiles"] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("op", ["concat", "add"])
def test_planes_in_vectors(op, scale, dtype):
    size = {2: (8, 16), 4: (4, 8), 8: (2, 4), 16: (1, 2), 32: (1, 1)}[scale]
    with gpu() as device:
        check(op, make_inputs(op, size=size, scale=scale, dtype=dtype, **PLANE_VECTORS))
    n = vector_of(dtype)
    assert [each[1:] for each in ways(device)] == [("planes", dtype, n, max(n // scale, 1))] * 2


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("scale", [2, 4, 8, 16, 32])
def test_every_scale(scale, formats):
    with gpu():
        for channels in ((3, 2, 1), (3, 8, 8)):
            check("concat", make_inputs("concat", 1, channels, (1, 3), scale, formats=formats, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        {"channels": (8, 24, 16), "size": (14, 14), "formats": UNIFORM[1]},
        {"channels": (8, 3, 5), "size": (40, 32), "formats": UNIFORM[0]},
        {"channels": (3, 3, 2), "size": (29, 29), "formats": UNIFORM[0]},
        {"channels": (8, 50, 2), "size": (7, 7), "formats": UNIFORM[0]},
    ],
    ids=["pixels", "planes in vectors", "planes", "tiles"],
)
def test_several_lines_a_thread_parts_of_a_plane_and_tiles(case, dtype):
    with gpu() as device:
        check("concat", make_inputs("concat", 3, dtype=dtype, **case))
    for each, found in zip(ways(device), map(pass_of, device.launches), strict=True):
        if each[1] == "tiles":
            assert found.channels > found.tile and found.channels % found.tile
        else:
            assert found.depth > 2
            assert found.parts > 1 if each[1] == "planes" else found.lines > found.depth


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("op", ["concat", "project"])
def test_bias_and_skip(op, formats, skip_first, skip, bias):
    with gpu():
        check(op, make_inputs(op, channels=(5, 3, skip), bias=bias, formats=formats), skip_first=skip_first)


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
def test_what_is_copied_moves_in_vectors_where_its_memory_allows(formats):
    """An image's channels are one run; beside others, the runs are those of its pixels or of its planes."""
    with gpu() as device:
        for skipped, size in ((8, (4, 4)), (8, (7, 7)), (3, (7, 7))):
            check("concat", make_inputs("concat", 2, (3, 8, skipped), size, formats=formats, dtype=torch.bfloat16))
    copies = [pass_of(each).copy for each in device.launches if described(each.kernel)[0] == "forward"]
    is_last = formats[0] == "nhwc"
    assert [each.has_vectors for each in copies] == [1, 1, 0]
    assert [each.run for each in copies] == ([1, 1, 3] if is_last else [8 * 64 // 8, 8 * 196 // 8, 3 * 196])


def views_of(skip: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same skip in other memory."""
    batch, channels, height, width = skip.shape
    wide = torch.full((batch + 1, channels + 2, height + 2, width + 3), torch.nan, dtype=skip.dtype)
    other = torch.channels_last if skip.is_contiguous() else torch.contiguous_format
    return {
        "a crop": wide[1:, 1:-1, 1:-1, 1:-2].copy_(skip),
        "a crop of pixels": wide.to(memory_format=torch.channels_last)[1:, 1:-1, 1:-1, 1:-2].copy_(skip),
        "the other format": skip.contiguous(memory_format=other),
        "columns first": skip.mT.contiguous().mT,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("op", [upconv_concat, upconv_add])
def test_skips_anywhere_in_memory(op, formats, dtype):
    with gpu():
        inputs = make_inputs("add", channels=(3, 8, 8), size=(4, 4), formats=formats, dtype=dtype)
        x, weight, bias, skip = (t.detach() for t in inputs[:4])
        want = op(x, weight, bias, skip)
        for name, view in views_of(skip).items():
            torch.testing.assert_close(op(x, weight, bias, view), want, rtol=2**-7, atol=2**-7, msg=name)


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
def test_inputs_and_gradients_anywhere_in_memory(formats):
    with gpu():
        x, weight, bias, skip, grad = make_inputs(channels=(3, 8, 8), size=(4, 4), formats=formats)
        want = with_gradients(upconv_concat, (x, weight, bias, skip, grad))
        columns = weight.detach().mT.contiguous().mT.requires_grad_()
        every_second = torch.stack((bias.detach(), bias.detach()), 1)[:, 0].requires_grad_()
        for name, grad_view in views_of(grad).items():
            view = views_of(x.detach())[name].requires_grad_()
            got = with_gradients(upconv_concat, (view, columns, every_second, skip, grad_view))
            for result, expected in zip(got, want, strict=True):
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, msg=name)
        ones = torch.ones(()).expand(grad.shape)
        got, want = (with_gradients(upconv_concat, (x, weight, bias, skip, g)) for g in (ones, ones.contiguous()))
        for result, expected in zip(got, want, strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
def test_out_and_its_slice(formats):
    with gpu() as device:
        inputs = make_inputs(channels=(5, 8, 8), formats=formats)
        check_out_and_its_slice(inputs, "cuda")
        x, weight, bias, skip, _ = (tensor.detach() for tensor in inputs)
        expected = upconv_concat(x, weight, bias, skip)
        for memory_format in FORMATS.values():
            wide = torch.full((2, 20, 9, 14), torch.nan).contiguous(memory_format=memory_format)
            part = wide[:, 2:18, 1:7, 3:13]
            upconv_concat(x, weight, bias, skip, out=part)
            torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
            assert wide.isnan().sum() == wide.numel() - part.numel()
    assert [pass_of(each).copy.units > 0 for each in device.launches[:3]] == [True, True, False]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
def test_frozen_inputs(op, formats):
    with gpu():
        inputs = make_inputs(op, channels=(5, 8, 8), size=(4, 4), formats=formats, dtype=torch.bfloat16)
        check_frozen(OPS[op][0], inputs, *({i} for i in range(len(inputs) - 1)), {0, 1}, {0, 1, 2}, {1, 2})


def test_gradients_of_a_deferred_up_convolution():
    inputs = make_inputs(channels=(3, 16, 8), size=(3, 2), formats=UNIFORM[1])
    of_plain = torch.autograd.grad(F.conv_transpose2d(*inputs[:3], stride=2).square().sum(), inputs[:3])
    with gpu(), assert_runs("upconv_concat_backward_cuda"):
        x, weight, bias, *_ = make_inputs(channels=(3, 16, 8), size=(3, 2), formats=UNIFORM[1])
        found = torch.autograd.grad(defer(x, weight, bias).square().sum(), (x, weight, bias))
    for each, expected in zip(found, of_plain, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_no_images(op):
    with gpu() as device:
        out, *grads = with_gradients(OPS[op][0], make_inputs(op, batch=0))
        assert out.shape[0] == 0 and all((g == 0).all() for g in grads)
    assert not device.launches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [PIXEL_VECTORS, PIXEL_NUMBERS, TILES], ids=["vectors", "numbers", "tiles"])
@pytest.mark.parametrize("op", ["concat", "add"])
def test_nan_and_inf_propagate_as_in_the_reference(op, case, dtype):
    function, definition = OPS[op]
    with gpu():
        x, weight, bias, skip, grad = make_inputs(op, dtype=dtype, **case)
        for tensor, values in ((x, (torch.nan, torch.inf)), (skip, (torch.inf, torch.nan)), (grad, (-torch.inf,))):
            for i, value in enumerate(values):
                tensor.data[0, 0, 1, i] = value
        bias.data[1] = torch.inf
        inputs = x, weight, bias, skip, grad
        results = with_gradients(function, inputs)
    unfused = with_gradients(definition, inputs)
    exact = with_gradients(definition, in_float64(inputs))
    for got, plain, precise in zip(results, unfused, exact, strict=True):
        assert torch.equal(got.isnan(), plain.isnan()) and torch.equal(got.isinf(), plain.isinf())
        finite = plain.isfinite()
        assert_parity(got[finite], plain[finite], precise[finite])


@pytest.mark.parametrize("case", [PIXEL_VECTORS, PLANE_NUMBERS, TILES], ids=["pixels", "planes", "tiles"])
def test_the_order_of_warps_changes_no_bit(case):
    results = []
    for order in (Order.ROUND_ROBIN, Order.REVERSED, 5):
        with gpu(order=order):
            results.append(with_gradients(upconv_concat, make_inputs(dtype=torch.bfloat16, **case)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_sums_of_many_pixels_keep_their_precision():
    with gpu():
        for formats in UNIFORM:
            inputs = make_inputs(batch=2, channels=(2, 4, 0), size=(64, 64), formats=formats)
            inputs[-1].add_(10)
            check("concat", inputs)


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("cache_bytes, images", [(1 << 20, [5]), (24576, [3, 2]), (8192, [1] * 5), (1024, [1] * 5)])
def test_images_whose_product_fits_into_half_of_the_cache_are_taken_together(cache_bytes, images, formats):
    """One has 4 KB."""
    with gpu(cache_bytes=cache_bytes) as device:
        check("concat", make_inputs(batch=5, channels=(3, 8, 8), size=(8, 4), formats=formats))
    assert [pass_of(each).images for each in device.launches] == images * 2


def distant(tensor: torch.Tensor) -> torch.Tensor:
    """The same images, further from each other than 32 bits count; pages that nobody touches take no memory."""
    memory = torch.empty(0, dtype=tensor.dtype)
    memory.untyped_storage().resize_(tensor.dtype.itemsize * (FAR * (len(tensor) - 1) + tensor[0].numel()))
    memory.set_(memory.untyped_storage(), 0, tensor.shape, (FAR, *tensor.stride()[1:]))
    return memory.copy_(tensor)


@pytest.mark.parametrize(
    "case", [PIXEL_VECTORS, PLANE_VECTORS | {"size": (8, 16)}, TILES], ids=["pixels", "planes", "tiles"]
)
def test_elements_beyond_the_range_of_32_bits(case):
    with gpu():
        x, weight, bias, skip, grad = (t.detach() for t in make_inputs(dtype=torch.bfloat16, **case))
        want = upconv_concat(x, weight, bias, skip)
        out = distant(torch.zeros_like(want))
        upconv_concat(x, weight, bias, distant(skip), out=out)
        assert torch.equal(out, want)
        backward = torch.ops.tokenfusion.upconv_concat_backward_cuda
        up = grad[:, : weight.shape[1]]
        far, near = (backward(each, x, weight, [True] * 3) for each in (distant(up), up))
        assert all(map(torch.equal, far, near))


@pytest.mark.parametrize("formats", UNIFORM, ids="-".join)
def test_opcheck(formats):
    ops, projection = torch.ops.tokenfusion, torch.randn(3, 3, requires_grad=True)
    with gpu():
        x, weight, bias, skip, grad = make_inputs("add", formats=formats)
        is_last = gives_channels_last(x, skip)
        torch.library.opcheck(ops.upconv_concat_cuda, (x, weight, bias, skip, True, is_last))
        torch.library.opcheck(ops.upconv_concat_backward_cuda, (grad, x, weight, [True] * 3))
        for proj_skip in (None, projection):
            operands = x, weight, bias, skip, None, proj_skip, is_last
            torch.library.opcheck(ops.upconv_concat_project_cuda, operands)
        operands = grad, x, weight, skip, None, projection, [True] * 4 + [False, True]
        torch.library.opcheck(ops.upconv_concat_project_backward_cuda, operands)


def test_what_the_kernels_do_not_take_is_said():
    with gpu():
        x, weight, _, skip, _ = (t.detach() for t in make_inputs())
        with pytest.raises(RuntimeError, match="cuda: dtype torch.float64 is not supported"):
            upconv_concat(x.double(), weight.double(), None, skip.double())
        with pytest.raises(RuntimeError, match="cuda: k = 3 is not one of 2, 4, 8, 16, 32"):
            upconv_concat(x, torch.zeros(5, 2, 3, 3), None, None)
        many = torch.zeros(1).expand(1, 1, 1 << 15, 1 << 14)
        with pytest.raises(RuntimeError, match="an up-sampled image has 2147483648 numbers, expected fewer than 2"):
            upconv_concat(many, torch.zeros(1, 1, 2, 2), None, None)


@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
def test_kernels_for_compute_capability_80(formats):
    with gpu(capability=80):
        check("concat", make_inputs("concat", channels=(5, 8, 8), formats=formats, dtype=torch.bfloat16))


def test_kernels_for_both_capabilities_are_the_same_but_for_a_conversion():
    check_same_code("upconv")
