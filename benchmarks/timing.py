"""Time of one call, and the inputs that it gets, so that no cache holds them.

Inputs come from a ring whose sets together are three times the last-level cache, so that a set was last touched that
long ago. On a GPU the L2 cache is overwritten before every call as well, and CUDA events around the call count the
device's time.
"""

import itertools
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_CACHES = 3  # sizes of the last-level cache that a ring spans
_UNKNOWN_CACHE = 32 << 20


@cache
def cache_bytes() -> int:
    """Size of the last-level cache of the device that is measured."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties().L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=_UNKNOWN_CACHE)


def policy() -> str:
    """The cache policy in words, for the head of a report."""
    ring = f"inputs rotate through {_CACHES} x the last-level cache ({cache_bytes() >> 20} MiB)"
    return f"{ring}, L2 overwritten before each call" if torch.cuda.is_available() else ring


class Ring:
    """Sets of inputs, handed out in turn."""

    def __init__(self, make: Callable[[], tuple[torch.Tensor, ...]]):
        first = make()
        count = math.ceil(_CACHES * cache_bytes() / sum(t.nbytes for t in first))
        self._sets = itertools.cycle([first, *(make() for _ in range(max(count, 2) - 1))])

    def take(self, count: int) -> list[tuple[torch.Tensor, ...]]:
        return list(itertools.islice(self._sets, count))


def seconds_a_call(call: Callable, inputs: list[tuple[torch.Tensor, ...]]) -> float:
    """Mean time of a call over the given sets of inputs."""
    return (_device_seconds if torch.cuda.is_available() else _wall_seconds)(call, inputs)


def _wall_seconds(call: Callable, inputs: list[tuple[torch.Tensor, ...]]) -> float:
    start = time.perf_counter()
    for tensors in inputs:
        call(*tensors)
    return (time.perf_counter() - start) / len(inputs)


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(_CACHES * cache_bytes(), dtype=torch.int8, device="cuda")


def _device_seconds(call: Callable, inputs: list[tuple[torch.Tensor, ...]]) -> float:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in inputs]
    for (start, end), tensors in zip(events, inputs, strict=True):
        _flush_buffer().zero_()
        start.record()
        call(*tensors)
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / len(inputs) / 1000
