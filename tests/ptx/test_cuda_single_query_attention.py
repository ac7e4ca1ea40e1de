"""The CUDA kernels of single_query_attention as nvcc compiles them, launched by their own host, against PyTorch."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.gradients import check_frozen, with_gradients
from tests.parity import assert_parity
from tests.ptx.gpu import Gpu, Launch
from tests.ptx.observe import Observer
from tests.ptx.schedule import Order
from tests.ptx.sources import MARKS, check_same_code, program
from tests.sass import ELEMENTS
from tests.single_query_attention import test_lengths as padded
from tests.single_query_attention import test_packed as packed
from tests.single_query_attention.cases import check_parity, make_inputs
from tokenfusion.kernels.single_query_attention import reference

pytestmark = MARKS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHARED_BYTES = (99 * 1024, 163 * 1024, 227 * 1024)  # of a block: compute capability 8.6, 8.0, 9.0
SCHEDULES = [dict(late=late, order=order) for late in (True, False) for order in (Order.ROUND_ROBIN, 1)]


def gpu(**device) -> Gpu:
    return Gpu("single_query_attention", **device)


def attend(query, tokens, extra_token=None, *, lengths=None, offsets=None, normalize=False, eps=1e-6):
    operands = query, tokens, extra_token, lengths, offsets
    return torch.ops.tokenfusion.single_query_attention_cuda(*operands, normalize, eps)[0]


def attend_packed(query, values, extra_token, *, bags, lengths=None, **options):
    offsets = packed.offsets_of(bags, values, torch.int32 if len(bags) % 2 else torch.int64)
    lengths = None if lengths is None else torch.tensor(lengths)
    return attend(query, values[None], extra_token, lengths=lengths, offsets=offsets, **options)


@dataclass(frozen=True)
class Case:
    """A call and the GPU that it is for, of which the host makes the plan."""

    queries: int
    tokens: int
    channels: int
    kilobytes: int = 227
    multiprocessors: int = 1
    extra: bool = True
    normalize: bool = True

    def gpu(self, **options) -> Gpu:
        return gpu(shared_bytes=self.kilobytes * 1024, multiprocessors=self.multiprocessors, **options)

    def inputs(self, dtype: torch.dtype):
        return make_inputs(1, self.queries, self.tokens, self.channels, dtype=dtype, extra=self.extra)


HALF = [
    Case(3, 15, 16),
    Case(8, 700, 16, extra=False),
    Case(6, 13, 192),
    Case(5, 150, 192, normalize=False),
    Case(1, 16, 208, extra=False),
    Case(7, 60, 208, 99),
    Case(2, 11, 384),
    Case(4, 100, 384),
    Case(16, 16, 16, 99, extra=False),
    Case(9, 44, 16, normalize=False),
    Case(12, 15, 128, 99),
    Case(11, 44, 128, 99, extra=False),
    Case(10, 14, 208),
    Case(13, 60, 272, 99),
    Case(15, 16, 256, extra=False),
    Case(14, 32, 256, 163, normalize=False, extra=False),
    Case(12, 31, 768, 163),
    Case(32, 11, 16, 99, normalize=False),
    Case(17, 124, 16),
    Case(20, 15, 96, 99, extra=False),
    Case(31, 44, 96, 99),
    Case(18, 12, 144, 99),
    Case(24, 50, 144, 163),
    Case(25, 16, 192, 99, extra=False),
    Case(19, 31, 192, 163),
    Case(30, 44, 144, 99, normalize=False),
    Case(3, 31, 128, 99),
    Case(40, 20, 64),
    Case(70, 37, 80, 99, normalize=False, extra=False),
    Case(20, 21, 400, 99),
    Case(32, 50, 768),
    Case(33, 35, 1040, 163, extra=False),
    Case(5, 18, 2320, 163),
    Case(6, 17, 2320, 163, extra=False),
]
FLOAT = [
    Case(3, 15, 16, 99),
    Case(6, 500, 16, extra=False),
    Case(1, 12, 96, 163),
    Case(8, 60, 96, normalize=False),
    Case(7, 11, 208, 99),
    Case(4, 44, 208, 99, extra=False),
    Case(5, 16, 192, extra=False),
    Case(2, 30, 192),
    Case(9, 16, 16, 99, extra=False),
    Case(16, 76, 16, normalize=False),
    Case(12, 12, 128),
    Case(11, 44, 128, 99),
    Case(10, 13, 208, 99),
    Case(13, 60, 144, 99, extra=False),
    Case(15, 9, 64, 99, normalize=False),
    Case(14, 31, 64, 163),
    Case(12, 31, 256),
    Case(32, 12, 16, 99),
    Case(17, 76, 16, normalize=False),
    Case(20, 13, 64, 99, extra=False),
    Case(31, 44, 64, 99),
    Case(18, 12, 80, 99),
    Case(21, 20, 80, 99),
    Case(25, 11, 128, 99, normalize=False),
    Case(19, 31, 128, 163),
    Case(35, 15, 64),
    Case(70, 37, 80, 99, normalize=False, extra=False),
    Case(20, 21, 256, 99),
    Case(33, 20, 544, 163, extra=False),
    Case(5, 18, 544, 99),
]
CASES = [
    *((DTYPES[1 + i % 2], case) for i, case in enumerate(HALF)),
    *((torch.float32, case) for case in FLOAT),
    *((dtype, Case(5, 200, 80, multiprocessors=2)) for dtype in DTYPES),  # three blocks share an image
    *((dtype, Case(2, 40, 1536 if dtype.itemsize == 2 else 768)) for dtype in DTYPES),
]


def kernel_of(mangled: str) -> str:
    found = re.search(r"\d(combine_)?(forward|backward)_kernelI(.*?)(?:Li(\d)ELb(\d)E)?E", mangled)
    channels = "full" if found[5] == "1" else "any"
    form = "joins splits" if found[1] else f"up to {8 * int(found[4])} queries, {channels} channels"
    return f"{found[2]} {ELEMENTS[found[3]]} {form}"


def plans_of(launches: Iterable[Launch]) -> set[str]:
    """What differs between runs: of each kernel, the groups in a block and the warps in a group."""
    found = set()
    for each in launches:
        kernel = re.sub("b?float16", "16 bits", kernel_of(each.kernel))  # both have the same plans
        if "joins" not in kernel:
            warps, groups = np.frombuffer(each.arguments[1], np.int32, 2)  # of SingleQueryAttentionPlan
            groups, warps = ("one" if count == 1 else "several" for count in (groups, warps))
            parts = "for all channels", "for products of a strip", "for the rest of a strip"
            found.add(f"{kernel}, {groups} groups of {warps} warps, {parts[part_of(each)]}")
    return found


def part_of(launch: Launch) -> int:
    """SingleQueryAttentionParams::part, before a pointer, a number and a pointer at the end."""
    return int(np.frombuffer(launch.arguments[0][-32:], np.int32)[0])


def launch(query: torch.Tensor, tokens: torch.Tensor) -> None:
    """Forward and backward."""
    results = torch.ops.tokenfusion.single_query_attention_cuda(query, tokens, None, None, None, True, 1e-6)
    inputs = results[0], query, tokens, None, None, None, *results
    torch.ops.tokenfusion.single_query_attention_backward_cuda(*inputs, True, 1e-6, [True] * 3)


def possible_plans() -> set[str]:
    """On any GPU, of any call."""
    found = set()
    all_channels = *range(16, 800, 64), *range(64, 800, 64), *range(96, 800, 96), *range(800, 2400, 240)
    for shared_bytes, queries, dtype in itertools.product(SHARED_BYTES, (8, 16, 32), DTYPES[:2]):
        with gpu(shared_bytes=shared_bytes, interpret=False) as device:
            for channels in sorted({*all_channels}):
                for tokens in (16, 32, 64, 112):
                    launch(*(torch.zeros(1, n, channels, dtype=dtype) for n in (queries, tokens)))
        found |= plans_of(device.launches)
    return found


def launches_of_the_cases() -> list[Launch]:
    found = []
    for dtype, case in CASES:
        with case.gpu(interpret=False) as device:
            launch(*(t.detach() for t in case.inputs(dtype)[:2]))
        found += device.launches
    return found


def test_the_cases_reach_every_kernel_and_plan():
    launches = launches_of_the_cases()
    reached, possible = plans_of(launches), possible_plans()
    print(*sorted(possible), sep="\n")
    assert possible <= reached, sorted(possible - reached)
    assert {each.kernel for each in launches} == set(program("single_query_attention").names)


@pytest.mark.parametrize("dtype, case", CASES, ids=str)
def test_every_plan(dtype, case):
    number = CASES.index((dtype, case))
    with case.gpu(**SCHEDULES[number % len(SCHEDULES)], approximate=number % 2 == 1):
        check_parity(attend, case.inputs(dtype), normalize=case.normalize)


@dataclass(frozen=True)
class Form:
    """Whether a block has all queries and channels, or one of several slices and strips on a GPU of little memory."""

    name: str
    queries: int
    kilobytes: int = 227

    def gpu(self, **options) -> Gpu:
        return gpu(shared_bytes=self.kilobytes * 1024, **options)

    def inputs(self, batch: int, tokens: int, dtype: torch.dtype, extra: bool = False):
        return make_inputs(batch, self.queries, tokens, self.channels(dtype), dtype=dtype, extra=extra)

    def channels(self, dtype: torch.dtype) -> int:
        if self is WHOLE:
            return 64
        return 112 if dtype == torch.float32 else 240

    def __str__(self) -> str:
        return self.name


WHOLE = Form("whole", 3)
CUT = Form("two slices in strips", 35, 18)
FORMS = pytest.mark.parametrize("form", [WHOLE, CUT], ids=str)
# `test_slices_and_strips` has all dtypes of the other form, which takes the interpreter long.
DTYPES_AND_FORMS = pytest.mark.parametrize(
    "dtype, form", [*((dtype, WHOLE) for dtype in DTYPES), (torch.bfloat16, CUT)], ids=str
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_and_strips(dtype):
    with CUT.gpu(multiprocessors=0) as device:
        check_parity(attend, CUT.inputs(1, 20, dtype), normalize=True)
    assert [part_of(each) for each in device.launches] == [1, 2] * 3  # backward, those of a slice, then the other's
    assert [each.grid[0] for each in device.launches][0] >= 2 * 4
    with gpu(multiprocessors=0) as device:
        check_parity(attend, CUT.inputs(1, 20, dtype), normalize=True)
    assert [part_of(each) for each in device.launches] == [0] * 3
    assert [each.grid[0] for each in device.launches] == [3, 1, 1]  # forward, slices of 16 at once


@DTYPES_AND_FORMS
@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_any_number_of_tokens(tokens, dtype, form):
    with form.gpu(order=3):
        inputs = form.inputs(2, tokens, dtype, extra=tokens % 2 == 1)
        check_parity(attend, inputs, normalize=True)


@DTYPES_AND_FORMS
@pytest.mark.parametrize("normalize, extra", [(False, False), (True, True)])
def test_bags_in_one_padded_batch(dtype, normalize, extra, form):
    longest = 130 if form is WHOLE else 66  # strips take a minute in the interpreter
    lengths = [0, 1, 16, 17, longest - 1] if form is CUT else [0, 1, 16, 17, 100, longest - 1, longest]
    with form.gpu(multiprocessors=4 if form is WHOLE else 40):  # two blocks share a bag
        inputs = form.inputs(len(lengths), longest, dtype, extra=extra)
        padded.check_bags(attend, inputs, lengths, normalize=normalize)


@DTYPES_AND_FORMS
@pytest.mark.parametrize("normalize, extra", [(False, True), (True, False)])
@pytest.mark.parametrize("bags, lengths", [(packed.BAGS, None), ([0, 0], None), ([30, 0, 300, 2], [30, 0, 296, 0])])
def test_bags_one_after_the_other(dtype, normalize, extra, bags, lengths, form):
    if form is CUT and lengths:
        bags, lengths = [18, 0, 70, 2], [18, 0, 66, 0]
    with form.gpu(multiprocessors=4 if form is WHOLE else 40):
        inputs = packed.make_inputs(bags, form.queries, form.channels(dtype), dtype=dtype, extra=extra)
        packed.check_bags(attend_packed, inputs, bags=bags, lengths=lengths, normalize=normalize)


@FORMS
def test_what_lies_beyond_a_bag_is_not_read(form):
    with form.gpu(multiprocessors=4):
        inputs = form.inputs(3, 80, torch.bfloat16)
        clean = with_gradients(attend, inputs, lengths=torch.tensor([0, 33, 80]), normalize=True)
        poisoned = inputs[1].detach().clone()
        poisoned[0], poisoned[1, 33:] = torch.nan, torch.nan
        inputs = inputs[0], poisoned.requires_grad_(), *inputs[2:]
        got = with_gradients(attend, inputs, lengths=torch.tensor([0, 33, 80]), normalize=True)
    assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_block_fits_wherever_the_host_says_so(dtype):
    for shared_bytes, queries in itertools.product(SHARED_BYTES, (8, 16, 32, 64)):
        with gpu(shared_bytes=shared_bytes, interpret=False) as device:
            for channels in range(16, 4096 + 1, 16):
                launch(*(torch.zeros(1, n, channels, dtype=dtype) for n in (queries, 40)))
                assert all(each.shared_bytes <= shared_bytes for each in device.launches)
                device.launches.clear()


def test_what_no_block_has_room_for_is_refused():
    with gpu(shared_bytes=4096, interpret=False) as device:
        with pytest.raises(ValueError, match="C = 64 for Q = 20, expected a GPU with more than 4096 bytes of shared"):
            launch(*(torch.zeros(1, n, 64, dtype=torch.float16) for n in (20, 40)))
        with pytest.raises(ValueError, match="C = 40, expected a multiple of 16"):
            launch(*(torch.zeros(1, n, 40, dtype=torch.float16) for n in (20, 40)))
    assert not device.launches


@pytest.mark.parametrize(
    "case",
    [Case(6, 149, 144), Case(35, 17, 96, 18)],
    ids=["two blocks of two groups of three warps", "two slices, backward in strips"],
)
def test_results_do_not_depend_on_the_schedule(case):
    results = []
    for schedule in [*SCHEDULES, dict(order=Order.REVERSED)]:
        with case.gpu(**schedule):
            results.append(with_gradients(attend, case.inputs(torch.bfloat16), normalize=True))
    for got in results:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


def test_strided_operands():
    with gpu():
        query, x, extra_token, grad = make_inputs(2, 3, 20, 32, dtype=torch.float16, extra=True)
        guarded = torch.full((4, 24, 64), torch.nan, dtype=x.dtype)
        guarded[1:3, 2:22, 16:48] = x.detach()
        inside = guarded[1:3, 2:22, 16:48]
        every_other = torch.stack((query, query), 2)[:, :, 1].detach().requires_grad_()
        both = torch.cat((extra_token, extra_token), 1)[:, 32:].detach().requires_grad_()
        views = (
            inside[:, 1:],
            inside[:, ::2],
            x.transpose(0, 1).contiguous().transpose(0, 1),
            inside[:, :1].expand(-1, 9, -1),
            inside[:1].expand(2, -1, -1),
        )
        for view in views:
            check_parity(attend, (every_other, view.detach().requires_grad_(), both, grad), normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_at_any_address(dtype):
    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape).copy_(t.detach())

    with gpu():
        query, x, extra_token, grad = make_inputs(2, 3, 20, 32, dtype=dtype, extra=True)
        query, extra_token = moved(query).requires_grad_(), moved(extra_token).requires_grad_()
        check_parity(attend, (query, x, extra_token, moved(grad)), normalize=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_grow_from_tile_to_tile(dtype):
    with gpu(multiprocessors=0):  # by less and by more than the largest score may stay behind
        query, x, _, grad = make_inputs(2, 3, 200, 32, dtype=dtype)
        growth = torch.linspace(0.1, 6, 200)[:, None] * torch.tensor([0.2, 2])[:, None, None]
        x = query.detach()[:, :1] * growth.to(dtype) + x.detach() / 4
        check_parity(attend, (query, x.requires_grad_(), None, grad))


def test_unaligned_rows_are_refused():
    with gpu(interpret=False) as device:
        query, x, *_ = make_inputs(1, 2, 5, 24, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="expected a contiguous innermost dimension and rows aligned to 16 bytes"):
            launch(query[..., 8:], x[..., 4:20])
    assert not device.launches


@FORMS
@pytest.mark.parametrize("splits, tokens", [(1, 16), (2, 128)])
def test_frozen_inputs(splits, tokens, form):
    with form.gpu(multiprocessors=1 if form is WHOLE else 12 * (splits - 1)) as device:
        inputs = form.inputs(1, tokens, torch.bfloat16, extra=True)
        frozen = [{1, 2}] if form is CUT else [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}]
        check_frozen(attend, inputs, *frozen, normalize=True)
    assert any("combine" in each.kernel for each in device.launches) == (splits > 1)


def test_no_elements():
    with gpu() as device:
        for batch, queries in ((0, 3), (2, 0)):
            query, x, extra_token, grad = make_inputs(batch, queries, 5, 16, dtype=torch.float32, extra=True)
            context, *grads = with_gradients(attend, (query, x, extra_token, grad))
            assert context.shape == (batch, queries, 16)
            assert not any(each.any() for each in grads)
    assert not device.launches


def images(inputs, number: slice):
    """Some images of a batch, as a batch of their own."""
    return tuple(None if t is None else t.detach()[number].requires_grad_(t.requires_grad) for t in inputs)


def check_each_image(inputs, **options) -> None:
    """The parity of each, of which one is no measure of another: all run together, and the reference one by one."""
    got = with_gradients(attend, inputs, **options)
    for i in range(len(inputs[0])):
        part = slice(i, i + 1)
        check_parity(_constant([each[part] for each in got]), images(inputs, part), **options)


def _constant(results):
    """A function with this result and these gradients."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            return results[0].clone()

        @staticmethod
        def backward(ctx, grad):
            return tuple(results[1:])

    return lambda *tensors, **_: Function.apply(*tensors)


