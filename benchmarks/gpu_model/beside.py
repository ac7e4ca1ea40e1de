"""What a host has PyTorch do beside its kernels: sums of partial results, copies, products."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch._C import _profiler

from benchmarks.gpu_model.limits import Launch

_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm")
_ADDING = ("aten::addmm",)
_COUNTED = (*_PRODUCTS, "aten::sum", "aten::copy_", "aten::div", "aten::mul", "aten::add")


class _Tensor(NamedTuple):
    shape: list[int]
    strides: list[int]
    itemsize: int

    @property
    def bytes(self) -> int:
        """Of memory: what was expanded is there once."""
        once = (size for size, stride in zip(self.shape, self.strides, strict=True) if stride)
        return math.prod(once) * self.itemsize


@contextlib.contextmanager
def pytorch_operations() -> Iterator[list[Launch]]:
    """Those of the with-block, as launches that have bytes and, products, operations; the list is filled at its end."""
    found: list[Launch] = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        yield found
    found.extend(_counted(profile.profiler.kineto_results.experimental_event_tree()))


def _counted(events: Iterable[_profiler._ProfilerEvent]) -> Iterator[Launch]:
    """Of the outermost operations that count: what they call, a GPU does not do apart."""
    for event in events:
        if event.name in _COUNTED:
            yield _launch(event.name, list(_tensors(event.extra_fields.inputs)))
        else:
            yield from _counted(event.children)


def _tensors(inputs: list) -> Iterator[_Tensor]:
    for each in inputs:
        if isinstance(each, _profiler._TensorMetadata) and each.dtype.is_floating_point:
            yield _Tensor(each.sizes, each.strides, each.dtype.itemsize)


def _launch(name: str, tensors: list[_Tensor]) -> Launch:
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
