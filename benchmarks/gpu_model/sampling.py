"""Which blocks of a grid are run, and for how many others each of them stands."""

import itertools
import math
from collections.abc import Callable

_SMALL_AXIS = 8  # along which every index is run
_SAMPLES = 2
_PROBES = 32
_SAME = 0.02
_GOLDEN = (math.sqrt(5) - 1) / 2

Grid = tuple[int, int, int]


def spread(count: int, samples: int) -> list[int]:
    """Indices that keep no step, so that none of a grid's periods is all that they meet."""
    return sorted({int((i * _GOLDEN + 0.5) % 1 * count) for i in range(samples)})


def strata(grid: Grid, costs: Callable[[list[int]], list[float]]) -> list[tuple[list[int], int]]:
    """(blocks to run, blocks that they stand for) for parts of the grid whose blocks do the same.

    costs: the instructions of these blocks. Blocks are numbered with x running fastest. An axis of few indices is taken
    apart; of a grid of one axis in which a first and a last part differ, as where one launch does two things, the place
    where the second begins is searched for.
    """
    few = [axis for axis in range(3) if grid[axis] <= _SMALL_AXIS]
    many = [axis for axis in range(3) if axis not in few]
    if len(many) == 1 and math.prod(grid[axis] for axis in few) == 1:
        return _two_parts(math.prod(grid), costs)
    rest, taken_apart = (math.prod(grid[axis] for axis in axes) for axes in (many, few))
    blocks = [
        _number(grid, dict(zip(few, fixed, strict=True)), many, index)
        for fixed in itertools.product(*(range(grid[axis]) for axis in few))
        for index in spread(rest, 1 if taken_apart > 1 else _SAMPLES)
    ]
    return [(blocks, math.prod(grid))]


def _number(grid: Grid, fixed: dict[int, int], many: list[int], index: int) -> int:
    place = dict(fixed)
    for axis in many:
        index, place[axis] = divmod(index, grid[axis])
    return place[0] + grid[0] * (place[1] + grid[1] * place[2])


def _two_parts(count: int, costs: Callable[[list[int]], list[float]]) -> list[tuple[list[int], int]]:
    found = costs(sorted({0, count - 1}))
    first, last = found[0], found[-1]
    if max(found) - min(found) <= _SAME * max(found):
        return [(spread(count, _SAMPLES), count)]

    mixed = "blocks of more than two kinds, or kinds that alternate"
    assert abs(first - last) > _SAME * max(first, last), mixed

    def like_first(cost: float) -> bool:
        return abs(cost - first) < abs(cost - last)

    low, high = 0, count - 1  # like the first, like the last
    while high - low > 1:
        step = -(-(high - low) // _PROBES)
        probes = list(range(low + step, high, step))
        same = [like_first(cost) for cost in costs(probes)]
        assert same == sorted(same, reverse=True), mixed
        low = max([low, *(probe for probe, is_same in zip(probes, same, strict=True) if is_same)])
        high = min([high, *(probe for probe, is_same in zip(probes, same, strict=True) if not is_same)])
    parts = (0, high), (high, count - high)
    return [([start + i for i in spread(size, _SAMPLES)], size) for start, size in parts]
