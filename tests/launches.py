"""What Triton hosts launch, seen without a GPU: the grid of each kernel, and every address that it touches.

Operands are meta tensors of any size, which get addresses that nothing lies at. Programs run in Triton's interpreter,
which refuses an integer that leaves its 32 bits; loads give zeros.
"""

import contextlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.jit import KernelInterface

from tokenfusion.kernels import triton_interpreter

_APART = 1 << 20  # bytes between operands


@dataclass(frozen=True)
class Launch:
    kernel: KernelInterface
    grid: tuple[int, ...]
    arguments: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def programs(self) -> tuple[int, int, int]:
        return (*self.grid, 1, 1)[:3]

    @property
    def last(self) -> tuple[int, int, int]:
        """The last program, which goes furthest."""
        return tuple(count - 1 for count in self.programs)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def of(host: str, function: str, *arguments) -> list[Launch]:
    """Of a call of the function of an operator's host."""
    launches = []

    def record(kernel, grid):
        def launch(*args, **kwargs):
            signature = inspect.signature(kernel.fn)
            known = {name: value for name, value in kwargs.items() if name in signature.parameters}
            launches.append(Launch(kernel, grid, signature.bind(*args, **known).arguments))

        return launch

    with _patched(KernelInterface, "__getitem__", record):
        getattr(importlib.import_module(f"tokenfusion.kernels.{host}.triton_host"), function)(*arguments)
    return launches


def run(launch: Launch, program: tuple[int, int, int]) -> None:
    """Runs one program; fails where it touches what is no operand's, and where an integer overflows."""
    triton_interpreter.mend()
    extents, arguments, end = [], {}, _APART
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor):
            size = _extent(value) * value.element_size()
            arguments[name] = SimpleNamespace(dtype=value.dtype, data_ptr=lambda start=end: start)
            extents.append((end, end + size))
            end += (size + 2 * _APART) // _APART * _APART
        else:
            arguments[name] = value
    constants = {name for name, type_ in launch.kernel.fn.__annotations__.items() if "constexpr" in str(type_)}
    converted = {n: v if n in constants else interpreter._implicit_cvt(v) for n, v in arguments.items()}
    builder, memory = interpreter.interpreter_builder, SimpleNamespace(**vars(interpreter._interpreter))
    memory.load = lambda addresses, mask, other, dtype: _check(launch.name, addresses, mask, extents, other, dtype)
    memory.store = lambda addresses, value, mask: _check(launch.name, addresses, mask, extents, value, value.dtype)
    scope = interpreter._patch_lang(launch.kernel.fn)
    try:
        with _patched(interpreter, "_interpreter", memory):
            builder.set_grid_dim(*launch.programs)
            builder.set_grid_idx(*program)
            launch.kernel.rewrite()(**converted)
    finally:
        scope.restore()


def _extent(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _check(name, addresses, mask, extents, values, dtype):
    touched = addresses[np.broadcast_to(mask, addresses.shape)].astype(np.uint64)
    inside = np.zeros(touched.shape, bool)
    for start, end in extents:
        inside |= (touched >= start) & (touched + np.dtype(dtype).itemsize <= end)
    assert inside.all(), f"{name}: {(~inside).sum()} of {inside.size} addresses lie outside of all operands"
    return np.where(mask, np.zeros_like(values, dtype), values)


@contextlib.contextmanager
def _patched(owner, name: str, value: Callable):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
