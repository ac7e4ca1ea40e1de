"""The CUDA kernels of the up-convolutions against the reference, on a GPU."""

import functools

import pytest
import torch

from tests.gradients import check_repeats, with_gradients
from tests.parity import assert_trains
from tests.upconv import cases
from tests.upconv.cases import MIXED, OPS, UNIFORM, check, check_frozen_inputs_and_empty_batch, check_out_and_its_slice
from tokenfusion.kernels import extension, upconv_concat

pytestmark = pytest.mark.backend("cuda")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
on_gpu = pytest.mark.skipif(extension.why_not_cuda() is not None, reason=str(extension.why_not_cuda()))
make_inputs = functools.partial(cases.make_inputs, device="cuda")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", UNIFORM + MIXED, ids="-".join)
@pytest.mark.parametrize("op", OPS)
def test_formats(op, formats, dtype):
    check(op, make_inputs(op, formats=formats, dtype=dtype))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("scale", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("op", OPS)
def test_every_scale(op, scale, formats, dtype):
    check(op, make_inputs(op, channels=(24, 16, 8), size=(4, 8), scale=scale, formats=formats, dtype=dtype))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (33, 29), (64, 64)])
@pytest.mark.parametrize("op", OPS)
def test_sizes(op, size, formats, dtype):
    check(op, make_inputs(op, batch=5, channels=(96, 72, 40), size=size, formats=formats, dtype=dtype))


@on_gpu
@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
def test_many_chunks(formats):
    check("concat", make_inputs(batch=40, channels=(32, 64, 8), size=(64, 64), formats=formats, dtype=torch.bfloat16))


@on_gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("op", ["concat", "project"])
def test_bias_and_skip(op, skip_first, skip, bias):
    check(op, make_inputs(op, channels=(5, 3, skip), bias=bias), skip_first=skip_first)


@on_gpu
@pytest.mark.parametrize("op", OPS)
def test_frozen_inputs_and_empty_batch(op):
    check_frozen_inputs_and_empty_batch(op, "cuda")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
@pytest.mark.parametrize("op", OPS)
def test_fifty_calls_are_bit_equal(op, formats, dtype):
    inputs = make_inputs(op, batch=4, channels=(64, 32, 32), size=(14, 14), formats=formats, dtype=dtype)
    check_repeats(OPS[op][0], inputs)


@on_gpu
@pytest.mark.parametrize("formats", UNIFORM, ids=lambda f: f[0])
def test_out_and_its_slice(formats):
    check_out_and_its_slice(make_inputs(formats=formats), "cuda")


@on_gpu
def test_graph_capture_and_replay():
    *tensors, _ = (t.detach() for t in make_inputs(channels=(64, 32, 32), size=(14, 14), dtype=torch.float16))
    want = upconv_concat(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = upconv_concat(*tensors)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


@on_gpu
def test_opcheck():
    (x, weight, bias, skip), grad = make_inputs()[:4], make_inputs()[4]
    ops = torch.ops.tokenfusion
    torch.library.opcheck(ops.upconv_concat_cuda, (x, weight, bias, skip, True, False))
    torch.library.opcheck(ops.upconv_concat_backward_cuda, (grad[:, 4:], x, weight, [True, True, True]))


@on_gpu
def test_compiles_without_graph_breaks():
    inputs = make_inputs()
    torch.compiler.reset()
    with assert_trains("upconv_concat"):
        got = with_gradients(torch.compile(upconv_concat, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(got, with_gradients(upconv_concat, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(extension.why_not_cuda() is None, reason="CUDA kernels run here")
@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_the_reason_is_said(op):
    *tensors, _ = cases.make_inputs(op)
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: cuda: ") as error:
        OPS[op][0](*tensors)
    assert extension.why_not_cuda() in str(error.value)
