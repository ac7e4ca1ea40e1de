"""The CUDA kernels of single_query_attention as nvcc compiles them, launched by their own host, against the reference."""

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
from tests.ptx.schedule import Order
from tests.ptx.sources import MARKS, program
from tests.single_query_attention.cases import check_parity, make_inputs
from tokenfusion.kernels.single_query_attention import reference

pytestmark = MARKS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHARED_BYTES = (99 * 1024, 163 * 1024, 227 * 1024)  # of a block: compute capability 8.6, 8.0, 9.0
SCHEDULES = [
    dict(late=late, order=order) for late in (True, False) for order in (Order.ROUND_ROBIN, Order.REVERSED, 1, 2)
]


def gpu(**device) -> Gpu:
    return Gpu("single_query_attention", **device)


def attend(query, tokens, extra_token=None, *, normalize=False, eps=1e-6):
    return torch.ops.tokenfusion.single_query_attention_cuda(query, tokens, extra_token, None, None, normalize, eps)[0]


@dataclass(frozen=True)
class Case:
    """A call and the GPU that it is for, of which the host makes the plan."""

    queries: int
    tokens: int
    channels: int
    kilobytes: int = 227
    batch: int = 1
    extra: bool = True
    normalize: bool = True

    def gpu(self, **options) -> Gpu:
        return gpu(shared_bytes=self.kilobytes * 1024, **options)

    def inputs(self, dtype: torch.dtype):
        sizes = self.batch, self.queries, self.tokens, self.channels
        return make_inputs(*sizes, dtype=dtype, extra=self.extra)


# The plans: one group of warps and several, each with every number of stages that there is for it.
HALF = [
    Case(6, 44, 656, 99),
    Case(1, 60, 528, 99, normalize=False),
    Case(8, 76, 272, extra=False),
    Case(3, 140, 144),
    Case(9, 44, 464, 99),
    Case(16, 60, 400, 99, normalize=False),
    Case(12, 76, 272, extra=False),
    Case(11, 124, 208, 99),
    Case(10, 156, 144),
    Case(16, 124, 16, 99),
    Case(32, 44, 208, 99),
    Case(17, 76, 80, 99),
    Case(20, 76, 272, 163, normalize=False),
    Case(32, 156, 144),
    Case(31, 44, 16, 99),
    Case(18, 16, 16, 99, extra=False),
    Case(24, 111, 16, 99),
]
FLOAT = [
    Case(6, 44, 400, 99),
    Case(1, 60, 272, 99, normalize=False),
    Case(8, 76, 528, extra=False),
    Case(3, 124, 144),
    Case(7, 156, 80, 99),
    Case(2, 44, 16),
    Case(9, 44, 208, 99),
    Case(16, 60, 528, normalize=False),
    Case(12, 44, 144, 99, extra=False),
    Case(10, 156, 80, 163),
    Case(11, 60, 16),
    Case(13, 44, 16),
    Case(16, 14, 16, 99, extra=False),
    Case(32, 44, 272, 163),
    Case(17, 76, 144, 163, normalize=False),
    Case(20, 16, 208, 227),
    Case(31, 47, 16, 99),
    Case(18, 76, 16, 163, extra=False),
    Case(24, 16, 16, 99),
]
CASES = [
    *((dtype, case) for dtype in (torch.float16, torch.bfloat16) for case in HALF),
    *((torch.float32, case) for case in FLOAT),
]


def forms(launches: Iterable[Launch]) -> set[str]:
    """What differs between launches: the kernel, whether a block has several groups of warps, the stages."""
    found = set()
    for each in launches:
        kernel = re.search(r"(forward|backward)_kernelI(?:f|\d+([a-z_0-9]+))(?:Li(\d)E)?E", each.kernel)
        direction, element, tiles = kernel[1], kernel[2] or "float", kernel[3]
        if tiles is None:
            found.add(f"{direction} {element} combine")
        else:
            _, groups, stages = np.frombuffer(each.arguments[1], np.int32, 3)  # of SingleQueryAttentionPlan
            several = "several groups" if groups > 1 else "one group"
            found.add(f"{direction} {element} {8 * int(tiles)} queries, {several}, {stages} stages")
    return found


def launch(query: torch.Tensor, tokens: torch.Tensor) -> None:
    """Forward and backward."""
    results = torch.ops.tokenfusion.single_query_attention_cuda(query, tokens, None, None, None, True, 1e-6)
    inputs = results[0], query, tokens, None, None, None, *results
    torch.ops.tokenfusion.single_query_attention_backward_cuda(*inputs, True, 1e-6, [True] * 3)


def possible_forms() -> set[tuple]:
    """On any GPU, of any call."""
    found = set()
    for shared_bytes, queries, dtype in itertools.product(SHARED_BYTES, (8, 16, 32), DTYPES):
        with gpu(shared_bytes=shared_bytes, interpret=False) as device:
            for channels in range(16, device.limit_for(queries, dtype) + 1, 64):
                for tokens in (16, 32, 48, 64, 112):
                    launch(*(torch.zeros(1, n, channels, dtype=dtype) for n in (queries, tokens)))
        found |= forms(device.launches)
    return found


def forms_of_the_cases() -> set[tuple]:
    found = set()
    for dtype, case in CASES:
        with case.gpu(interpret=False) as device:
            launch(*(t.detach() for t in case.inputs(dtype)[:2]))
        found |= forms(device.launches)
    return found


def test_the_cases_reach_every_kernel_and_form():
    possible, reached = possible_forms(), forms_of_the_cases()
    print(*sorted(possible), sep="\n")
    assert possible <= reached, sorted(possible - reached)
    kernels = {form.partition(" queries")[0] for form in reached}
    assert len(kernels) == len(program("single_query_attention").names)


@pytest.mark.parametrize("dtype, case", CASES, ids=str)
def test_every_plan(dtype, case):
    number = CASES.index((dtype, case))
    with case.gpu(**SCHEDULES[number % len(SCHEDULES)], approximate=number % 2 == 1) as device:
        check_parity(attend, case.inputs(dtype), normalize=case.normalize)
