"""Runs what Triton hosts launch on CPU tensors: compiled for a GPU that is not here, the PTX then interpreted.

For a process of its own, `worker.py`, in which operators have their Triton kernels for CPU tensors, as they do for
Triton's interpreter, and yet Triton compiles.
"""

import contextlib
import functools
import time
import zlib
from collections.abc import Callable, Iterator

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from tests.ptx.launch import launch
from tests.ptx.launches import Launch
from tests.ptx.memory import Memory
from tests.ptx.parse import Kernel, parse
from tokenfusion.kernels import triton_support

assert triton_support.INTERPRET and not triton.knobs.runtime.interpret, "this is no worker"


class _Driver:
    """Stands for a GPU of a compute capability."""

    capability = 90

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


_DRIVER = _Driver()
triton.runtime.driver.set_active(_DRIVER)
_COMPILE = JITFunction.run


def _end_with_ptx(backend, stages: dict, *_) -> None:
    stages["cubin"] = lambda ptx, metadata: zlib.compress(ptx.encode())


triton.knobs.runtime.add_stages_inspection_hook = _end_with_ptx
triton.knobs.compilation.store_binary_only = True


@contextlib.contextmanager
def launches(
    capability: int, dtype: str, change: Callable[[str, str], str] | None = None, run: bool = True, **options
) -> Iterator[list[Launch]]:
    """What hosts launch in the with-block is run, and added to this list.

    change: makes another PTX of a kernel's name and PTX; run: False for launches without compilation and effect;
    options: those of `launch.launch`.
    """
    seen = []

    def intercept(function: JITFunction, *args, grid, warmup, **kwargs):
        names = function.arg_names
        values = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
        constants = {name: value for name, value in kwargs.items() if name not in names}
        constants |= {p.name: values[p.name] for p in function.params if p.is_constexpr}
        grid = (grid(values) if callable(grid) else tuple(grid)) + (1, 1)
        kernel = f"{function.fn.__module__}.{function.fn.__name__}".removeprefix("tokenfusion.kernels.")
        described = kernel, capability, dtype, constants, grid[:3]
        if not run:
            seen.append(Launch(*described))
            return
        start = time.perf_counter()
        compiled = _COMPILE(function, *args, grid=grid[:3], warmup=True, **kwargs)
        parsed = _parsed(compiled, change)
        middle = time.perf_counter()
        _execute(parsed, compiled, values, grid[:3], options)
        seen.append(Launch(*described, middle - start, time.perf_counter() - middle))

    before, JITFunction.run, _DRIVER.capability = JITFunction.run, intercept, capability
    try:
        yield seen
    finally:
        JITFunction.run = before


def _parsed(compiled: CompiledKernel, change: Callable[[str, str], str] | None) -> Kernel:
    name, text = compiled.metadata.name, zlib.decompress(compiled.kernel).decode()
    return _parse(name, text if change is None else change(name, text))


@functools.lru_cache(maxsize=64)
def _parse(name: str, text: str) -> Kernel:
    return parse(text)[name]


def _execute(kernel: Kernel, compiled: CompiledKernel, values: dict, grid: tuple[int, int, int], options: dict) -> None:
    memory, arguments = Memory(), []
    for name, type_ in compiled.src.signature.items():
        if type_ == "constexpr":  # also a 1 and a None that Triton made constants of
            continue
        value = values[name]
        if isinstance(value, torch.Tensor):
            memory.allow(value)
            value = value.data_ptr()
        arguments.append(value)
    arguments += [0] * (len(kernel.parameters) - len(arguments))  # scratch memory, which none of the kernels has
    assert compiled.metadata.global_scratch_size == 0
    threads = 32 * compiled.metadata.num_warps
    launch(kernel, arguments, grid, (threads, 1, 1), memory=memory, shared=compiled.metadata.shared, **options)
