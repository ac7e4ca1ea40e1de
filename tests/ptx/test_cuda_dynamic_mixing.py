"""The CUDA kernels of dynamic_mixing as nvcc compiles them, launched by their own host, against PyTorch."""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.dynamic_mixing.cases import check_parity, make_inputs
from tests.gradients import check_frozen, with_gradients
from tests.parity import assert_parity
from tests.ptx.gpu import Gpu, Launch
from tests.ptx.schedule import Order
from tests.ptx.sources import MARKS, check_same_code, program
from tests.sass import ELEMENTS
from tokenfusion.kernels.dynamic_mixing import reference

pytestmark = MARKS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHARED_BYTES = (99 * 1024, 163 * 1024, 227 * 1024)  # of a block: compute capability 8.6, 8.0, 9.0
SCHEDULES = [dict(late=late, order=order) for late in (True, False) for order in (Order.ROUND_ROBIN, 1)]


def gpu(**device) -> Gpu:
    return Gpu("dynamic_mixing", **device)


def mix_compressed(x, compressed, generate_weight, generate_bias, *, segments, dim, with_mean=False):
    """mixed, and its mean over H and W."""
    call = x, compressed, generate_weight, generate_bias, segments, dim, with_mean
    return torch.ops.tokenfusion.dynamic_mixing_cuda(*call)


def mix(x, compress_weight, compress_bias, *generate, **options):
    return mix_compressed(x, F.linear(x, compress_weight, compress_bias), *generate, **options)[0]


@dataclass(frozen=True)
class Case:
    """A call and the GPU that it is for, of which the host makes the plan."""

    tokens: int
    channels: int
    segments: int
    reduced: int = 2
    dim: int = 1
    lines: int = 2
    kilobytes: int = 227
    multiprocessors: int = 1

    def gpu(self, **options) -> Gpu:
        return gpu(shared_bytes=self.kilobytes * 1024, multiprocessors=self.multiprocessors, **options)

    @property
    def options(self):
        return dict(segments=self.segments, dim=self.dim)

    def inputs(self, dtype: torch.dtype):
        height, width = (self.tokens, self.lines) if self.dim == 1 else (self.lines, self.tokens)
        return make_inputs(1, height, width, self.channels, reduced=self.reduced, dtype=dtype, **self.options)


# Many segments: the error of a gradient of few elements is a matter of chance.
IN_EVERY_DTYPE = [
    Case(7, 24, 6, dim=2),
    Case(17, 80, 2, multiprocessors=64),
    Case(33, 12, 6, 1, lines=1),
]
IN_ONE_DTYPE = [
    Case(1, 24, 6),
    Case(2, 24, 6, lines=5),
    Case(15, 24, 6, dim=2),
    Case(16, 24, 6, lines=3, multiprocessors=2),  # two blocks share the rows
    Case(32, 24, 6),
    Case(5, 1, 1),
    Case(5, 7, 7, dim=2),
    Case(5, 7, 1),
    Case(5, 40, 1),
    Case(5, 72, 1, dim=2),
    Case(5, 30, 2),
    Case(6, 16, 4, 1),
    Case(6, 16, 4, 3, dim=2),
    Case(6, 16, 4, 8),
    Case(6, 16, 4, 16),
    Case(64, 12, 6, 1, dim=2, lines=1),
]
OF_16_BITS = [
    Case(32, 192, 8),  # the stages of DynaMixer
    Case(16, 384, 16),
    Case(32, 256, 8, 8),
    Case(17, 16, 4, 16, dim=2),  # more inputs than a block takes
    Case(17, 40, 1, 16),
    Case(33, 7, 1, 8, lines=1),
    Case(33, 40, 1, 8, lines=1),
    Case(17, 180, 2, 1, dim=2, kilobytes=99),  # a segment does not fit into shared memory
    Case(48, 102, 1, 1, kilobytes=163, lines=1),
    Case(16, 400, 1, kilobytes=99, lines=1),
    Case(16, 24, 1, 16, kilobytes=99, lines=1),  # the generator does not fit, either
    Case(32, 24, 1, 8, kilobytes=99, lines=1),
    Case(16, 80, 1, 8),
    Case(16, 400, 1, 16, kilobytes=99, lines=1),
    Case(16, 400, 1, 8, lines=1),
    Case(17, 8, 1, 16, kilobytes=99, lines=1),
    Case(17, 184, 1, 16, kilobytes=99, lines=1),
]
OF_32_BITS = [
    Case(17, 192, 2, 1, dim=2, kilobytes=99),
    Case(48, 96, 1, 1, lines=1),
    Case(20, 16, 4, 14, dim=2),
    Case(20, 40, 1, 14),
    Case(40, 7, 1, 7, lines=1),
    Case(40, 33, 1, 7, lines=1),
    Case(16, 400, 1, kilobytes=99, lines=1),
    Case(16, 24, 1, 7, kilobytes=99, lines=1),
    Case(16, 24, 1, 16, lines=1),
    Case(16, 400, 1, 16, lines=1),
    Case(16, 400, 1, 2, lines=1),
]
CASES = [
    *((dtype, case) for dtype in DTYPES for case in IN_EVERY_DTYPE),
    *((DTYPES[i % 3], case) for i, case in enumerate(IN_ONE_DTYPE)),
    *((DTYPES[1 + i % 2], case) for i, case in enumerate(OF_16_BITS)),
    *((torch.float32, case) for case in OF_32_BITS),
]


