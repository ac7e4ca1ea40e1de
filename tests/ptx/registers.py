"""The registers of a batch of blocks, and how operands are bound to them before anything runs."""

import mmap
from collections.abc import Callable

import numpy as np

from .active import WARP, Active
from .errors import Fault
from .formats import BITS, UNSIGNED, VALUES, storage
from .operands import Address, Immediate, Register, Special, Symbol, elements
from .parse import Kernel

_SLAB = 4 << 20  # bytes that registers are cut from


class Registers:
    """A batch of blocks of the same kernel; block b's thread t is number b * threads_a_block + t.

    room: how many threads a batch may have. What is bound to the registers holds for a batch of any size.
    """

    def __init__(self, kernel: Kernel, room: int):
        self.kernel, self.room = kernel, room
        self._free = np.zeros(0, np.uint8)
        self._registers: dict[str, np.ndarray] = {}
        self._special: dict[str, np.ndarray] = {}
        self._reads: list[str] = []
        self._writes: list[str] = []
        self.symbols: dict[str, int] = {}

    def begin(self, threads: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """A launch of blocks of so many threads begins; `place` says which of them run."""
        self.grid, self.shape = grid, threads
        self.launched = threads[0] * threads[1] * threads[2]
        self.warps_a_block = -(-self.launched // WARP)
        self.threads_a_block = self.warps_a_block * WARP
        self.blocks = 0

    def _resize(self, blocks: int) -> None:
        self.blocks, self.size = blocks, blocks * self.threads_a_block
        self.threads = np.arange(self.size)
        self.block_of = self.threads // self.threads_a_block
        self.everyone = Active(self, None)

    def register(self, name: str) -> np.ndarray:
        """The values of a register in all threads, as bits."""
        values = self._registers.get(name)
        if values is None:
            kind = self.kernel.register_type(name)
            if kind is None:
                raise Fault(f"{name} is declared nowhere")
            values = self._registers[name] = self._zeros(np.dtype(storage(kind)))
        return values

    def _zeros(self, dtype: np.dtype) -> np.ndarray:
        """For all threads that there is room for; of threads that never run they take no memory."""
        size = self.room * dtype.itemsize
        if len(self._free) < size:
            self._free = np.frombuffer(mmap.mmap(-1, _SLAB), np.uint8)
        taken, self._free = self._free[:size], self._free[size:]
        return taken.view(dtype)

    def source(self, operand, kind: str) -> Callable[[Active], np.ndarray]:
        """A function that gives the operand's values in active threads, as numpy's type for `kind`."""
        if isinstance(operand, Register):
            return self._register_source(operand, kind)
        if isinstance(operand, Special):
            return self._special_source(operand.name, UNSIGNED[BITS[kind]], VALUES[kind])
        value = self.constant(operand, kind)
        return lambda active: value

    def _special_source(self, name: str, bits, dtype):
        if name not in _SPECIAL:
            raise Fault(f"{name} is not known")

        def read(active):
            values = self.special(name)
            return (values if values.ndim == 0 else active.of(values)).astype(bits).view(dtype)[()]

        return read

    def _register_source(self, operand: Register, kind: str):
        values = self.register(operand.name)
        self._reads.append(operand.name)
        if kind == "pred":
            if operand.negated:
                return lambda active: ~active.of(values)
        elif values.dtype.itemsize * 8 == BITS[kind]:
            values = values.view(VALUES[kind])
        elif values.dtype.itemsize * 8 > BITS[kind]:
            values = values.view(UNSIGNED[BITS[kind]])[:: values.dtype.itemsize * 8 // BITS[kind]].view(VALUES[kind])
        else:
            raise Fault(f"{operand.name} is narrower than {kind}")

        return lambda active: values[active.at]

    def constant(self, operand, kind: str):
        """An immediate or the address of a symbol as a scalar."""
        if isinstance(operand, Symbol):
            if operand.name not in self.symbols:
                raise Fault(f"{operand.name} is not known")
            value, bits = self.symbols[operand.name], 0
        elif isinstance(operand, Immediate):
            value, bits = operand
        else:
            raise Fault(f"{operand} cannot be read as {kind}")
        if kind == "pred":
            return np.bool_(value)
        width = BITS[kind]
        if bits:
            number = np.array(value, UNSIGNED[bits]).view(VALUES[f"f{bits}"])
            if kind.startswith("f"):
                return number.astype(VALUES[kind])[()]
            if bits != width:
                raise Fault(f"a floating-point constant of {bits} bits as {kind}")
        return np.array(value & ((1 << width) - 1), UNSIGNED[width]).view(VALUES[kind])[()]

    def destination(self, operand, kind: str) -> Callable[[Active, np.ndarray], None]:
        """A function that writes values of the type to active threads; the type says how a wider register is filled."""
        if not isinstance(operand, Register):
            raise Fault(f"{operand} cannot be written")
        if operand.name == "_":
            return lambda active, values: None
        register = self.register(operand.name)
        self._writes.append(operand.name)
        if kind != "pred":
            width = register.dtype.itemsize * 8
            if width == BITS[kind]:
                register = register.view(VALUES[kind])
            elif width < BITS[kind]:
                raise Fault(f"{operand.name} is narrower than {kind}")
            elif kind[0] == "s":
                register = register.view(VALUES[f"s{width}"])
            elif kind[0] == "f":
                raise Fault(f"{operand.name} is wider than {kind}")

        def write(active, values):
            register[active.at] = values

        return write

    def sources(self, operand, kind: str) -> list:
        return [self.source(each, kind) for each in elements(operand)]

    def destinations(self, operand, kind: str) -> list:
        return [self.destination(each, kind) for each in elements(operand)]

    def address(self, operand: Address) -> Callable[[Active], np.ndarray]:
        """A function that gives addresses as int64, in all active threads."""
        if not isinstance(operand, Address):
            raise Fault(f"{operand} is no address")
        base, offset = operand.base, operand.offset
        if not isinstance(base, Register):
            value = int(self.constant(base, "b64")) + offset
            return lambda active: np.full(active.count, value, np.int64)
        width = self.register(base.name).dtype.itemsize * 8
        read = self.source(base, f"b{width}")
        if width == 64:
            return lambda active: read(active).view(np.int64) + offset
        return lambda active: read(active).astype(np.int64) + offset

    def special(self, name: str) -> np.ndarray:
        """A special register as int64, in all threads, or a scalar where all have the same."""
        if name not in self._special:
            self._special[name] = _SPECIAL[name](self)
        return self._special[name]

    def taken(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The registers that were asked for since the last call: read, written."""
        found = tuple(dict.fromkeys(self._reads)), tuple(dict.fromkeys(self._writes))
        self._reads.clear()
        self._writes.clear()
        return found

    def place(self, blocks: np.ndarray) -> None:
        """The batch's blocks are these: [blocks, 3] indices in the grid. Registers begin as zeros."""
        if len(blocks) != self.blocks:
            self._resize(len(blocks))
        self.block_index = blocks
        self._special.clear()
        for values in self._registers.values():
            values[: self.size] = 0


def _lane(registers: Registers) -> np.ndarray:
    return registers.threads % WARP


def _along(axis: int) -> dict[str, Callable[[Registers], np.ndarray]]:
    """The special registers for one axis of a block and of the grid."""

    def thread(registers):
        x, y, _ = registers.shape
        within = registers.threads % registers.threads_a_block
        return (within % x, within // x % y, within // (x * y))[axis]

    def block(registers):
        return np.repeat(registers.block_index[:, axis], registers.threads_a_block).astype(np.int64)

    def blocks(registers):
        return np.array(registers.grid[axis])

    values = {
        "%tid": thread,
        "%ntid": lambda registers: np.array(registers.shape[axis]),
        "%ctaid": block,
        "%clusterid": block,
        "%nctaid": blocks,
        "%nclusterid": blocks,
        "%cluster_nctaid": lambda _: np.array(1),
        "%cluster_ctaid": lambda _: np.array(0),
    }
    return {f"{name}.{'xyz'[axis]}": value for name, value in values.items()}


_SPECIAL: dict[str, Callable[[Registers], np.ndarray]] = {
    **_along(0),
    **_along(1),
    **_along(2),
    "%laneid": _lane,
    "%warpid": lambda registers: registers.threads % registers.threads_a_block // WARP,
    "%nwarpid": lambda registers: np.array(registers.warps_a_block),
    "%cluster_ctarank": lambda _: np.array(0),
    "%cluster_nctarank": lambda _: np.array(1),
    "%dynamic_smem_size": lambda registers: np.array(registers.dynamic_shared),
    "%lanemask_eq": lambda registers: 1 << _lane(registers),
    "%lanemask_lt": lambda registers: (1 << _lane(registers)) - 1,
    "%lanemask_le": lambda registers: (2 << _lane(registers)) - 1,
    "%lanemask_gt": lambda registers: 0x100000000 - (2 << _lane(registers)),
    "%lanemask_ge": lambda registers: 0x100000000 - (1 << _lane(registers)),
}