@DTYPES_AND_FORMS
def test_tokens_of_any_mean_scale_and_spread(dtype, form):
    with form.gpu():
        query, x, extra_token, grad = form.inputs(8, 50, dtype, extra=True)
        x = x.detach()
        for i, (mean, scale) in enumerate([(1000, 1), (0, 100), (0, 0.01), (-300, 30), (0, 1), (0, 1), (0, 8000)]):
            x[i] = x[i] * scale + mean
        x[4, 5:9] = 0
        x[5, 20] = 3
        x[4:6, 7, 0], x[4:6, 11, 63] = 60, -60
        x[6, ::3] = 0  # whose 1 / deviation is 10^7 times the others'
        x[7, 4], x[7, 4, 63] = 40000, -40000  # whose distance to the mean is no float16
        check_each_image((query, x.requires_grad_(), extra_token, grad), normalize=True)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_of_infinite_variance_counts_as_none(dtype, form):
    with form.gpu():
        query, x, extra_token, grad = form.inputs(1, 20, dtype)
        x = x.detach()
        x[0, 4, 5] = 1e20
        results = with_gradients(attend, (query, x.requires_grad_(), extra_token, grad), normalize=True)
    assert all(result.isfinite().all() for result in results)


@DTYPES_AND_FORMS
def test_what_all_tokens_share_does_not_reach_the_gradient_of_the_query(dtype, form):
    with form.gpu():
        query, tokens, extra_token, grad = form.inputs(2, 100, dtype, extra=True)
        moved = ((t.detach() + 30).requires_grad_() for t in (tokens, extra_token))
        check_parity(attend, (query, *moved, grad))


