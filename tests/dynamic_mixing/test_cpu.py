"""The C++ kernels of dynamic_mixing against the reference."""

import functools

import pytest
import torch

from tests.dynamic_mixing.cases import check, make_inputs
from tests.gradients import check_frozen, check_repeats, with_gradients
from tests.parity import assert_parity, assert_trains
from tokenfusion.kernels import dynamic_mixing
from tokenfusion.kernels.dynamic_mixing import reference
from tokenfusion.kernels.dynamic_mixing.op import mix

pytestmark = pytest.mark.backend("cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 14, 15, 16, 20, 32, 33, 64])
def test_any_number_of_tokens(tokens, dim, dtype):
    height, width = (tokens, 3) if dim == 1 else (3, tokens)
    # many segments: the error of a gradient of few elements is a matter of chance
    check(make_inputs(2, height, width, 24, segments=12, dim=dim, dtype=dtype), segments=12, dim=dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, segments", [(1, 1), (7, 1), (7, 7), (24, 1), (24, 24), (30, 2), (40, 2), (192, 8)])
def test_any_segments(channels, segments, dtype):
    check(make_inputs(2, 5, 9, channels, segments=segments, dim=1, dtype=dtype), segments=segments, dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduced", [1, 2, 3, 8, 16])
def test_any_reduced_dimension(reduced, dtype):
    check(make_inputs(2, 6, 9, 16, segments=4, dim=2, reduced=reduced, dtype=dtype), segments=4, dim=2)


@pytest.mark.parametrize("batch", [1, 2, 5, 7])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_batch_and_threads(batch, threads, set_threads):
    set_threads(threads)
    check(make_inputs(batch, 5, 7, 12, segments=2, dim=1), segments=2, dim=1)


@pytest.mark.parametrize("dim", [1, 2])
def test_gradcheck_and_second_order(dim):
    *tensors, _ = make_inputs(1, 3, 2, 4, segments=2, dim=dim, dtype=torch.float64)
    function = functools.partial(dynamic_mixing, segments=2, dim=dim)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def compressed_inputs(dtype=torch.float64, batch=2):
    x, weight, bias, *generate, _ = make_inputs(batch, 3, 4, 6, segments=2, dim=2, dtype=dtype)
    compressed = torch.nn.functional.linear(x, weight, bias).detach().requires_grad_()
    return x, compressed, *generate


def test_mean_and_its_gradients():
    tensors = compressed_inputs()
    function = functools.partial(mix, segments=2, dim=2, with_mean=True)
    mixed, mean = function(*tensors)
    torch.testing.assert_close(mean, mixed.mean(dim=(1, 2)))
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *t: function(*t)[1], tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_obeys_the_parity_rule(dtype):
    tensors = [t.detach() for t in compressed_inputs(dtype, batch=3)]
    exact = reference.mix(*(t.double() for t in tensors), segments=2, dim=2).mean(dim=(1, 2))
    unfused = reference.mix(*tensors, segments=2, dim=2).mean(dim=(1, 2))
    assert_parity(mix(*tensors, segments=2, dim=2, with_mean=True)[1], unfused, exact)


@pytest.mark.parametrize("with_mean", [False, True])
def test_opcheck(with_mean):
    tensors = compressed_inputs(torch.float32)
    torch.library.opcheck(torch.ops.tokenfusion.dynamic_mixing_cpu, (*tensors, 2, 2, with_mean))
    grad_mixed, grad_mean = torch.randn(2, 3, 4, 6), torch.randn(2, 6) if with_mean else None
    arguments = (grad_mixed, grad_mean, *(t.detach() for t in tensors), 2, 2, [True] * 4)
    torch.library.opcheck(torch.ops.tokenfusion.dynamic_mixing_backward_cpu, arguments)


def test_strided_tensors_are_read_in_place():
    x, *weights, grad = make_inputs(3, 6, 7, 24, segments=2, dim=1)
    views = {
        "slice of channels": x[..., 4:16],
        "every other row": x[:, ::2],
        "columns before rows": x.transpose(1, 2).contiguous().transpose(1, 2),
        "one row for all": x[:, :1].expand(-1, 6, -1, -1),
        "one image for all": x[:1].expand(3, -1, -1, -1),
    }
    for name, view in views.items():
        length, channels = view.shape[1], view.shape[3]
        generated = [t.detach() for t in make_inputs(1, length, 1, channels, segments=2, dim=1)[1:-1]]
        results = []
        for tokens in (view, view.contiguous()):
            mixed = dynamic_mixing(tokens, *generated, segments=2, dim=1)
            grads = torch.autograd.grad(mixed, x, grad[:, :length, :, :channels], retain_graph=True)
            results.append([mixed, *grads])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, msg=name)


def test_gradient_of_any_strides():
    *tensors, grad = make_inputs(2, 5, 6, 8, segments=2, dim=2)
    expected = with_gradients(dynamic_mixing, (*tensors, grad), segments=2, dim=2)
    transposed = grad.transpose(1, 3).contiguous().transpose(1, 3)
    got = with_gradients(dynamic_mixing, (*tensors, transposed), segments=2, dim=2)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    ones = torch.ones(()).expand(grad.shape)
    got = with_gradients(dynamic_mixing, (*tensors, ones), segments=2, dim=2)
    want = with_gradients(dynamic_mixing, (*tensors, ones.contiguous()), segments=2, dim=2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dim", [1, 2])
def test_guard_bands_are_not_read(dim):
    x, *weights, grad = make_inputs(2, 5, 6, 8, segments=2, dim=dim)
    guarded = torch.full((4, 9, 10, 24), torch.nan)
    guarded[1:3, 2:7, 2:8, 8:16] = x.detach()
    view = guarded[1:3, 2:7, 2:8, 8:16].requires_grad_()
    got = with_gradients(dynamic_mixing, (view, *weights, grad), segments=2, dim=dim)
    want = with_gradients(dynamic_mixing, (x, *weights, grad), segments=2, dim=dim)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("trained", [{0}, {1}, {2}, {3}, {4}, {0, 3}, {1, 2, 3, 4}], ids=str)
def test_frozen_inputs_and_weights(trained):
    inputs = make_inputs(2, 4, 5, 8, segments=2, dim=2)
    check_frozen(dynamic_mixing, inputs, set(range(5)) - trained, segments=2, dim=2)


@pytest.mark.parametrize("dim", [1, 2])
def test_empty_batch(dim):
    inputs = make_inputs(0, 3, 4, 6, segments=2, dim=dim)
    mixed, *grads = with_gradients(dynamic_mixing, inputs, segments=2, dim=dim)
    assert mixed.shape == (0, 3, 4, 6)
    assert all(torch.equal(grad, torch.zeros_like(t)) for grad, t in zip(grads, inputs))


def test_fifty_calls_are_bit_equal():
    inputs = make_inputs(3, 8, 8, 24, segments=3, dim=1)
    check_repeats(dynamic_mixing, inputs, segments=3, dim=1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", range(5))
def test_nan_and_inf_propagate_as_in_the_reference(value, where):
    *tensors, _ = (t.detach() for t in make_inputs(2, 3, 17, 6, segments=2, dim=2))
    tensors[where].view(-1)[3 if where else 40] = value  # not the first, and for x not of the first line
    got = dynamic_mixing(*tensors, segments=2, dim=2)
    want = reference.dynamic_mixing(*tensors, segments=2, dim=2)
    assert want.isfinite().any() or where > 0
    torch.testing.assert_close(got, want, equal_nan=True)


def test_large_logits_do_not_overflow():
    x, compress_weight, *rest, _ = (t.detach() for t in make_inputs(2, 3, 5, 8, segments=2, dim=2))
    for scale in (1e4, 1e10):
        call = (x, compress_weight * scale, *rest)
        want = reference.dynamic_mixing(*call, segments=2, dim=2)
        torch.testing.assert_close(dynamic_mixing(*call, segments=2, dim=2), want)


def test_elements_beyond_the_range_of_32_bits():
    far = 2**31 + 64
    memory = torch.empty(0, dtype=torch.bfloat16)
    memory.untyped_storage().resize_((far + 128) * 2)  # pages that nobody touches take no memory
    x, *rest = (t.detach() for t in compressed_inputs(torch.bfloat16))
    view = memory.as_strided(x.shape, (far, 24, 6, 1))[:, :1]
    view.copy_(x[:, :1])
    call = [rest[0][:, :1], *rest[1:]]
    assert torch.equal(mix(view, *call, segments=2, dim=2)[0], mix(x[:, :1], *call, segments=2, dim=2)[0])


def test_forward_writes_neither_logits_nor_probabilities():
    from tokenfusion.measure import peak_extra_bytes

    x, *weights, _ = (t.detach() for t in make_inputs(8, 32, 32, 16, segments=8, dim=1))
    logits = 8 * 32 * 8 * 32 * 32 * 4
    compressed = 8 * 32 * 32 * 16 * 4
    peak = peak_extra_bytes(lambda: dynamic_mixing(x, *weights, segments=8, dim=1))
    assert peak < x.nbytes + compressed + 0.25 * logits  # scratch of the threads and the packed weight


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend):
    inputs = make_inputs(2, 4, 5, 8, segments=2, dim=1)
    torch.compiler.reset()

    def eager(x, *weights):
        return dynamic_mixing(x * 1.0, *weights, segments=2, dim=1)

    with assert_trains("dynamic_mixing"):
        got = with_gradients(torch.compile(eager, fullgraph=True, backend=backend), inputs)
    for a, b in zip(got, with_gradients(eager, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_code_takes_another_batch_without_recompiling_each_time():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(functools.partial(dynamic_mixing, segments=2, dim=1), fullgraph=True, backend=counter)
    for batch in range(2, 8):
        *tensors, _ = make_inputs(batch, 4, 5, 8, segments=2, dim=1)
        compiled(*tensors)
    assert counter.frame_count <= 2


def test_autocast_computes_in_its_dtype():
    *tensors, grad = make_inputs(2, 4, 5, 8, segments=2, dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16), assert_trains("dynamic_mixing"):
        mixed = dynamic_mixing(*tensors, segments=2, dim=1)
        assert mixed.dtype == torch.bfloat16
        mixed.backward(grad.bfloat16())
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    lower = [t.detach().bfloat16() for t in tensors]
    assert torch.equal(mixed, dynamic_mixing(*lower, segments=2, dim=1))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability, run_python):
    """The builds for older processors, which a new one can run too."""
    run_python(
        f"""
        import torch, tokenfusion._C
        from tests.dynamic_mixing.cases import check_parity, make_inputs
        import tokenfusion
        from tokenfusion.kernels import dynamic_mixing
        assert tokenfusion._C.capability() == {capability!r}, tokenfusion._C.capability()
        with tokenfusion.backend("cpu"):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                for tokens, channels in ((7, 24), (16, 21), (33, 6)):
                    inputs = make_inputs(2, tokens, 3, channels, segments=3, dim=1, dtype=dtype)
                    check_parity(dynamic_mixing, inputs, segments=3, dim=1)
        """,
        ATEN_CPU_CAPABILITY=capability,
    )
