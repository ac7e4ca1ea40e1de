"""Function transforms give the values of plain calls, for every operator and layer; what could be wrong raises."""

import functools
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import tokenfusion
from tests.public import LAYERS, OPERATORS, Case, layer
from tokenfusion.kernels import dispatch

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

KINDS = "trainable", "frozen"
CASES = [*OPERATORS, *(f"{name}; {kind}" for name in LAYERS for kind in KINDS)]
WITH_PARAMETERS = [name for name in LAYERS if not name.startswith("UpCopy")]


@pytest.fixture(autouse=True)
def differentiable_attention():
    """Of PyTorch's own, one form alone has forward-mode derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@functools.cache
def case_of(name: str) -> Case:
    """call gives three numbers; tensors are all that is differentiated: a layer's inputs, and its parameters unless it
    is frozen."""
    name, _, kind = name.partition("; ")
    if name in OPERATORS:
        call, tensors = OPERATORS[name]
    else:
        module, inputs = layer(name)
        module.requires_grad_(kind != "frozen")
        parameters = {} if kind == "frozen" else dict(module.named_parameters())

        def call(*tensors):
            given = dict(zip(parameters, tensors[len(inputs) :], strict=True))
            return functional_call(module, given, tensors[: len(inputs)])

        tensors = (*inputs, *(parameter.detach() for parameter in parameters.values()))
    with torch.no_grad():
        size = call(*tensors).numel()
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Case(lambda *tensors: rows @ call(*tensors).flatten(), tensors)


def all_of(tensors):
    return tuple(range(len(tensors)))


def batch_of(tensors):
    return tuple(torch.stack((tensor, 2 * tensor)) for tensor in tensors)


def directions_of(tensors):
    return tuple(torch.linspace(-1, 2, t.numel(), dtype=torch.float64).reshape(t.shape) for t in tensors)


def ones(count=3):
    return torch.ones(count, dtype=torch.float64)


def sum_of(call):
    return lambda *tensors: call(*tensors).sum()


# By plain calls


def gradients(call, tensors, grad_output):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(call(*leaves), leaves, grad_output, allow_unused=True, materialize_grads=True)


@functools.cache
def jacobian(call, tensors):
    """For each tensor, a row for each of the three numbers."""
    rows = [gradients(call, tensors, one) for one in ones().diag()]
    return tuple(map(torch.stack, zip(*rows, strict=True)))


def tangent(call, tensors):
    parts = zip(jacobian(call, tensors), directions_of(tensors), strict=True)
    return sum((part * direction).flatten(1).sum(1) for part, direction in parts)


def each(function, tensors):
    """function(*tensors) for each of a batch, stacked."""
    results = [function(*one) for one in zip(*batch_of(tensors), strict=True)]
    return tuple(map(torch.stack, zip(*results))) if isinstance(results[0], tuple) else torch.stack(results)


# By transforms


def by_dual_numbers(call, tensors):
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, tensors, directions_of(tensors))
        return forward_ad.unpack_dual(call(*duals)).tangent


def batched_gradients(call, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    options = dict(allow_unused=True, materialize_grads=True)
    return torch.autograd.grad(call(*leaves), leaves, ones().diag(), is_grads_batched=True, **options)


def backward_within_vmap(call, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    options = dict(retain_graph=True, allow_unused=True, materialize_grads=True)
    return vmap(lambda one: torch.autograd.grad(out, leaves, one, **options))(ones().diag())


TRANSFORMS = {
    "grad": (lambda f, t: grad(sum_of(f), all_of(t))(*t), lambda f, t: gradients(f, t, ones())),
    "vmap": (lambda f, t: vmap(f)(*batch_of(t)), each),
    "vmap(grad)": (
        lambda f, t: vmap(grad(sum_of(f), all_of(t)))(*batch_of(t)),
        lambda f, t: each(lambda *one: gradients(f, one, ones()), t),
    ),
    "jacrev": (lambda f, t: jacrev(f, all_of(t))(*t), jacobian),
    "jacfwd": (lambda f, t: jacfwd(f, all_of(t))(*t), jacobian),
    "jvp": (lambda f, t: jvp(f, t, directions_of(t))[1], tangent),
    "make_dual": (by_dual_numbers, tangent),
    "is_grads_batched": (batched_gradients, jacobian),
    "backward within vmap": (backward_within_vmap, jacobian),
}


def assert_values_of_plain_calls(name, transform, recording=True):
    call, tensors = case_of(name)
    transformed, plain = TRANSFORMS[transform]
    with torch.set_grad_enabled(recording):
        actual = transformed(call, tensors)
    torch.testing.assert_close(actual, plain(call, tensors), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CASES)
def test_values_of_plain_calls(name, transform):
    assert_values_of_plain_calls(name, transform)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "make_dual"])
@pytest.mark.parametrize("name", CASES)
def test_values_of_plain_calls_in_inference(name, transform):
    assert_values_of_plain_calls(name, transform, recording=False)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("name", OPERATORS)
def test_functional_jacobian(name, strategy):
    call, tensors = case_of(name)
    actual = torch.autograd.functional.jacobian(call, tensors, vectorize=True, strategy=strategy)
    torch.testing.assert_close(actual, jacobian(call, tensors), rtol=1e-8, atol=1e-10)


def cubed(call):
    return lambda *tensors: call(*tensors).pow(3).sum()


@functools.cache
def change_of_gradients(call, tensors):
    """The Hessian of cubed(call) times the directions, by central differences of gradients of plain calls."""

    def at(step):
        moved = [t + step * d for t, d in zip(tensors, directions_of(tensors), strict=True)]
        return gradients(cubed(call), moved, None)

    return tuple((after - before) / 2e-5 for after, before in zip(at(1e-5), at(-1e-5), strict=True))


def hessian_times_directions(call, tensors):
    rows, directions = hessian(cubed(call), all_of(tensors))(*tensors), directions_of(tensors)
    return tuple(
        sum(block.flatten(t.dim()) @ d.flatten() for block, d in zip(row, directions, strict=True))
        for t, row in zip(tensors, rows, strict=True)
    )


SECOND = {
    "hessian": hessian_times_directions,
    "forward over reverse": lambda f, t: jvp(grad(cubed(f), all_of(t)), t, directions_of(t))[1],
    "hvp": lambda f, t: torch.autograd.functional.hvp(cubed(f), t, directions_of(t))[1],
    "vhp": lambda f, t: torch.autograd.functional.vhp(cubed(f), t, directions_of(t))[1],
}


@pytest.mark.parametrize("how", SECOND)
@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives(name, how):
    call, tensors = case_of(name)
    for actual, expected in zip(SECOND[how](call, tensors), change_of_gradients(call, tensors), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-7)


def third_derivative(call, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = cubed(call)(*leaves)
    for _ in range(2):
        pairs = zip(torch.autograd.grad(out, leaves, create_graph=True), directions_of(tensors), strict=True)
        out = sum((one * direction).sum() for one, direction in pairs)
    return torch.autograd.grad(out, leaves)


@pytest.mark.parametrize("name", OPERATORS)
def test_third_derivatives(name):
    call, tensors = case_of(name)
    with tokenfusion.backend("reference"):
        expected = third_derivative(call, tensors)
    torch.testing.assert_close(third_derivative(call, tensors), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_gradients_of_each_sample(name):
    module, inputs = layer(name)

    def loss(parameters, *one):
        return functional_call(module, parameters, tuple(tensor[None] for tensor in one)).square().sum()

    parameters = {key: parameter.detach() for key, parameter in module.named_parameters()}
    actual = vmap(grad(loss), (None, *[0] * len(inputs)))(parameters, *inputs)
    for i in range(len(inputs[0])):
        module.zero_grad()
        module(*(tensor[i : i + 1] for tensor in inputs)).square().sum().backward()
        for key, parameter in module.named_parameters():
            torch.testing.assert_close(actual[key][i], parameter.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("recording", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_ensemble(name, recording):
    modules, inputs = [layer(name).call for _ in range(2)], layer(name).tensors
    for parameter in modules[1].parameters():
        parameter.data.mul_(1.5)
    with torch.set_grad_enabled(recording):
        actual = vmap(lambda *state: functional_call(modules[0], state, inputs))(*stack_module_state(modules))
    for one, module in zip(actual, modules, strict=True):
        torch.testing.assert_close(one, module(*inputs), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap(grad)", "jvp"])
@pytest.mark.parametrize("name", ["single_query_attention", "tied_ffn", "gated_sum"])
def test_a_transform_within_compiled_code(name, transform):
    call, tensors = case_of(name)
    transformed, plain = TRANSFORMS[transform]
    torch.compiler.reset()
    compiled = torch.compile(lambda *t: transformed(call, t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), plain(call, tensors), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "make_dual"])
def test_a_transform_of_a_compiled_function(transform, backend):
    """PyTorch refuses some; none gives other values, even where the function was compiled by a plain call."""
    call, tensors = case_of("single_query_attention")
    transformed, plain = TRANSFORMS[transform]
    torch.compiler.reset()
    compiled = torch.compile(call, backend=backend)
    compiled(*tensors)
    try:
        actual = transformed(compiled, tensors)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException):
        return
    torch.testing.assert_close(actual, plain(call, tensors), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "gated_sum"])
def test_a_recorded_operator_refuses_tangents_in_its_backward_pass(name):
    call, tensors = OPERATORS[name]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = call(*leaves)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="tokenfusion.*got a tensor with a tangent"):
        torch.autograd.grad(out, leaves, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


DIRECT_CALLS = {
    "single_query_attention_cpu": ("single_query_attention", (None, None, True, 1e-6)),
    "tied_ffn_cpu": ("tied_ffn", ("gelu", False)),
    "upconv_concat_cpu": ("upconv_concat", (False, False)),
    "upconv_concat_project_cpu": ("upconv_add", (None, None, False)),
    "upconv_concat_out_cpu": ("upconv_add", (False, torch.empty(2, 6, 4, 4, dtype=torch.float64))),
}


@pytest.mark.parametrize("name", DIRECT_CALLS)
def test_an_operator_itself_drops_no_tangent(name):
    of, more = DIRECT_CALLS[name]
    op, tensors = getattr(torch.ops.tokenfusion, name), OPERATORS[of].tensors
    refuses = functools.partial(pytest.raises, NotImplementedError, match="got a tensor with a tangent")
    with refuses():
        jvp(lambda *t: op(*t, *more), tensors, tensors)
    for frozen in (True, False):
        with refuses(), forward_ad.dual_level():
            op(*(forward_ad.make_dual(t.clone().requires_grad_(not frozen), t) for t in tensors), *more)


def test_an_operator_that_writes_refuses_to_be_recorded():
    of, more = DIRECT_CALLS["upconv_concat_out_cpu"]
    recorded = (tensor.clone().requires_grad_() for tensor in OPERATORS[of].tensors)
    with pytest.raises(NotImplementedError, match="upconv_concat_out_cpu.*requires a gradient"):
        torch.ops.tokenfusion.upconv_concat_out_cpu(*recorded, *more)


def test_what_looks_at_a_call():
    seen = []

    def look(x):
        seen.append(dispatch.transform())
        return x.sum()

    x = torch.ones(2)
    look(x)
    grad(look)(x)
    vmap(look)(x[None])
    with forward_ad.dual_level():
        look(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(look, (x,), check_trace=False)
    torch.fx.symbolic_trace(look)
    look(x)
    function_transform, tracers = ["torch.func"] * 2, ["torch.jit.trace", "torch.fx"]
    assert seen == [None, *function_transform, "forward-mode differentiation", *tracers, None]


def test_a_backend_by_name_gives_way_to_a_transform():
    with tokenfusion.backend("cpu"):
        assert_values_of_plain_calls("single_query_attention", "vmap")
