"""Time of one call, on inputs that no cache holds.

Inputs come from a ring whose sets together are three times the last-level cache, so that a set was last touched that
long ago. A CPU's ring has at most 256 MiB: a virtual machine reports the cache that it shares with others, which may be
larger than all that its cores ever get of it. On a GPU, three times its L2 is read before every sample, too. A GPU's
time is that of replaying a CUDA graph of several calls, each on a set of its own, between two events: launches from
Python, which would hide a short kernel, are outside it. The time of calls made from Python is taken as well.
"""

import itertools
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

MOST_CALLS = 100  # of a sample
_CACHES = 3  # sizes of the last-level cache that a ring spans
_UNKNOWN_CACHE = 32 << 20
most_bytes = 256 << 20  # of a CPU's ring

Inputs = tuple[torch.Tensor, ...]


@cache
def cache_bytes() -> int:
    """Size of the last-level cache of the device that is measured."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties().L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=_UNKNOWN_CACHE)


def ring_bytes() -> int:
    """Size of all sets of a ring together, at least."""
    wanted = _CACHES * cache_bytes()
    return wanted if torch.cuda.is_available() else min(wanted, most_bytes)


def policy() -> str:
    """The cache policy in words, for the head of a report."""
    cache, ring = cache_bytes() >> 20, ring_bytes() >> 20
    if ring < _CACHES * cache:
        return f"inputs rotate through {ring} MiB (the machine reports a last-level cache of {cache} MiB)"
    words = f"inputs rotate through {_CACHES} x the last-level cache ({cache} MiB)"
    on_a_gpu = "which is read over before each sample; times are those of replayed CUDA graphs"
    return f"{words}, {on_a_gpu}" if torch.cuda.is_available() else words


class Ring:
    """Sets of inputs, handed out in turn."""

    def __init__(self, make: Callable[[], Inputs]):
        first = make()
        count = max(math.ceil(ring_bytes() / sum(t.nbytes for t in first)), 2)
        if torch.cuda.is_available():
            count = min(count, MOST_CALLS)  # read over before each sample, of which no set is part twice
        self._sets = [first, *(make() for _ in range(count - 1))]
        self._next = itertools.cycle(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def take(self, count: int) -> list[Inputs]:
        return list(itertools.islice(self._next, count))


class Replay:
    """A CUDA graph of one call on each of the given sets of inputs.

    Raises:
        Exception: what the calls do cannot be captured; the process should measure nothing after this case.
    """

    def __init__(self, call: Callable, inputs: list[Inputs]):
        self._inputs = inputs  # a graph reads their memory and does not own it
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(*inputs[0])  # what is set up once for each stream
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph, stream=stream):
            for tensors in inputs:
                call(*tensors)

    def seconds_a_call(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _read_over_cache()
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / len(self._inputs)


def seconds_a_call(call: Callable, inputs: list[Inputs]) -> float:
    """Mean time of a call over the given sets of inputs, as Python calls it: with all that launches cost."""
    if torch.cuda.is_available():
        _read_over_cache()
        torch.cuda.synchronize()
    start = time.perf_counter()
    for tensors in inputs:
        call(*tensors)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(inputs)


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(_CACHES * cache_bytes() // 4, device="cuda")


def _read_over_cache() -> None:
    """Reading, where writing would leave lines that the call to be timed has to write back."""
    _flush_buffer().sum()
