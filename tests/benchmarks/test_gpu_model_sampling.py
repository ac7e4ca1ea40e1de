"""benchmarks.gpu_model.sampling: the blocks that are run stand for all of a grid."""

import math

import pytest

from benchmarks.gpu_model import sampling


def total(grid, cost) -> float:
    """What the chosen blocks make of the sum over the grid."""

    def measure(blocks: list[int], beside: list[int]) -> tuple[list[int], list[float]]:
        assert all(0 <= block < math.prod(grid) for block in [*blocks, *beside])
        return blocks, [cost(block) for block in [*blocks, *beside]]

    found = list(sampling.strata(grid, measure))
    assert sum(len(blocks) * weight for blocks, weight in found) == pytest.approx(math.prod(grid))
    return sum(weight * sum(map(cost, blocks)) for blocks, weight in found)


@pytest.mark.parametrize("grid", [(1, 1, 1), (7, 1, 1), (256, 1, 1), (12, 99, 1), (2, 5, 32), (3, 1, 7)])
def test_equal_blocks(grid):
    assert total(grid, lambda block: 10.0) == pytest.approx(10 * math.prod(grid))


@pytest.mark.parametrize("second", [1, 2, 1000, 2352, 7055])
def test_a_grid_of_two_kinds_in_a_row(second):
    assert total((7056, 1, 1), lambda block: 9.0 if block < second else 4.0) == pytest.approx(
        9 * second + 4 * (7056 - second)
    )


def test_a_short_axis_is_taken_apart():
    assert total((2, 5, 32), lambda block: 1.0 if block // 2 % 5 == 4 else 3.0) == 64 * (4 * 3 + 1)


@pytest.mark.parametrize("count", [500, 501])
@pytest.mark.parametrize("period", [2, 3])
def test_kinds_that_alternate(count, period):
    expected = sum(2.0 if block % period else 1.0 for block in range(count))
    assert total((count, 1, 1), lambda block: 2.0 if block % period else 1.0) == pytest.approx(expected, rel=0.1)


def test_samples_keep_no_step():
    samples = sampling.spread(10_000, 12)
    assert len({b - a for a, b in zip(samples, samples[1:])}) > 2 and len(samples) == 12
