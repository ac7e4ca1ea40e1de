"""The CUDA kernels of dynamic_mixing against the reference, on a GPU."""

import functools

import pytest
import torch

from tests.dynamic_mixing import cases
from tests.gradients import check_frozen, check_repeats, in_float64, with_gradients
from tests.parity import assert_parity, assert_trains
from tokenfusion.kernels import dynamic_mixing, extension
from tokenfusion.kernels.dynamic_mixing import op, reference

pytestmark = pytest.mark.backend("cuda")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
on_gpu = pytest.mark.skipif(extension.why_not_cuda() is not None, reason=str(extension.why_not_cuda()))
make_inputs = functools.partial(cases.make_inputs, device="cuda")


def can_run(inputs, **options) -> str | None:
    x, weight, bias, *generate, _ = (t.detach() for t in inputs)
    return op._cuda_can_run(x, torch.nn.functional.linear(x, weight, bias), *generate, *options.values())


def check(inputs, **options):
    if can_run(inputs, **options) is not None:
        pytest.skip(can_run(inputs, **options))
    cases.check(inputs, **options)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 7, 14, 15, 16, 20, 32, 33, 64])
def test_any_number_of_tokens(tokens, dim, dtype):
    height, width = (tokens, 3) if dim == 1 else (3, tokens)
    check(make_inputs(2, height, width, 96, segments=12, dim=dim, dtype=dtype), segments=12, dim=dim)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, segments", [(1, 1), (7, 1), (7, 7), (40, 1), (512, 1), (30, 2), (192, 8)])
def test_any_segments(channels, segments, dtype):
    check(make_inputs(2, 9, 16, channels, segments=segments, dim=2, dtype=dtype), segments=segments, dim=2)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, reduced", [(16, 1), (16, 3), (32, 8), (16, 16), (20, 16)])
def test_any_reduced_dimension(tokens, reduced, dtype):
    inputs = make_inputs(2, 5, tokens, 64, segments=4, dim=2, reduced=reduced, dtype=dtype)
    check(inputs, segments=4, dim=2)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_and_its_gradients(dtype):
    x, weight, bias, *generate, grad = make_inputs(4, 16, 16, 96, segments=4, dim=1, dtype=dtype)
    tensors = x, torch.nn.functional.linear(x, weight, bias).detach().requires_grad_(), *generate
    grads = grad, grad[:, 0, 0]

    def plain(*tensors, **options):
        mixed = reference.mix(*tensors, **options)
        return mixed, mixed.mean(dim=(1, 2))

    def results(mix, tensors, grads):
        outputs = mix(*tensors, segments=4, dim=1)
        return [*outputs, *torch.autograd.grad(outputs, tensors, grads)]

    got = results(functools.partial(op.mix, with_mean=True), tensors, grads)
    exact = results(plain, in_float64(tensors), in_float64(grads))
    for triple in zip(got, results(plain, tensors, grads), exact, strict=True):
        assert_parity(*triple, summands=x[..., 0].numel())


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_fifty_calls_are_bit_equal(dtype):
    inputs = make_inputs(8, 32, 32, 96, segments=4, dim=1, dtype=dtype)
    if can_run(inputs, segments=4, dim=1) is not None:
        pytest.skip(can_run(inputs, segments=4, dim=1))
    check_repeats(dynamic_mixing, inputs, segments=4, dim=1)


@on_gpu
@pytest.mark.parametrize("first", [8, 5])
def test_strided_tensors_are_read_in_place(first):
    x, *weights, grad = make_inputs(2, 5, 6, 24, segments=3, dim=1, dtype=torch.float32)
    guarded = torch.full((4, 9, 10, 48), torch.nan, device="cuda")
    view = guarded[1:3, 2:7, 2:8, first : first + 24]
    view.copy_(x.detach())
    got = with_gradients(dynamic_mixing, (view.requires_grad_(), *weights, grad), segments=3, dim=1)
    want = with_gradients(dynamic_mixing, (x, *weights, grad), segments=3, dim=1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("trained", [{0}, {1, 2}, {3}, {4}], ids=str)
def test_frozen_inputs_and_weights(trained):
    inputs = make_inputs(2, 4, 5, 16, segments=2, dim=2, dtype=torch.bfloat16)
    check_frozen(dynamic_mixing, inputs, set(range(5)) - trained, segments=2, dim=2)


@on_gpu
def test_empty_batch():
    mixed, *grads = with_gradients(dynamic_mixing, make_inputs(0, 3, 4, 6, segments=2, dim=1), segments=2, dim=1)
    assert mixed.shape == (0, 3, 4, 6)
    assert all(not grad.any() for grad in grads)


@on_gpu
def test_graph_capture_and_replay():
    *tensors, _ = (t.detach() for t in make_inputs(2, 16, 16, 96, segments=4, dim=1, dtype=torch.float16))
    want = dynamic_mixing(*tensors, segments=4, dim=1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = dynamic_mixing(*tensors, segments=4, dim=1)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


@on_gpu
def test_opcheck():
    x, weight, bias, *generate, grad = make_inputs(2, 3, 4, 6, segments=2, dim=2)
    tensors = x, torch.nn.functional.linear(x, weight, bias).detach().requires_grad_(), *generate
    torch.library.opcheck(torch.ops.tokenfusion.dynamic_mixing_cuda, (*tensors, 2, 2, True))
    arguments = (grad, grad[:, 0, 0].contiguous(), *(t.detach() for t in tensors), 2, 2, [True] * 4)
    torch.library.opcheck(torch.ops.tokenfusion.dynamic_mixing_backward_cuda, arguments)


@on_gpu
def test_compiles_without_graph_breaks():
    inputs = make_inputs(2, 5, 6, 24, segments=3, dim=1)
    torch.compiler.reset()
    function = functools.partial(dynamic_mixing, segments=3, dim=1)
    with assert_trains("dynamic_mixing"):
        got = with_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(got, with_gradients(function, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(extension.why_not_cuda() is None, reason="CUDA kernels run here")
def test_without_a_gpu_the_reason_is_said():
    *tensors, _ = cases.make_inputs(2, 3, 4, 6, segments=2, dim=2)
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: cuda: ") as error:
        dynamic_mixing(*tensors, segments=2, dim=2)
    assert extension.why_not_cuda() in str(error.value)


@pytest.mark.parametrize("tokens, reduced, reason", [(32, 8, None), (64, 3, "d = 3 is more than the 2 that this GPU")])
def test_what_the_kernels_cannot_take(tokens, reduced, reason, monkeypatch):
    monkeypatch.setattr(op, "_query_cuda_max_reduced", lambda tokens, itemsize, device: 16 if tokens <= 32 else 2)
    x, compressed = torch.zeros(1, 2, tokens, 8), torch.zeros(1, 2, tokens, 2 * reduced)
    said = op._why_not_cuda_kernel(x, compressed, 2, 2)
    assert said is None if reason is None else reason in said


def test_the_question_can_be_compiled(monkeypatch):
    monkeypatch.setattr(op, "_query_cuda_max_reduced", lambda tokens, itemsize, device: 16)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def function(x, compressed):
        return x + 1 if op._why_not_cuda_kernel(x, compressed, 2, 2) is None else x

    for batch in (2, 3, 4):
        x = torch.zeros(batch, 3, 5, 8)
        assert torch.equal(function(x, torch.zeros(batch, 3, 5, 4)), x + 1)