_KERNEL = re.compile(r"\d(forward|backward|generator)_kernelI(13__nv_bfloat16|6__half|f)(?:Li(\d+)E(?:Lb(\d)E)?)?")


def kernel_of(mangled: str) -> str:
    name, element, tiles, resident = _KERNEL.search(mangled).groups()
    tokens = int(tiles or 0) * (1 if name == "forward" else 16)
    of_tokens = f" up to {tokens} tokens" if tiles else ""
    return f"{name} {ELEMENTS[element]}{of_tokens}" + ", its generator resident" * (resident == "1")


def plans_of(launches: Iterable[Launch]) -> set[str]:
    """What differs between runs of a kernel: how the rows of a tile, channels and inputs are shared and taken up."""
    found = set()
    for each in launches:
        kernel = re.sub("b?float16", "16 bits", kernel_of(each.kernel))  # both have the same plans
        found |= {kernel, *(f"{kernel}, {what}" for what, holds in _differences(kernel, each) if holds)}
    return found


def _differences(kernel: str, launch: Launch) -> Iterator[tuple[str, bool]]:
    if kernel.startswith("forward"):
        width, chunk, _, buffers, resident = np.frombuffer(launch.arguments[1], np.int32, 5)
        yield from (("in chunks", chunk < width), ("copied ahead", buffers == 2))  # of dynamic_mixing::ForwardPlan
        yield from (("with a resident generator", resident > 0), ("with none", resident == 0))
    elif kernel.startswith("backward"):
        plan = np.frombuffer(launch.arguments[1], np.int32, 17)  # of dynamic_mixing::BackwardPlan
        warps, rows, chunks, pairs, at_once = (plan[i] for i in (3, 4, 7, 15, 16))
        yield from (("few rows", rows < 16), ("a row for each warp", rows == warps), ("several rows", rows > warps))
        yield from (("in chunks", chunks > 1), ("inputs in turns", pairs > at_once))


def launch(tokens: int, channels: int, reduced: int, dtype: torch.dtype) -> None:
    """Forward and backward, of one line and one segment."""
    x, compressed = (torch.zeros(1, tokens, 1, size, dtype=dtype) for size in (channels, reduced))
    weight, bias = torch.zeros(tokens**2, tokens * reduced, dtype=dtype), torch.zeros(tokens**2, dtype=dtype)
    torch.ops.tokenfusion.dynamic_mixing_cuda(x, compressed, weight, bias, 1, 1, False)
    torch.ops.tokenfusion.dynamic_mixing_backward_cuda(x, None, x, compressed, weight, bias, 1, 1, [True] * 4)


def possible_plans() -> set[str]:
    """On any GPU, of any call."""
    found = set()
    for shared_bytes, tokens, dtype in itertools.product(SHARED_BYTES[::2], (16, 32, 33, 48), DTYPES[:2]):
        with gpu(shared_bytes=shared_bytes, interpret=False) as device:
            most = device.limit_for(tokens, dtype)
            for channels, reduced in itertools.product((1, 40, 400), {1, 8, most}):
                if 0 < reduced <= most:
                    launch(tokens, channels, reduced, dtype)
        found |= plans_of(device.launches)
    return found


