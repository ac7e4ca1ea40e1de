"""What a host has PyTorch do beside its kernels: sums of partial results, copies, products."""

import contextlib
import math
from collections.abc import Iterator

import torch

from benchmarks.gpu_model.limits import Launch

_COUNTED = ("aten::sum", "aten::copy_", "aten::mm", "aten::bmm", "aten::div", "aten::mul", "aten::add")
_PRODUCTS = ("aten::mm", "aten::bmm")
_ITEMSIZE = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8}


@contextlib.contextmanager
def pytorch_operations() -> Iterator[list[Launch]]:
    """Those of the with-block, as launches that have bytes and, products, operations; the list is filled at its end."""
    found: list[Launch] = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        yield found
    end = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() in _COUNTED and event.start_ns() >= end:
            end = event.start_ns() + event.duration_ns()  # what it calls, a GPU does not do apart
            found.append(_launch(event.name(), event.shapes(), event.dtypes()))


def _launch(name: str, shapes: list[list[int]], dtypes: list[str]) -> Launch:
    tensors = [(shape, _ITEMSIZE[dtype]) for shape, dtype in zip(shapes, dtypes, strict=True) if dtype in _ITEMSIZE]
    sizes = [math.prod(shape) * itemsize for shape, itemsize in tensors]
    name = name.removeprefix("aten::").strip("_")
    if name == "copy":
        return Launch(f"PyTorch's {name}", read=sizes[1], written=sizes[0])
    if f"aten::{name}" in _PRODUCTS:
        (*batch, rows, inner), (*_, columns) = tensors[0][0], tensors[1][0]
        count = math.prod(batch) * rows * columns
        flops = {"fp32" if tensors[0][1] == 4 else "wgmma.mma_async": 2.0 * count * inner}
        return Launch(f"PyTorch's {name}", read=sum(sizes), written=count * tensors[0][1], flops=flops)
    written = 0 if name == "sum" else max(sizes)  # a sum's result is small beside what it sums
    return Launch(f"PyTorch's {name}", read=sum(sizes), written=written)
