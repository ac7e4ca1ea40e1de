"""What this machine can do at best: plain reading, copying and matrix multiplication.

`python -m benchmarks.measure.roofline` prints the rates of large ones as JSON.
"""

import json
import statistics
from functools import cache

import torch

from benchmarks.measure.problem import device
from benchmarks.measure.timing import Ring, seconds_a_call

_MATRIX = {"cpu": 2048, "cuda": 8192}
_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_SAMPLES = 7
_CALLS = {"cpu": 1, "cuda": 5}  # of a sample


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
    return 2 * size**3 / _median_seconds(torch.matmul, pair)


@cache
def bytes_per_second(written: bool) -> float:
    """Rate of a large sum, or of a large copy counted by bytes read and bytes written.

    A plain operation over as few bytes as a case moves need not reach it: `stream` is what that operation takes.
    """
    nbytes = _BYTES[device()]
    call, ring = stream(nbytes, written)
    return nbytes / _median_seconds(call, ring.take(1)[0])


def _median_seconds(call, inputs: tuple[torch.Tensor, ...]) -> float:
    calls = [inputs] * _CALLS[device()]
    seconds_a_call(call, calls)
    return statistics.median(seconds_a_call(call, calls) for _ in range(_SAMPLES))


def measured() -> dict[str, float]:
    dtypes = (torch.float32, torch.bfloat16)
    products = {f"product of matrices, {str(d).removeprefix('torch.')}, FLOP/s": matmul_flops(d) for d in dtypes}
    return {
        "copy, bytes/s read and written": bytes_per_second(written=True),
        "sum, bytes/s read": bytes_per_second(written=False),
        **products,
    }


if __name__ == "__main__":
    print(json.dumps(measured()))
