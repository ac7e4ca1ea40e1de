"""The CPU backend of tied_ffn against the reference."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.gradients import check_frozen, check_repeats, in_float64, with_gradients
from tests.parity import assert_trains
from tests.tied_ffn.cases import check, make_inputs
from tokenfusion.kernels import tied_ffn
from tokenfusion.kernels.tied_ffn import reference

pytestmark = pytest.mark.backend("cpu")

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("recompute", [True, False])
def test_activations(activation, dtype, recompute):
    inputs = make_inputs(2, 150, channels=24, features=50, dtype=dtype)
    check(inputs, activation=activation, recompute=recompute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 31, 64, 197, 257, 1031])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_tokens_and_threads(tokens, dtype, threads, set_threads):
    set_threads(threads)
    check(make_inputs(tokens, channels=16, features=40, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, features", [(1, 1), (3, 7), (8, 16), (7, 13), (96, 384), (48, 17)])
def test_any_widths(channels, features, dtype):
    check(make_inputs(3, 20, channels=channels, features=features, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_chunks_are_summed(dtype):
    inputs = make_inputs(6000, channels=8, features=1024, dtype=dtype)  # 16 MiB hold 2048 tokens in float32
    check(inputs)


def test_blocks_of_a_wide_hidden_layer():
    check(make_inputs(1300, channels=8, features=2080, dtype=torch.float32))  # 256 tokens are more than 2 MiB


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)])
def test_biases_may_be_absent(biases):
    check(make_inputs(2, 40, channels=16, features=24, dtype=torch.float32, biases=biases))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4), (2, 1, 2, 3)])
def test_any_number_of_dimensions(leading):
    check(make_inputs(*leading, channels=8, features=12, dtype=torch.float32))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu", "identity"])
def test_activations_over_their_whole_range(activation):
    """Zero, tiny, huge, infinite and undefined pre-activations, forward and in the derivative."""
    special = [0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, torch.inf, -torch.inf, torch.nan]
    x = torch.cat((torch.linspace(-40, 40, 4001), torch.tensor(special)))[:, None].requires_grad_()
    inputs = x, torch.ones(1, 1), None, None, torch.ones_like(x)
    got = with_gradients(tied_ffn, inputs, activation=activation)
    exact = with_gradients(reference.tied_ffn, in_float64(inputs), activation=activation)
    for a, b in zip(got, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=2e-7, equal_nan=True)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "identity"])
@pytest.mark.parametrize("recompute", [True, False])
def test_gradcheck_and_second_order(activation, recompute):
    *tensors, _ = make_inputs(2, 2, channels=3, features=4, dtype=torch.float64)
    function = functools.partial(tied_ffn, activation=activation, recompute=recompute)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_second_order_without_biases():
    x, weight, *_ = make_inputs(3, channels=3, features=4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(tied_ffn, (x, weight))


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("biases", [(True, True), (False, False)])
def test_opcheck(hold, biases):
    *tensors, grad = make_inputs(2, 5, channels=8, features=12, dtype=torch.float32, biases=biases)
    torch.library.opcheck(torch.ops.tokenfusion.tied_ffn_cpu, (*tensors, "gelu", hold))
    _, hidden = torch.ops.tokenfusion.tied_ffn_cpu(*tensors, "gelu", hold)
    arguments = (grad, *tensors[:3], hidden.detach(), "gelu", [True, True, *biases])
    torch.library.opcheck(torch.ops.tokenfusion.tied_ffn_backward_cpu, arguments)


def test_recomputing_changes_no_bit():
    inputs = make_inputs(700, channels=16, features=40, dtype=torch.float32)
    for a, b in zip(with_gradients(tied_ffn, inputs), with_gradients(tied_ffn, inputs, recompute=False)):
        assert torch.equal(a, b)


def test_only_x_is_held():
    x, weight, bias_in, bias_out, _ = make_inputs(64, channels=8, features=32, dtype=torch.float32)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        tied_ffn(x * 1, weight, bias_in, bias_out)
    parameters = {t.data_ptr() for t in (weight, bias_in, bias_out)}
    assert sum(t.nbytes for t in held if t.data_ptr() not in parameters) == x.nbytes
    held.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        tied_ffn(x * 1, weight, bias_in, bias_out, recompute=False)
    assert sum(t.nbytes for t in held if t.data_ptr() not in parameters) == 5 * x.nbytes


def test_views_and_expanded_gradients():
    x, weight, bias_in, bias_out, _ = make_inputs(3, 40, channels=16, features=24, dtype=torch.float32)
    views = {
        "slice of tokens": x[:, 1:],
        "tokens before batch": x.transpose(0, 1),
        "one token for all": x[:, :1].expand(-1, 9, -1),
        "channels not innermost": x.permute(0, 2, 1)[:, :, :16],
    }
    for name, view in views.items():
        for g in (torch.ones_like(view).contiguous(), torch.ones(()).expand(view.shape)):
            got = with_gradients(tied_ffn, (view, weight, bias_in, bias_out, g))
            want = with_gradients(tied_ffn, (view.contiguous(), weight, bias_in, bias_out, torch.ones_like(g)))
            for a, b in zip(got, want):
                assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda weight: weight.t().contiguous().t(),
        lambda weight: torch.cat((weight, weight), 1)[:, 8:24],
        lambda weight: weight.flatten().unfold(0, 16, 8)[:24],
        lambda weight: weight.flatten().unfold(0, 24, 8)[:16].t(),
        lambda weight: weight[:1].expand(24, 16),
    ],
    ids=["transposed", "sliced", "overlapping rows", "overlapping columns", "one row"],
)
def test_weight_of_any_strides(lay_out):
    x, weight, bias_in, bias_out, grad = make_inputs(30, channels=16, features=24, dtype=torch.float32)
    laid_out = lay_out(weight.detach())
    for a, b in zip(
        with_gradients(tied_ffn, (x, laid_out.requires_grad_(), bias_in, bias_out, grad)),
        with_gradients(tied_ffn, (x, laid_out.detach().clone().contiguous().requires_grad_(), bias_in, bias_out, grad)),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {3}, {0, 1}, {1, 2, 3}, {0, 1, 2}, {0, 2, 3}], ids=str)
def test_frozen_inputs(frozen):
    inputs = make_inputs(2, 20, channels=16, features=24, dtype=torch.float32)
    check_frozen(tied_ffn, inputs, frozen)


@pytest.mark.parametrize("threads", [1, 2])
def test_empty_batch(threads, set_threads):
    inputs = make_inputs(0, 20, channels=16, features=24, dtype=torch.float32)
    set_threads(threads)
    y, *grads = with_gradients(tied_ffn, inputs)
    assert y.shape == (0, 20, 16)
    assert [g.shape for g in grads] == [t.shape for t in inputs[:4]]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_calls_are_bit_equal(dtype):
    inputs = make_inputs(3, 250, channels=32, features=64, dtype=dtype)
    check_repeats(tied_ffn, inputs)


def test_compiles_without_graph_breaks_and_stays_one_node():
    inputs = make_inputs(2, 20, channels=16, features=24, dtype=torch.float32)
    torch.compiler.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def function(x, *others):
        return tied_ffn(x * 1.0, *others)

    for chosen in (backend, "inductor"):
        compiled = torch.compile(function, fullgraph=True, backend=chosen)
        with assert_trains("tied_ffn"):
            got = with_gradients(compiled, inputs)
        for a, b in zip(got, with_gradients(function, inputs)):
            torch.testing.assert_close(a, b)
    assert [str(node.target) for node in graphs[0].graph.nodes].count("tokenfusion.tied_ffn_cpu.default") == 1


def test_compiled_code_takes_another_batch_without_recompiling_each_time():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x, w: tied_ffn(x, w), fullgraph=True, backend=counter)
    for batch in range(2, 8):
        x, weight, *_ = make_inputs(batch, 3, channels=8, features=12, dtype=torch.float32)
        compiled(x, weight)
    assert counter.frame_count <= 2


def test_autocast_computes_in_its_dtype_as_linear_does():
    inputs = make_inputs(2, 20, channels=16, features=24, dtype=torch.float32)
    *tensors, grad = inputs
    with torch.autocast("cpu", dtype=torch.bfloat16), assert_trains("tied_ffn"):
        y = tied_ffn(*tensors)
        assert y.dtype == torch.bfloat16
        y.backward(grad.bfloat16())
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    low = tuple(t.detach().bfloat16().requires_grad_() for t in inputs)
    assert torch.equal(y, tied_ffn(*low[:4]))


def test_checkpoint():
    inputs = make_inputs(2, 20, channels=16, features=24, dtype=torch.float32)
    got = with_gradients(lambda *t: checkpoint(tied_ffn, *t, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, with_gradients(tied_ffn, inputs), strict=True))


def test_float64_is_as_exact_as_the_reference():
    inputs = make_inputs(50, channels=16, features=24, dtype=torch.float64)
    for a, b in zip(with_gradients(tied_ffn, inputs), with_gradients(reference.tied_ffn, in_float64(inputs))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability, run_python):
    """The builds for older processors, which a new one can run too."""
    run_python(
        f"""
        import torch, tokenfusion._C
        from tests.tied_ffn.cases import check_parity, make_inputs
        import tokenfusion
        from tokenfusion.kernels import tied_ffn
        from tokenfusion.kernels.tied_ffn import reference
        assert tokenfusion._C.capability() == {capability!r}, tokenfusion._C.capability()
        with tokenfusion.backend("cpu"):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                for activation in reference.ACTIVATIONS:
                    inputs = make_inputs(2, 37, channels=24, features=50, dtype=dtype)
                    check_parity(tied_ffn, inputs, activation=activation)
        """,
        ATEN_CPU_CAPABILITY=capability,
    )
