"""Time and peak memory of PyTorch callables, as `tokenfusion compare` and the benchmarks report them."""

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved_seconds(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, after_each: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` a variant, taken in turn so that a drifting machine drifts for all of them.

    Each variant is called once beforehand, to warm up. after_each runs after every call, outside the timing.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, call in variants.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
            after_each()
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the ratios round by round, which cancels what both felt of a busy machine."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def peak_extra_bytes(call: Callable[[], object], *, device: str | None = None) -> int:
    """The most memory that PyTorch's allocator held on a device ("cuda" or "cpu") during a call, beyond what it held
    before; None is the GPU if there is one.

    On a GPU by the allocator's own count; on a CPU by adding up the allocations and releases that the profiler sees,
    which leaves out what libraries take past PyTorch's allocator.
    """
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profiler(profile_memory=True) as profile:
        result = call()
    del result
    held = peak = 0
    events = profile.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def profiler(**options) -> torch.autograd.profiler.profile:
    """PyTorch's, without the error that it prints where there is no GPU driver."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    return torch.autograd.profiler.profile(**options)
