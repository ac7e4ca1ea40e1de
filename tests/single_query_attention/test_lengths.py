"""Bags of different lengths in one padded batch: each as if it were alone, whatever lies beyond its length."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gradients import check_frozen, in_float64, with_gradients
from tests.parity import assert_parity, assert_runs
from tests.single_query_attention import cases
from tests.single_query_attention.cases import BACKENDS_AND_DTYPES, KERNELS, OPTIONS, kernels_of, without_triton
from tokenfusion.kernels import single_query_attention
from tokenfusion.kernels.single_query_attention import reference


def each_alone(inputs, lengths, **options):
    """The context and gradients by the definition, of one bag at a time without padding."""
    query, tokens, extra_token, grad = inputs
    whole = [torch.zeros_like(t) for t in (grad, query, tokens, extra_token) if t is not None]
    for i, length in enumerate(lengths):
        if length == 0 and extra_token is None:
            continue
        bag = [None if t is None else t[i : i + 1].detach().requires_grad_() for t in (query, tokens, extra_token)]
        bag[1] = tokens[i : i + 1, :length].detach().requires_grad_()
        for out, part in zip(
            whole, with_gradients(reference.single_query_attention, (*bag, grad[i : i + 1]), **options)
        ):
            (out[i, :length] if out.shape == tokens.shape else out[i]).copy_(part[0])
    return whole


def check_bags(function, inputs, lengths, **options):
    given = torch.tensor(lengths, dtype=torch.int32 if len(lengths) % 2 else torch.int64, device=inputs[1].device)
    actual = with_gradients(function, inputs, lengths=given, **options)
    unfused, exact = each_alone(inputs, lengths, **options), each_alone(in_float64(inputs), lengths, **options)
    names = [n for n, t in zip(("context", "query", "tokens", "extra_token"), (1, *inputs[:3])) if t is not None]
    for name, *tensors in zip(names, actual, unfused, exact, strict=True):
        assert_parity(*tensors, name=name, summands=max(inputs[1].shape[1:]))
    for i, length in enumerate(lengths):
        assert not actual[2][i, length:].any()


def check(inputs, lengths, backend, **options):
    with assert_runs(*kernels_of(backend)):
        check_bags(single_query_attention, inputs, lengths, **options)


@pytest.mark.parametrize("backend, dtype", BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_each_bag_is_as_if_alone(device, backend, dtype, option):
    inputs = cases.make_inputs(6, 3, 70, 24, dtype=dtype, extra=option["extra"], device=device)
    check(inputs, [0, 1, 16, 17, 69, 70], backend, normalize=option["normalize"])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("lengths", [[900, 3, 0], [0, 0, 900], [1, 900, 130, 130, 0]], ids=str)
def test_long_bags_in_parts_beside_short_ones(device, backend, lengths):
    inputs = cases.make_inputs(len(lengths), 2, 900, 16, dtype=torch.float32, device=device)
    check(inputs, lengths, backend, normalize=True)


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(device, backend, threads, set_threads):
    set_threads(threads)
    inputs = cases.make_inputs(7, 3, 3000, 8, dtype=torch.float32, extra=True)
    check(inputs, [5, 3000, 0, 200, 1025, 2048, 0], backend, normalize=True)


@pytest.mark.parametrize("backend", ["cpu"])
def test_full_bags_are_as_without_lengths(device, backend):
    inputs = cases.make_inputs(3, 4, 1500, 16, dtype=torch.float32, extra=True)
    got = with_gradients(single_query_attention, inputs, lengths=torch.full((3,), 1500), normalize=True)
    want = with_gradients(single_query_attention, inputs, normalize=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_what_lies_beyond_has_no_part(device, backend, option):
    query, tokens, extra_token, grad = cases.make_inputs(
        4, 3, 200, 16, dtype=torch.float32, extra=option["extra"], device=device
    )
    lengths = torch.tensor([150, 0, 200, 1], device=device)
    results = []
    for padding in (0.0, torch.nan, torch.inf):
        padded = tokens.detach().clone()
        for i, length in enumerate(lengths.tolist()):
            padded[i, length:] = padding
        inputs = query, padded.requires_grad_(), extra_token, grad
        results.append(with_gradients(single_query_attention, inputs, lengths=lengths, normalize=option["normalize"]))
    clean, *others = results
    assert all(result.isfinite().all() for result in clean)
    assert all(torch.equal(a, b) for other in others for a, b in zip(clean, other, strict=True))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nan_within_a_bag_stays_there(device, backend):
    query, tokens, _, grad = cases.make_inputs(3, 2, 40, 16, dtype=torch.float32, device=device)
    lengths = torch.tensor([10, 30, 0], device=device)
    clean = with_gradients(single_query_attention, (query, tokens, None, grad), lengths=lengths, normalize=True)
    poisoned = query.detach().clone()
    poisoned[0, 1, 3] = torch.nan
    inputs = poisoned.requires_grad_(), tokens, None, grad
    got = with_gradients(single_query_attention, inputs, lengths=lengths, normalize=True)
    assert got[0][0].isnan().any()
    assert not got[2][0, 10:].any()
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(clean, got, strict=True))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("tokens", [5, 900])
def test_a_bag_of_nothing_is_zero(device, backend, tokens):
    inputs = cases.make_inputs(2, 3, tokens, 16, dtype=torch.float32, device=device)
    lengths = torch.zeros(2, dtype=torch.int64, device=device)
    with torch.autograd.detect_anomaly(check_nan=True):
        results = with_gradients(single_query_attention, inputs, lengths=lengths, normalize=True)
    assert not any(result.any() for result in results)


@pytest.mark.parametrize("backend", KERNELS)
def test_log_sum_exp(device, backend):
    query, tokens, *_ = (
        t if t is None else t.detach() for t in cases.make_inputs(3, 2, 300, 16, dtype=torch.float32, device=device)
    )
    lengths = torch.tensor([0, 7, 300], device=device)
    op = getattr(torch.ops.tokenfusion, f"single_query_attention_{backend}")
    _, lse = op(query, tokens, None, lengths, None, False, 1e-6)
    want = [(q @ t[:n].mT).logsumexp(-1) for q, t, n in zip(query, tokens, lengths)]
    torch.testing.assert_close(lse, torch.stack(want))
    assert lse[0].isneginf().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(device, backend):
    query, tokens, extra_token, grad = cases.make_inputs(3, 2, 5, 16, dtype=torch.float32, extra=True, device=device)
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    operators = torch.ops.tokenfusion
    op = getattr(operators, f"single_query_attention_{backend}")
    torch.library.opcheck(op, (query, tokens, extra_token, lengths, None, True, 1e-6))
    context, lse = op(query, tokens, extra_token, lengths, None, True, 1e-6)
    arguments = grad, query, tokens, extra_token, lengths, None, context.detach(), lse, True, 1e-6, [True] * 3
    torch.library.opcheck(getattr(operators, f"single_query_attention_backward_{backend}"), arguments)


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("extra", [False, True])
def test_gradcheck_and_second_order(device, backend, extra):
    inputs = cases.make_inputs(3, 2, 4, 8, dtype=torch.float64, extra=extra)[:3]
    lengths = torch.tensor([0, 2, 4])
    function = functools.partial(single_query_attention, lengths=lengths, normalize=True)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_frozen_inputs(device, backend):
    inputs = cases.make_inputs(3, 2, 200, 16, dtype=torch.float32, extra=True, device=device)
    lengths = torch.tensor([0, 20, 170], device=device)
    check_frozen(single_query_attention, inputs, {0}, {1}, {2}, {0, 1}, {1, 2}, lengths=lengths, normalize=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_lengths_of_any_stride(device, backend):
    inputs = cases.make_inputs(3, 2, 40, 16, dtype=torch.float32, device=device)
    lengths = torch.tensor([10, 40, 0], device=device)
    stepped = torch.stack((lengths, lengths + 99), dim=1)[:, 0]
    got, want = (with_gradients(single_query_attention, inputs, lengths=each) for each in (stepped, lengths))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["triton"])
@without_triton
def test_a_gpu_takes_what_is_outside_for_the_nearest_length(device, backend):
    query, tokens, *_ = (
        t if t is None else t.detach() for t in cases.make_inputs(2, 2, 40, 16, dtype=torch.float32, device=device)
    )
    outside, nearest = (torch.tensor(lengths, device=device) for lengths in ([-3, 2**40], [0, 40]))
    op = torch.ops.tokenfusion.single_query_attention_triton
    got, want = (op(query, tokens, None, lengths, None, False, 1e-6) for lengths in (outside, nearest))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("extra", [False, True])
def test_the_definition_takes_what_is_outside_for_the_nearest_length(extra):
    query, tokens, extra_token, _ = cases.make_inputs(2, 2, 4, 8, dtype=torch.float32, extra=extra)
    got, want = (
        reference.single_query_attention(query, tokens, extra_token, lengths=torch.tensor(lengths))
        for lengths in ([-3, 99], [0, 4])
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend):
    inputs = cases.make_inputs(3, 2, 20, 16, dtype=torch.float32, extra=True)
    lengths = torch.tensor([3, 0, 20])
    torch.compiler.reset()
    compiled = torch.compile(single_query_attention, fullgraph=True, backend=backend)
    with assert_runs(*kernels_of("cpu")):
        got = with_gradients(compiled, inputs, lengths=lengths, normalize=True)
    want = with_gradients(single_query_attention, inputs, lengths=lengths, normalize=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="lengths: got 21, expected 0 to N = 20"):
        compiled(*inputs[:3], lengths=torch.tensor([3, 0, 21]))


def test_batched_by_vmap():
    inputs = [torch.stack((t, 2 * t)).detach() for t in cases.make_inputs(3, 2, 5, 8, dtype=torch.float64, extra=True)]
    lengths = torch.tensor([[0, 5, 2], [1, 4, 0]])

    def attend(query, tokens, extra_token, lengths):
        return single_query_attention(query, tokens, extra_token, lengths=lengths, normalize=True)

    got = torch.vmap(attend)(*inputs[:3], lengths)
    want = torch.stack([attend(*one) for one in zip(*inputs[:3], lengths, strict=True)])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_values_there_are_shapes(device):
    with FakeTensorMode() if device == "cpu" else torch.device("meta"):
        lengths = torch.zeros(2, dtype=torch.int64)
        context = single_query_attention(torch.empty(2, 3, 16), torch.empty(2, 5, 16), lengths=lengths)
    assert context.shape == (2, 3, 16)


def test_export_takes_lengths():
    class Module(torch.nn.Module):
        def forward(self, query, tokens, lengths):
            return single_query_attention(query, tokens, lengths=lengths, normalize=True)

    inputs = torch.randn(3, 2, 16), torch.randn(3, 5, 16), torch.tensor([0, 2, 5])
    program = torch.export.export(Module(), inputs)
    other = *inputs[:2], torch.tensor([5, 1, 0])
    torch.testing.assert_close(program.module()(*other), Module()(*other))
