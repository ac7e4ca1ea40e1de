"""What a host has PyTorch do beside its kernels: sums of partial results, copies, products."""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.gpu_model.limits import Launch

_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm")
_ADDING = ("aten::addmm",)
_COUNTED = (*_PRODUCTS, "aten::sum", "aten::copy_", "aten::div", "aten::mul", "aten::add")
_ITEMSIZE = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8}


class _Tensor(NamedTuple):
    shape: list[int]
    itemsize: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


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
    tensors = [
        _Tensor(shape, _ITEMSIZE[dtype]) for shape, dtype in zip(shapes, dtypes, strict=True) if dtype in _ITEMSIZE
    ]
    sizes = [each.bytes for each in tensors]
    if name in _PRODUCTS:
        return _product(name, tensors)
    name = name.removeprefix("aten::").strip("_")
    if name == "copy":
        return Launch(f"PyTorch's {name}", read=sizes[1], written=sizes[0])
    written = 0 if name == "sum" else max(sizes)  # a sum's result is small beside what it sums
    return Launch(f"PyTorch's {name}", read=sum(sizes), written=written)


def _product(name: str, tensors: list[_Tensor]) -> Launch:
    """tensors: what is added to the product, the two factors, and what it is written to, if it is."""
    added, (left, right, *out) = (tensors[:1], tensors[1:]) if name in _ADDING else ([], tensors)
    *batch, rows, inner = left.shape
    count = math.prod(batch) * rows * right.shape[-1]
    return Launch(
        f"PyTorch's {name.removeprefix('aten::')}",
        read=sum(each.bytes for each in (*added, left, right)),
        written=count * (*out, left)[0].itemsize,
        flops={"fp32" if left.itemsize == 4 else "wgmma.mma_async": 2.0 * count * inner},
    )
