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
from tests.sass import ELEMENTS
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
    multiprocessors: int = 1
    extra: bool = True
    normalize: bool = True

    def gpu(self, **options) -> Gpu:
        return gpu(shared_bytes=self.kilobytes * 1024, multiprocessors=self.multiprocessors, **options)

    def inputs(self, dtype: torch.dtype):
        return make_inputs(1, self.queries, self.tokens, self.channels, dtype=dtype, extra=self.extra)


HALF = [
    Case(3, 44, 16, 99),
    Case(1, 76, 272, 99, extra=False),
    Case(8, 60, 592, 99, normalize=False),
    Case(6, 44, 656, 99),
    Case(5, 124, 144, 99),
    Case(9, 44, 16, 99),
    Case(16, 76, 272, 99, normalize=False),
    Case(12, 124, 16, 99, extra=False),
    Case(11, 60, 80, 99),
    Case(10, 60, 400, 99),
    Case(13, 44, 464, 99, extra=False),
    Case(32, 44, 16, 99),
    Case(17, 124, 16, 163, normalize=False),
    Case(20, 44, 208, 99, extra=False),
    Case(31, 76, 272, 163),
    Case(18, 124, 144),
    Case(24, 111, 16, 99),
    Case(25, 16, 16, 99, extra=False),
]
FLOAT = [
    Case(3, 44, 16, 99),
    Case(6, 44, 80, 99, extra=False),
    Case(1, 76, 80, 99),
    Case(8, 60, 272, 99, normalize=False),
    Case(7, 60, 336, 99),
    Case(4, 44, 400, 99, extra=False),
    Case(5, 76, 528),
    Case(9, 44, 16, 99),
    Case(16, 76, 16, 99, normalize=False),
    Case(12, 60, 16, 99, extra=False),
    Case(11, 44, 208, 99),
    Case(10, 60, 272, 99),
    Case(13, 60, 528),
    Case(15, 44, 336, 163, extra=False),
    Case(32, 44, 16, 99),
    Case(17, 76, 16, 163, normalize=False),
    Case(20, 44, 80, 99, extra=False),
    Case(31, 44, 272, 163),
    Case(14, 16, 16, 99, extra=False),
    Case(18, 16, 16, 99, extra=False),
    Case(19, 32, 16, 163, extra=False),
    Case(21, 16, 208, extra=False),
]
CASES = [
    *((DTYPES[1 + i % 2], case) for i, case in enumerate(HALF)),
    *((torch.float32, case) for case in FLOAT),
    *((dtype, Case(5, 200, 80, multiprocessors=2)) for dtype in DTYPES),  # three blocks share an image
]


def kernel_of(mangled: str) -> str:
    found = re.search(r"\d(combine_)?(forward|backward)_kernelI(.*?)(?:Li(\d)E)?E", mangled)
    form = "joins splits" if found[1] else f"up to {8 * int(found[4])} queries"
    return f"{found[2]} {ELEMENTS[found[3]]} {form}"


def plans_of(launches: Iterable[Launch]) -> set[str]:
    """What differs between runs of a kernel: whether a block has several groups of warps, and the stages."""
    found = set()
    for each in launches:
        kernel = re.sub("b?float16", "16 bits", kernel_of(each.kernel))  # both have the same plans
        if "joins" not in kernel:
            _, groups, stages = np.frombuffer(each.arguments[1], np.int32, 3)  # of SingleQueryAttentionPlan
            found.add(f"{kernel}, {'several groups' if groups > 1 else 'one group'}, {stages} stages")
    return found


def launch(query: torch.Tensor, tokens: torch.Tensor) -> None:
    """Forward and backward."""
    results = torch.ops.tokenfusion.single_query_attention_cuda(query, tokens, None, None, None, True, 1e-6)
    inputs = results[0], query, tokens, None, None, None, *results
    torch.ops.tokenfusion.single_query_attention_backward_cuda(*inputs, True, 1e-6, [True] * 3)


def possible_plans() -> set[str]:
    """On any GPU, of any call."""
    found = set()
    for shared_bytes, queries, dtype in itertools.product(SHARED_BYTES, (8, 16, 32), DTYPES[:2]):
        with gpu(shared_bytes=shared_bytes, interpret=False) as device:
            for channels in range(16, device.limit_for(queries, dtype) + 1, 64):
                for tokens in (16, 32, 48, 64, 112):
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
    with case.gpu(**SCHEDULES[number % len(SCHEDULES)], approximate=number % 2 == 1) as device:
        check_parity(attend, case.inputs(dtype), normalize=case.normalize)