def test_long_sums_keep_their_precision():
    with gpu(multiprocessors=0):  # one block
        check_parity(attend, make_inputs(1, 2, 2048, 16, dtype=torch.float32), normalize=True)


@DTYPES_AND_FORMS
@pytest.mark.parametrize("normalize", [False, True])
def test_nan_and_inf_propagate_as_in_the_reference(normalize, dtype, form):
    values, places = (torch.nan, torch.inf, -torch.inf), ("query", "tokens", "extra_token")
    with form.gpu():
        inputs = form.inputs(9, 20, dtype, extra=True)
        query, x, extra_token, _ = (t.detach() for t in inputs)
        for i, (value, place) in enumerate(itertools.product(values, places)):
            {"query": query[i, 0], "tokens": x[i, 7], "extra_token": extra_token[i]}[place][3] = value
        got = attend(query, x, extra_token, normalize=normalize)
        unfused = reference.single_query_attention(query, x, extra_token, normalize=normalize)
        exact = (t.double() for t in (query, x, extra_token))
        exact = reference.single_query_attention(*exact, normalize=normalize)
    assert torch.equal(got.isnan(), unfused.isnan())
    finite = ~unfused.isnan()
    assert_parity(got[finite], unfused[finite], exact[finite])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_beyond_the_last_token_with_no_eps(dtype):
    """They are of zeros, whose deviation has no inverse."""
    with gpu():
        check_parity(attend, make_inputs(1, 2, 20, 16, dtype=dtype, extra=True), normalize=True, eps=0.0)


