"""What this machine can do at best: plain reading, copying and matrix multiplication."""

import statistics
from functools import cache

import torch

from benchmarks.problem import device
from benchmarks.timing import Ring, seconds_a_call

_MATRIX = {"cpu": 2048, "cuda": 8192}
_MATMULS = 7


def stream(nbytes: int, written: bool):
    """A plain sum over nbytes, or a copy that reads one half of nbytes and writes the other: (call, ring of inputs)."""
    if not written:
        count = max(nbytes // 4, 1)
        return torch.sum, Ring(lambda: (torch.ones(count, device=device()),))
    count = max(nbytes // 8, 1)
    return torch.Tensor.copy_, Ring(lambda: (torch.ones(count, device=device()), torch.ones(count, device=device())))


@cache
def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    size = _MATRIX[device()]
    pair = tuple(torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    seconds_a_call(torch.matmul, [pair])
    return 2 * size**3 / statistics.median(seconds_a_call(torch.matmul, [pair]) for _ in range(_MATMULS))
