"""The CUDA kernels of tied_ffn against the reference, on a GPU."""

import functools

import pytest
import torch

from tests.gradients import check_frozen, check_repeats, with_gradients
from tests.parity import assert_trains
from tests.tied_ffn import cases
from tests.tied_ffn.cases import check
from tokenfusion.kernels import extension, tied_ffn
from tokenfusion.kernels.tied_ffn import reference

pytestmark = pytest.mark.backend("cuda")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
on_gpu = pytest.mark.skipif(extension.why_not_cuda() is not None, reason=str(extension.why_not_cuda()))
make_inputs = functools.partial(cases.make_inputs, device="cuda")


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("recompute", [True, False])
def test_activations(activation, dtype, recompute):
    check(make_inputs(2, 150, channels=24, features=50, dtype=dtype), activation=activation, recompute=recompute)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, features", [(1, 1), (7, 13), (130, 70), (96, 384), (384, 1536)])
def test_any_widths(channels, features, dtype):
    check(make_inputs(3, 200, channels=channels, features=features, dtype=dtype))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_chunks_are_summed(dtype):
    check(make_inputs(20000, channels=1024, features=1024, dtype=dtype))


@on_gpu
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)])
def test_biases_may_be_absent(biases):
    check(make_inputs(2, 40, channels=16, features=24, dtype=torch.float32, biases=biases))


@on_gpu
@pytest.mark.parametrize("frozen", [{0}, {1}, {2, 3}, {0, 1, 2}], ids=str)
def test_frozen_inputs(frozen):
    check_frozen(tied_ffn, make_inputs(2, 40, channels=16, features=24, dtype=torch.bfloat16), frozen)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [True, False])
def test_fifty_calls_are_bit_equal(recompute, dtype):
    check_repeats(tied_ffn, make_inputs(3, 1000, channels=96, features=384, dtype=dtype), recompute=recompute)


@on_gpu
def test_views_and_expanded_gradients():
    x, weight, bias_in, bias_out, _ = make_inputs(20, 10, channels=16, features=24, dtype=torch.float32)
    view, ones = x.transpose(0, 1)[1:], torch.ones((), device="cuda")
    got = with_gradients(tied_ffn, (view, weight, bias_in, bias_out, ones.expand(9, 20, 16)))
    want = with_gradients(
        tied_ffn, (view.contiguous(), weight, bias_in, bias_out, torch.ones(9, 20, 16, device="cuda"))
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@on_gpu
def test_empty_batch():
    y, *grads = with_gradients(tied_ffn, make_inputs(0, 20, channels=16, features=24, dtype=torch.float32))
    assert y.shape == (0, 20, 16) and not any(grad.any() for grad in grads)


@on_gpu
def test_graph_capture_and_replay():
    *tensors, _ = (t.detach() for t in make_inputs(4000, channels=96, features=384, dtype=torch.float16))
    want = tied_ffn(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tied_ffn(*tensors)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


@on_gpu
def test_opcheck():
    *tensors, grad = make_inputs(2, 5, channels=8, features=12, dtype=torch.float32)
    torch.library.opcheck(torch.ops.tokenfusion.tied_ffn_cuda, (*tensors, "gelu", True))
    _, hidden = torch.ops.tokenfusion.tied_ffn_cuda(*tensors, "gelu", True)
    for needed in ([True] * 4, [True, False, False, False]):
        arguments = (grad, *tensors[:3], hidden.detach(), "gelu", needed)
        torch.library.opcheck(torch.ops.tokenfusion.tied_ffn_backward_cuda, arguments)


@on_gpu
def test_compiles_without_graph_breaks():
    inputs = make_inputs(2, 20, channels=16, features=24, dtype=torch.float32)
    torch.compiler.reset()
    with assert_trains("tied_ffn"):
        got = with_gradients(torch.compile(tied_ffn, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(got, with_gradients(tied_ffn, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(extension.why_not_cuda() is None, reason="CUDA kernels run here")
def test_without_a_gpu_the_reason_is_said():
    *tensors, _ = cases.make_inputs(2, 3, channels=4, features=6, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: cuda: ") as error:
        tied_ffn(*tensors)
    assert extension.why_not_cuda() in str(error.value)
