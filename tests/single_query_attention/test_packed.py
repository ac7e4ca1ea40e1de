"""Bags packed one after the other in a jagged nested tensor: each as if it were alone, read in place."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.gradients import check_repeats, in_float64, with_gradients
from tests.parity import assert_parity, assert_runs
from tests.single_query_attention import cases
from tests.single_query_attention.cases import BACKENDS_AND_DTYPES, KERNELS, OPTIONS, kernels_of, without_triton
from tokenfusion.kernels import single_query_attention
from tokenfusion.kernels.single_query_attention import reference
from tokenfusion.kernels.single_query_attention.op import OPERATOR
from tokenfusion.measure import peak_extra_bytes

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
BAGS = [3, 0, 17, 1, 40]


def make_inputs(bags, queries, channels, *, dtype, extra=False, device="cpu"):
    """query, the values of all bags, extra_token and a gradient of the context."""
    _, values, *_ = cases.make_inputs(1, 1, max(1, sum(bags)), channels, dtype=dtype, device=device)
    query, _, extra_token, grad = cases.make_inputs(
        len(bags), queries, 1, channels, dtype=dtype, extra=extra, device=device
    )
    return query, values[0, : sum(bags)].detach().requires_grad_(), extra_token, grad


def offsets_of(bags, like, dtype=torch.int64):
    return torch.tensor([0, *bags], device=like.device).cumsum(0).to(dtype)


def nested(values, bags, lengths=None):
    """Bags with room for so many tokens each, of which there are `lengths`."""
    lengths = None if lengths is None else torch.tensor(lengths, device=values.device)
    return torch.nested.nested_tensor_from_jagged(values, offsets_of(bags, values), lengths)


def attend(query, values, extra_token, *, bags, lengths=None, **options):
    return single_query_attention(query, nested(values, bags, lengths), extra_token, **options)


def each_alone(query, values, extra_token, *, bags, lengths=None, **options):
    """By the definition, of one bag at a time."""
    contexts = []
    for i, (bag, length) in enumerate(zip(values.split(bags), bags if lengths is None else lengths, strict=True)):
        if length == 0 and extra_token is None:
            contexts.append(0 * query[i : i + 1] + 0 * bag.sum())
        else:
            extra = None if extra_token is None else extra_token[i : i + 1]
            contexts.append(reference.single_query_attention(query[i : i + 1], bag[None, :length], extra, **options))
    return torch.cat(contexts)


def check_bags(function, inputs, **options):
    actual = with_gradients(function, inputs, **options)
    unfused, exact = (
        with_gradients(each_alone, inputs, **options),
        with_gradients(each_alone, in_float64(inputs), **options),
    )
    names = [n for n, t in zip(("context", "query", "values", "extra_token"), (1, *inputs[:3])) if t is not None]
    for name, *tensors in zip(names, actual, unfused, exact, strict=True):
        assert_parity(*tensors, name=name, summands=max(inputs[1].shape))


def check(inputs, backend, **options):
    with assert_runs(*kernels_of(backend)):
        check_bags(attend, inputs, **options)


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_each_bag_is_as_if_alone(device, backend, dtype, option):
    inputs = make_inputs(BAGS, 3, 24, dtype=dtype, extra=option["extra"], device=device)
    check(inputs, backend, bags=BAGS, normalize=option["normalize"])


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_what_lies_between_has_no_part(device, backend, option):
    lengths = [2, 0, 16, 0, 39]
    inputs = make_inputs(BAGS, 3, 16, dtype=torch.float32, extra=option["extra"], device=device)
    options = dict(bags=BAGS, lengths=lengths, normalize=option["normalize"])
    check(inputs, backend, **options)
    query, values, *rest = inputs
    poisoned = values.detach().clone()
    for bag, length in zip(poisoned.split(BAGS), lengths):
        bag[length:] = torch.nan
    clean = with_gradients(attend, inputs, **options)
    other = with_gradients(attend, (query, poisoned.requires_grad_(), *rest), **options)
    assert all(torch.equal(a, b) for a, b in zip(clean, other, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("bags", [[900, 3, 0], [0, 0, 900], [1, 900, 130, 130, 0], [0], [0, 0], [700]], ids=str)
@pytest.mark.parametrize("extra", [False, True])
def test_long_bags_in_parts_beside_short_ones(device, backend, bags, extra):
    inputs = make_inputs(bags, 2, 16, dtype=torch.float32, extra=extra, device=device)
    check(inputs, backend, bags=bags, normalize=True)


@pytest.mark.parametrize("backend", ["triton"])
@without_triton
def test_queries_in_several_blocks(device, backend):
    from tokenfusion.kernels.single_query_attention import triton_host

    assert triton_host._query_block(20, 264) == 16
    bags = [3, 0, 17]
    inputs = make_inputs(bags, 20, 264, dtype=torch.float32, extra=True, device=device)
    check(inputs, backend, bags=bags, lengths=[3, 0, 9], normalize=True)


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(device, backend, threads, set_threads):
    set_threads(threads)
    bags = [5, 3000, 0, 200, 1025, 2048, 0]
    inputs = make_inputs(bags, 3, 8, dtype=torch.float32, extra=True)
    check(inputs, backend, bags=bags, lengths=[5, 2500, 0, 0, 1025, 1, 0], normalize=True)


@pytest.mark.parametrize("backend", ["cpu"])
def test_as_padded_bags_bit_for_bit(device, backend):
    inputs = make_inputs(BAGS, 3, 24, dtype=torch.float32, extra=True)
    query, values, extra_token, _ = inputs
    got = attend(query, values, extra_token, bags=BAGS, normalize=True)
    padded = torch.nested.to_padded_tensor(nested(values, BAGS), float("nan"))
    want = single_query_attention(query, padded, extra_token, lengths=torch.tensor(BAGS), normalize=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_narrowed_tokens_are_read_in_place(device, backend):
    query, tokens, _, grad = cases.make_inputs(3, 2, 60, 16, dtype=torch.float32, device=device)
    start, length = (torch.tensor(each, device=device) for each in ([5, 60, 0], [50, 0, 60]))

    def narrowed(query, tokens):
        jagged = torch.nested.narrow(tokens, 1, start, length, layout=torch.jagged)
        return single_query_attention(query, jagged, normalize=True)

    def alone(query, tokens):
        bags = [tokens[i : i + 1, s : s + n] for i, (s, n) in enumerate(zip(start.tolist(), length.tolist()))]
        contexts = [
            reference.single_query_attention(query[i : i + 1], bag, normalize=True) if bag.shape[1] else 0 * query[:1]
            for i, bag in enumerate(bags)
        ]
        return torch.cat(contexts)

    inputs = query, tokens, grad
    with assert_runs(*kernels_of(backend)):
        got = with_gradients(narrowed, inputs)
    for name, *each in zip(
        ("context", "query", "tokens"), got, with_gradients(alone, inputs), with_gradients(alone, in_float64(inputs))
    ):
        assert_parity(*each, name=name, summands=60)


@pytest.mark.parametrize("backend", KERNELS)
def test_rows_of_any_stride(device, backend):
    query, values, _, grad = make_inputs(BAGS, 2, 16, dtype=torch.float32, device=device)
    wide = torch.full((values.shape[0] + 2, 24), torch.nan, device=device)
    wide[1:-1, 8:] = values.detach()
    results = [
        with_gradients(attend, (query, each, None, grad), bags=BAGS)
        for each in (values, wide[1:-1, 8:].detach().requires_grad_())
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_leaf_that_is_nested_gets_a_nested_gradient(device, backend):
    query, values, _, grad = make_inputs(BAGS, 2, 16, dtype=torch.float32, device=device)
    leaf = nested(values.detach(), BAGS).detach().requires_grad_()
    single_query_attention(query, leaf).backward(grad)
    _, _, want = with_gradients(attend, (query, values, None, grad), bags=BAGS)
    assert torch.equal(leaf.grad.values(), want)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_opcheck(device, backend, dtype):
    """Traced for one dtype of offsets: a graph is the same for both."""
    checks = {} if dtype == torch.int64 else {"test_utils": ("test_schema", "test_faketensor")}
    query, values, extra_token, grad = make_inputs(BAGS, 2, 16, dtype=torch.float32, extra=True, device=device)
    tokens = values.detach()[None].requires_grad_()
    offsets, lengths = offsets_of(BAGS, values, dtype), torch.tensor([1, 0, 17, 0, 39], dtype=dtype, device=device)
    operators = torch.ops.tokenfusion
    op = getattr(operators, f"single_query_attention_{backend}")
    torch.library.opcheck(op, (query, tokens, extra_token, lengths, offsets, True, 1e-6), **checks)
    context, lse = op(query, tokens, extra_token, lengths, offsets, True, 1e-6)
    arguments = grad, query, tokens, extra_token, lengths, offsets, context.detach(), lse, True, 1e-6, [True] * 3
    torch.library.opcheck(getattr(operators, f"single_query_attention_backward_{backend}"), arguments, **checks)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("extra", [False, True])
def test_gradcheck_and_second_order(device, backend, extra):
    """The second of the operator itself: PyTorch's nested tensors are differentiable once."""
    bags, lengths = [2, 0, 2], torch.tensor([1, 0, 2])
    inputs = make_inputs(bags, 2, 8, dtype=torch.float64, extra=extra)[:3]
    offsets = offsets_of(bags, lengths)

    def operator(query, values, extra_token):
        operands = query, values.unsqueeze(0), extra_token, lengths, offsets
        return OPERATOR.select(*operands).run(*operands, True, 1e-6)

    assert torch.autograd.gradcheck(functools.partial(attend, bags=bags, lengths=[1, 0, 2], normalize=True), inputs)
    assert torch.autograd.gradgradcheck(operator, inputs)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 1}, {1, 2}], ids=str)