def launches_of_the_cases() -> list[Launch]:
    found = []
    for dtype, case in CASES:
        with case.gpu(interpret=False) as device:
            with_gradients(mix, case.inputs(dtype), **case.options)
        found += device.launches
    return found


def test_the_cases_reach_every_kernel_and_plan():
    launches = launches_of_the_cases()
    reached, possible = plans_of(launches), possible_plans()
    print(*sorted(possible), sep="\n")
    assert possible <= reached, sorted(possible - reached)
    assert {each.kernel for each in launches} == set(program("dynamic_mixing").names)


@pytest.mark.parametrize("dtype, case", CASES, ids=str)
def test_every_plan(dtype, case):
    number = CASES.index((dtype, case))
    with case.gpu(**SCHEDULES[number % len(SCHEDULES)], approximate=number % 2 == 1):
        check_parity(mix, case.inputs(dtype), **case.options)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_block_fits_wherever_the_host_says_so(dtype):
    for shared_bytes, tokens in itertools.product(SHARED_BYTES, (1, 16, 32, 48)):
        with gpu(shared_bytes=shared_bytes, interpret=False) as device:
            most = device.limit_for(tokens, dtype)
            if tokens <= 32 and (dtype != torch.float32 or shared_bytes > SHARED_BYTES[0]):
                assert most >= 8  # those of DynaMixer
            for channels, reduced in itertools.product((1, 32, 512), {1, most}):
                if 0 < reduced <= most:
                    launch(tokens, channels, reduced, dtype)
            if most < 16:
                with pytest.raises(ValueError, match=f"got d = {most + 1}, expected at most {most} for N = {tokens}"):
                    launch(tokens, 24, most + 1, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [18, 48])
def test_mean_and_its_gradients(channels, dtype):
    """For gradients of both mixed and its mean over H and W."""

    def with_mean(function, inputs):
        x, weight, bias, *generate, grad = inputs
        tensors = x, F.linear(x, weight, bias).detach().requires_grad_(), *generate
        outputs = function(*tensors)
        grads = grad, grad[:, 0, 0] * grad.shape[1] * grad.shape[2]
        return tensors[1], [*outputs, *torch.autograd.grad(outputs, tensors, grads)]

    def unfused(*tensors):
        mixed = reference.mix(*tensors, segments=3, dim=2)
        return mixed, mixed.mean(dim=(1, 2))

    with gpu(order=5):
        inputs = make_inputs(2, 4, 18, channels, segments=3, dim=2, dtype=dtype)
        compressed, got = with_mean(lambda *t: mix_compressed(*t, segments=3, dim=2, with_mean=True), inputs)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    exactly = compressed.detach().double().requires_grad_()
    _, want = with_mean(unfused, inputs)
    x, _, _, *generate, grad = doubles
    outputs = unfused(x, exactly, *generate)
    grads = grad, grad[:, 0, 0] * grad.shape[1] * grad.shape[2]
    exact = [*outputs, *torch.autograd.grad(outputs, (x, exactly, *generate), grads)]
    names = ("mixed", "mean", "x", "compressed", "generate_weight", "generate_bias")
    for name, *tensors in zip(names, got, want, exact, strict=True):
        assert_parity(*tensors, name=name)


def test_results_do_not_depend_on_the_schedule():
    case = Case(17, 40, 2, 1, dim=2, lines=9, multiprocessors=18)  # two blocks share the rows
    results = []
    for schedule in [*SCHEDULES, dict(order=Order.REVERSED)]:
        with case.gpu(**schedule):
            results.append(with_gradients(mix, case.inputs(torch.bfloat16), **case.options))
    for got in results:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