def test_large_scores_do_not_overflow():
    with gpu(multiprocessors=4):
        query, x, extra_token, _ = (t.detach() for t in make_inputs(2, 3, 127, 16, dtype=torch.float32, extra=True))
        query[0] *= 1e4
        query[1] *= 1e10
        got, want = attend(query, x, extra_token), reference.single_query_attention(query, x, extra_token)
    torch.testing.assert_close(got, want)


class Copies(Observer):
    """Counts asynchronous copies."""

    count = 0

    def accessed(self, instruction, space, addresses, width, threads):
        if instruction.opcode == "cp" and space == "global":
            self.count += len(threads)


@pytest.mark.parametrize("rows", [20_000_003, 2**32 + 5])
def test_blocks_share_any_number_of_rows(rows):
    copies = Copies()
    splits = -(-rows // 8192)
    chosen = 1, splits - 2, splits - 1
    with gpu(blocks=[(n, 0, 0) for n in chosen], observers=[copies], interpret=lambda name: "combine" not in name):
        query, token = torch.zeros(2, 1, 1, 16, dtype=torch.bfloat16)
        attend(query, token.expand(1, rows, 16))
    tiles = -(-rows // 16)
    ends = [(tiles * n // splits, tiles * (n + 1) // splits) for n in chosen]
    assert copies.count == sum(min(16 * end, rows) - 16 * first for first, end in ends) * 2  # 16 bytes each


def test_elements_beyond_the_range_of_32_bits():
    channels, tokens, far = 16, 20, 2**31 + 128
    with gpu():
        memory = torch.empty(0, dtype=torch.bfloat16)
        memory.untyped_storage().resize_(4 * (far + channels * tokens))  # pages that nobody touches take no memory
        query, values, *_ = (
            t if t is None else t.detach() for t in make_inputs(2, 2, tokens, channels, dtype=torch.bfloat16)
        )
        for n, stride_b, stride_n in ((tokens, far, channels), (tokens, channels, far // 16), (2, channels, far)):
            x = memory.as_strided((2, n, channels), (stride_b, stride_n, 1))
            x.copy_(values[:, :n])
            assert torch.equal(attend(query, x), attend(query, values[:, :n].contiguous()))


@pytest.mark.parametrize("case", [HALF[1], HALF[4], HALF[13], HALF[-2]], ids=str)
def test_kernels_for_compute_capability_80(case):
    with case.gpu(capability=80, order=4):
        check_parity(attend, case.inputs(torch.bfloat16), normalize=case.normalize)


def test_kernels_for_both_capabilities_are_the_same_but_for_a_conversion():
    check_same_code("single_query_attention")
