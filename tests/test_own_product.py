"""The CPU kernels' own matrix product in bfloat16, by AMX and by vectors, through the operators that it serves."""

import pytest
import torch

from tests.gated_sum import test_cpu as gated_sum
from tests.upconv.cases import check, make_inputs
from tokenfusion.kernels import extension

pytestmark = [
    pytest.mark.backend("cpu"),
    pytest.mark.usefixtures("amx_or_vectors", "one_thread"),
    pytest.mark.skipif(torch.bfloat16 not in extension.own_product_dtypes(), reason="no product of bfloat16 here"),
]


@pytest.mark.parametrize("tokens", [1, 16, 33, 257])
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (31, 32), (32, 31), (33, 64), (64, 33), (520, 40), (1100, 96)])
@pytest.mark.parametrize("count", [1, 3])
def test_gated_sum(count, inputs, outputs, tokens):
    """Any number of rows, of elements of a sum, and of columns; several scaled terms."""
    gated_sum.check(*gated_sum.problem(torch.bfloat16, tokens=tokens, inputs=inputs, outputs=outputs, count=count))


def test_a_branch_without_inputs():
    branches, weights, *others = gated_sum.problem(torch.bfloat16, tokens=40, count=3)
    branches[1], weights[1] = branches[1][:, :, :0], weights[1][:, :0]
    gated_sum.check(branches, weights, *others)


def test_strides():
    gated_sum.test_strides(torch.bfloat16)


@pytest.mark.parametrize("format", ["nchw", "nhwc"])
@pytest.mark.parametrize("op", ["concat", "project", "add"])
@pytest.mark.parametrize(
    "case",
    [
        dict(channels=(32, 32, 32), projected=32),
        dict(channels=(70, 64, 40), projected=96),
        dict(channels=(600, 32, 8), projected=64),
        dict(channels=(33, 32, 7), projected=32, scale=4),
    ],
    ids=str,
)
def test_upconv(case, op, format):
    """Rows that lie scattered, runs of columns, and sums onto what is there."""
    for size in ((1, 1), (5, 33)):
        check(op, make_inputs(op, size=size, dtype=torch.bfloat16, formats=(format,) * 4, **case))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(value):
    branches, weights, _, gates, *_ = gated_sum.problem(torch.bfloat16, tokens=40, inputs=64, outputs=64)
    branches[0][0, 33, 5] = value
    with torch.no_grad():
        out = gated_sum.gated_sum(branches, weights, [None, None], gates)
    finite = out.isfinite().all(dim=2)
    assert not finite[0, 33]
    assert finite.sum() == finite.numel() - 1
