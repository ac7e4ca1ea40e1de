"""Which blocks of a grid are run, and for how many others each of them stands."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

_MOST = 16  # blocks, of all indices of axes that are taken apart, or of kinds that alternate
_SAMPLES = 2
_PROBES = 32
_SAME = 0.02
_GOLDEN = (math.sqrt(5) - 1) / 2

Grid = tuple[int, int, int]
T = TypeVar("T")


def spread(count: int, samples: int) -> list[int]:
    """Indices that keep no step, so that none of a grid's periods is all that they meet."""
    return sorted({int((i * _GOLDEN + 0.5) % 1 * count) for i in range(samples)})


# measure(blocks, beside) runs them together: what the blocks come to, and what each of all costs
Measure = Callable[[list[int], list[int]], tuple[T, list[float]]]


def strata(grid: Grid, measure: Measure) -> Iterator[tuple[T, float]]:
    """What some blocks come to, and what it is to be multiplied by, for parts of the grid whose blocks do the same.

    Blocks are numbered with x running fastest. An axis of few indices is taken apart. Where a first and a last part of
    a grid of one axis differ, since one launch does two things, the place where the second begins is searched for; of
    kinds that alternate, more blocks are run.
    """
    few, taken_apart = [], 1
    for axis in sorted(range(3), key=grid.__getitem__):
        if taken_apart * grid[axis] <= _MOST:
            few.append(axis)
            taken_apart *= grid[axis]
    many = [axis for axis in range(3) if axis not in few]
    rest = math.prod(grid[axis] for axis in many)
    if len(many) == 1 and taken_apart == 1:
        yield from _two_parts(rest, measure)
        return
    blocks = [
        _number(grid, dict(zip(few, fixed, strict=True)), many, index)
        for fixed in itertools.product(*(range(grid[axis]) for axis in few))
        for index in spread(rest, 1 if taken_apart > 1 else _SAMPLES)
    ]
    yield measure(blocks, [])[0], math.prod(grid) / len(blocks)


def _number(grid: Grid, fixed: dict[int, int], many: list[int], index: int) -> int:
    place = dict(fixed)
    for axis in many:
        index, place[axis] = divmod(index, grid[axis])
    return place[0] + grid[0] * (place[1] + grid[1] * place[2])


def _two_parts(count: int, measure: Measure) -> Iterator[tuple[T, float]]:
    samples = spread(count, _SAMPLES)
    counts, costs = measure(samples, [0, count - 1])
    if max(costs) - min(costs) <= _SAME * max(costs):
        yield counts, count / len(samples)
        return
    second = _where_the_second_begins(count, *costs[-2:], measure)
    for start, size in ((0, count),) if second is None else ((0, second), (second, count - second)):
        samples = [start + i for i in spread(size, _MOST if second is None else _SAMPLES)]
        yield measure(samples, [])[0], size / len(samples)


def _where_the_second_begins(count: int, first: float, last: float, measure: Measure) -> int | None:
    """None where the blocks are not of two kinds in a row."""

    def like_first(cost: float) -> bool:
        return abs(cost - first) < abs(cost - last)

    low, high = 0, count - 1  # like the first, like the last
    while high - low > 1:
        step = -(-(high - low) // _PROBES)
        probes = list(range(low + step, high, step))
        same = [like_first(cost) for cost in measure([], probes)[1]]
        if same != sorted(same, reverse=True):
            return None
        low = max([low, *(probe for probe, is_same in zip(probes, same, strict=True) if is_same)])
        high = min([high, *(probe for probe, is_same in zip(probes, same, strict=True) if not is_same)])
    return None if abs(first - last) <= _SAME * max(first, last) else high