def test_frozen_inputs(device, backend, frozen):
    inputs = make_inputs(BAGS, 2, 16, dtype=torch.float32, extra=True, device=device)
    full = with_gradients(attend, inputs, bags=BAGS, normalize=True)[1:]
    partly = tuple(t.detach() if i in frozen else t for i, t in enumerate(inputs))
    got = with_gradients(attend, partly, bags=BAGS, normalize=True)[1:]
    want = [grad for i, grad in enumerate(full) if i not in frozen]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["cpu"])
def test_fifty_calls_are_bit_equal(device, backend):
    inputs = make_inputs([900, 3, 0, 130], 2, 16, dtype=torch.float32, extra=True)
    check_repeats(functools.partial(attend, bags=[900, 3, 0, 130], normalize=True), inputs)


@pytest.mark.parametrize("backend", ["cpu"])
def test_nothing_of_the_size_of_the_tokens_is_allocated(device, backend):
    bags = [8000, 10, 0, 100]
    query, values, _, grad = make_inputs(bags, 2, 64, dtype=torch.float32)
    values = values.detach()
    peak = peak_extra_bytes(lambda: torch.autograd.grad(attend(query, values, None, bags=bags), query, grad))
    assert peak < 0.05 * values.nbytes


@pytest.mark.parametrize("backend", ["triton"])
@without_triton
def test_a_gpu_reads_nothing_outside(device, backend):
    query, values, _, grad = (
        t if t is None else t.detach() for t in make_inputs(BAGS, 2, 16, dtype=torch.float32, device=device)
    )
    outside, inside = (
        torch.tensor(each, device=device) for each in ([-5, 3, 2, 20, 2**40, 2**41], [0, 3, 3, 20, 61, 61])
    )
    op = torch.ops.tokenfusion.single_query_attention_triton
    lengths = torch.tensor([99, -1, 99, 99, 99], device=device)
    got = op(query, values[None], None, lengths, outside, False, 1e-6)
    want = op(query, values[None], None, None, torch.tensor([0, 3, 3, 20, 61, 61], device=device), False, 1e-6)
    assert all(torch.equal(a[[0, 3, 4]], b[[0, 3, 4]]) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("lengths", [None, [2, 0, 16, 0, 40]], ids=str)
def test_compiles_without_graph_breaks(backend, lengths):
    inputs = make_inputs(BAGS, 3, 16, dtype=torch.float32, extra=True)
    offsets = offsets_of(BAGS, inputs[1])
    lengths = None if lengths is None else torch.tensor(lengths)

    def function(query, values, extra_token):
        tokens = torch.nested.nested_tensor_from_jagged(values, offsets, lengths)
        return single_query_attention(query, tokens, extra_token, normalize=True)

    torch.compiler.reset()
    with assert_runs(*kernels_of("cpu")):
        got = with_gradients(torch.compile(function, fullgraph=True, backend=backend), inputs)
    for a, b in zip(got, with_gradients(function, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_where_nested_tokens_come_in(backend):
    query, values, extra_token, grad = make_inputs(BAGS, 3, 16, dtype=torch.float32, extra=True)
    torch.compiler.reset()
    compiled = torch.compile(single_query_attention, fullgraph=True, backend=backend)
    results = []
    for function in (compiled, single_query_attention):
        tokens = nested(values.detach(), BAGS).detach().requires_grad_()
        context = function(query, tokens, extra_token, normalize=True)
        results.append([context, *torch.autograd.grad(context, (query, extra_token), grad, retain_graph=True)])
        context.backward(grad)
        results[-1].append(tokens.grad.values())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def jagged(offsets, lengths=None, values=(5, 16)):
    lengths = None if lengths is None else torch.tensor(lengths)
    return torch.nested.nested_tensor_from_jagged(torch.randn(values), torch.tensor(offsets), lengths)


@pytest.mark.parametrize(
    "tokens, error, parts",
    [
        (lambda: jagged([0, 3, 6]), ValueError, ["tokens: got offsets [0, 3, 6]", "at most 5"]),
        (lambda: jagged([-1, 3, 5]), ValueError, ["tokens: got offsets [-1, 3, 5]", "0"]),
        (lambda: jagged([4, 3, 5]), ValueError, ["tokens: got offsets [4, 3, 5]", "grow"]),
        (lambda: jagged([0, 3, 5], [3, 3]), ValueError, ["tokens: got a length of 3 from 3 on", "0 to 2"]),
        (lambda: jagged([0, 3, 5], [-1, 2]), ValueError, ["tokens: got a length of -1 from 0 on", "0 to 3"]),
        (lambda: jagged([0.0, 3.0, 5.0]), TypeError, ["tokens: got offsets of dtype torch.float32", "int64"]),
        (lambda: jagged([0, 3, 5], [1.0, 2.0]), TypeError, ["tokens: got lengths of dtype torch.float32"]),
        (lambda: jagged([0, 1, 3, 5]), ValueError, ["query: got shape [2, 3, 16]", "[3, Q, 16]", "3 bags of C = 16"]),
        (lambda: jagged([0, 3, 5], values=(5, 24)), ValueError, ["query", "[2, Q, 24]"]),
        (lambda: jagged([0, 3, 5], values=(5, 2, 16)), ValueError, ["tokens: got a nested tensor of shape", "jagged"]),
        (lambda: jagged([0, 3, 5]).transpose(1, 2), ValueError, ["tokens: got a nested tensor of shape", "jagged"]),
        (lambda: jagged([0, 3, 5]).double(), TypeError, ["query", "float32", "float64"]),
        (lambda: torch.nested.nested_tensor([torch.randn(3, 16)] * 2), TypeError, ["torch.strided", "torch.jagged"]),
    ],
)  # fmt: skip
def test_bad_input_says_what_is_wrong(tokens, error, parts):
    with pytest.raises(error) as caught:
        single_query_attention(torch.randn(2, 3, 16), tokens())
    for part in parts:
        assert part in str(caught.value)


def test_nested_tokens_have_their_own_lengths():
    with pytest.raises(ValueError, match="lengths: got some beside nested tokens"):
        single_query_attention(torch.randn(2, 3, 16), jagged([0, 3, 5]), lengths=torch.tensor([1, 2]))


def test_meta_tensors_give_shapes():
    with torch.device("meta"):
        tokens = torch.nested.nested_tensor_from_jagged(torch.empty(5, 16), torch.empty(3, dtype=torch.int64))
        context = single_query_attention(torch.empty(2, 3, 16), tokens)
    assert context.shape == (2, 3, 16)


@pytest.mark.parametrize("extra", [False, True])
def test_operations_count_as_those_of_padded_bags_of_one_size(extra):
    query, values, extra_token, _ = make_inputs([4] * 3, 2, 16, dtype=torch.float32, extra=extra)
    counted = []
    for tokens in (nested(values, [4] * 3), values.unflatten(0, (3, 4))):
        with FlopCounterMode(display=False) as counter:
            single_query_attention(query, tokens, extra_token).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