@pytest.mark.parametrize("dim", [1, 2])
def test_strided_operands(dim):
    dtype, options = DTYPES[dim], dict(segments=3, dim=dim)
    with gpu():
        x, weight, bias, *generate, grad = make_inputs(2, 5, 6, 24, dtype=dtype, **options)
        compressed = F.linear(x, weight, bias).detach()

        def gradients(x, compressed, grad):
            call = (x, compressed.requires_grad_(), *generate, grad)
            return with_gradients(lambda *t, **o: mix_compressed(*t, **o)[0], call, **options)

        def between_guards(tensor, first):
            guarded = torch.full((4, 9, 10, 48), torch.nan, dtype=dtype)
            return guarded[1:3, 2:7, 2:8, first : first + tensor.shape[3]].copy_(tensor.detach()).requires_grad_()

        want = gradients(x, compressed, grad)
        for first in (8, 5):  # rows aligned to 16 bytes, and not
            columns = torch.full((2, 6, 5, 32), torch.nan, dtype=dtype)[..., 8:].transpose(1, 2)
            got = gradients(between_guards(x, first), between_guards(compressed, first), columns.copy_(grad))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_frozen_inputs_and_weights():
    with gpu():
        inputs = make_inputs(1, 2, 5, 16, segments=2, dim=2, dtype=torch.bfloat16)
        frozen = [set(range(5)) - trained for trained in ({0}, {1, 2}, {3}, {4})]
        check_frozen(mix, inputs, *frozen, segments=2, dim=2)


def test_no_elements():
    with gpu() as device:
        inputs = make_inputs(0, 3, 5, 16, segments=2, dim=2)
        mixed, *grads = with_gradients(mix, inputs, segments=2, dim=2)
        assert mixed.shape == (0, 3, 5, 16)
        assert not any(each.any() for each in grads)
    assert not device.launches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", range(5))
def test_nan_and_inf_propagate_as_in_the_reference(where, dtype):
    """In x, each value in an image of its own; in the weights, one value a call."""
    values = (torch.nan, torch.inf, -torch.inf)
    with gpu():
        *tensors, _ = (t.detach() for t in make_inputs(3, 2, 17, 6, segments=2, dim=2, dtype=dtype))
        if where == 0:
            for image, value in zip(tensors[0], values, strict=True):
                image[1, 3, 4] = value
        else:
            tensors[where].view(-1)[3] = values[(where + DTYPES.index(dtype)) % 3]
        got = mix(*tensors, segments=2, dim=2)
        unfused = reference.dynamic_mixing(*tensors, segments=2, dim=2)
        exact = reference.dynamic_mixing(*(t.double() for t in tensors), segments=2, dim=2)
    assert torch.equal(got.isnan(), unfused.isnan())
    finite = unfused.isfinite()
    assert_parity(got[finite], unfused[finite], exact[finite])


def test_large_logits_do_not_overflow():
    with gpu():
        x, compress_weight, *rest, _ = (t.detach() for t in make_inputs(2, 3, 5, 8, segments=2, dim=2))
        for scale in (1e4, 1e10):
            call = (x, compress_weight * scale, *rest)
            want = reference.dynamic_mixing(*call, segments=2, dim=2)
            torch.testing.assert_close(mix(*call, segments=2, dim=2), want)


def test_elements_beyond_the_range_of_32_bits():
    far = 2**31 + 64
    with gpu():
        memory = torch.empty(0, dtype=torch.bfloat16)
        memory.untyped_storage().resize_((2 * far + 256) * 2)  # pages that nobody touches take no memory
        x, *rest, _ = (t.detach() for t in make_inputs(1, 3, 3, 8, segments=2, dim=2, dtype=torch.bfloat16))
        compressed = F.linear(x, *rest[:2])
        want = mix(x, *rest, segments=2, dim=2)
        for strides in ((far, 24, 8, 1), (24, far, 8, 1), (24, 8, far, 1)):
            view = memory.as_strided((1, 3, 3, 8), strides).copy_(x)
            assert torch.equal(mix_compressed(view, compressed, *rest[2:], segments=2, dim=2)[0], want)


def test_kernels_for_compute_capability_80():
    case = Case(17, 40, 2, dim=2)
    with case.gpu(capability=80, order=4):
        check_parity(mix, case.inputs(torch.bfloat16), **case.options)


def test_kernels_for_both_capabilities_are_the_same_but_for_a_conversion():
    check_same_code("dynamic_mixing")
