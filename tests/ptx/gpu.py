"""A GPU for CUDA operators where there is none: their hosts run as they are, on tensors of the CPU, and their kernels
in the interpreter.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tests.ptx.launch import launch
from tests.ptx.memory import Memory
from tests.ptx.observe import Observer
from tests.ptx.parse import Kernel, parse
from tests.ptx.schedule import Order
from tests.ptx.sources import kernel, program


class _Dimensions(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]

    def __iter__(self):
        return iter((self.x, self.y, self.z))


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(_Dimensions),
    ctypes.POINTER(_Dimensions),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)


@dataclass(frozen=True)
class Launch:
    kernel: str  # mangled
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: list[bytes]


@dataclass
class Gpu:
    """While it is in force, tokenfusion::<operator>_cuda takes tensors of the CPU that were made meanwhile.

    multiprocessors, shared_bytes (that a block may have at most), cache_bytes (of L2): what the host asks the device
    for. edit: what is done to a kernel's PTX, given its name, before it runs. interpret: whether it runs; kernels that
    do not leave all as it is. late, order, approximate, blocks, observers: of tests.ptx.launch.launch. launches: what
    the host launched.
    """

    operator: str
    capability: int = 90
    multiprocessors: int = 1
    shared_bytes: int = 227 * 1024
    cache_bytes: int = 50 << 20
    edit: Callable[[str, str], str] | None = None
    interpret: bool | Callable[[str], bool] = True
    late: bool = True
    order: Order | int = Order.ROUND_ROBIN
    approximate: bool = False
    blocks: Sequence[tuple[int, int, int]] | None = None
    observers: Sequence[Observer] = ()
    launches: list[Launch] = field(default_factory=list)

    def __post_init__(self):
        self._host = program(self.operator).host
        self._host.add_operator.restype = ctypes.c_void_p
        self._host.allocation_of.restype = ctypes.c_void_p
        self._callback = _LAUNCH(self._receive)
        self._failure = None

    def limit_for(self, count: int, dtype: torch.dtype) -> int:
        """What csrc/cuda/common/limits.h has for the operator: reduced channels for tokens."""
        self._set_device()
        self._host.limit_for.restype = ctypes.c_int64
        return self._host.limit_for(ctypes.c_int64(count), ctypes.c_int64(dtype.itemsize))

    def __enter__(self):
        self._set_device()
        self._registered = ctypes.c_void_p(self._host.add_operator())
        self._host.record_allocations()
        return self

    def __exit__(self, kind, error, trace):
        self._host.stop_recording()
        self._host.remove_operator(self._registered)
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure from None

    def _set_device(self):
        self._host.set_device(self.multiprocessors, self.shared_bytes, self.cache_bytes, self._callback)

    def _receive(self, name, grid, block, arguments, shared_bytes) -> int:
        """A launch of the host's; what goes wrong is raised at the end, as no exception passes through C."""
        try:
            code = self._kernel(name.decode())
            given = [ctypes.string_at(arguments[i], each.bytes) for i, each in enumerate(code.parameters)]
            self.launches.append(Launch(code.name, tuple(grid[0]), tuple(block[0]), shared_bytes, given))
            if self.interpret is True or (self.interpret and self.interpret(code.name)):
                self._interpret(code, self.launches[-1])
        except BaseException as failure:
            self._failure = failure
            return 1
        return 0

    def _interpret(self, code: Kernel, found: Launch) -> None:
        names = ("late", "order", "approximate", "blocks", "observers")
        how = {name: getattr(self, name) for name in names} | dict(shared=found.shared_bytes)
        launch(code, found.arguments, found.grid, found.block, memory=self._memory(found.arguments), **how)

    def _kernel(self, name: str) -> Kernel:
        if self.edit is None:
            return kernel(self.operator, self.capability, name)
        return parse(self.edit(name, program(self.operator).modules[self.capability][name]))[name]

    def _memory(self, arguments: list[bytes]) -> Memory:
        """Of the tensors that the arguments point to, and no others."""
        memory, size = Memory(), ctypes.c_size_t()
        starts = set()
        for word in (word for each in arguments for word in memoryview(each[: len(each) // 8 * 8]).cast("Q")):
            first = self._host.allocation_of(ctypes.c_void_p(word), ctypes.byref(size))
            if first and first not in starts:
                starts.add(first)
                memory.allow(torch.frombuffer((ctypes.c_uint8 * size.value).from_address(first), dtype=torch.uint8))
        return memory
