"""Which bits of which registers depend on memory that nothing has written, and which registers are being written."""

import numpy as np

from .errors import Fault
from .operands import Address, Register


class Poison:
    """Shadows of registers: bits that are set are poison. As long as there are none, nothing of it costs anything."""

    def __init__(self, machine):
        self.machine = machine
        self.shadows: dict[str, np.ndarray] = {}
        self.busy: dict[str, np.ndarray] = {}

    def __bool__(self) -> bool:
        return bool(self.shadows)

    @property
    def active(self) -> bool:
        return bool(self.shadows or self.busy)

    def clear(self) -> None:
        self.shadows.clear()
        self.busy.clear()

    def mark(self, name: str, active, bits: np.ndarray) -> None:
        """Sets the shadow of a register in active threads; narrower bits are those of a value that was extended."""
        if name == "_":
            return
        register = self.machine.register(name)
        shadow = self.shadows.get(name)
        if shadow is None:
            if not np.any(bits):
                return
            shadow = self.shadows[name] = np.zeros_like(register)
        if register.dtype == bool:
            shadow[active.threads] = bits != 0
        elif bits.dtype.itemsize < register.dtype.itemsize:
            shadow[active.threads] = np.where(bits != 0, ~register.dtype.type(0), register.dtype.type(0))
        else:
            shadow[active.threads] = bits
        if not shadow.any():
            del self.shadows[name]

    def bits(self, name: str | None, active) -> np.ndarray:
        """The shadow of a register in active threads."""
        shadow = self.shadows.get(name)
        if shadow is None:
            declared = name is not None and self.machine.kernel.register_type(name) is not None
            return np.zeros(active.count, self.machine.register(name).dtype if declared else np.uint64)
        return active.of(shadow)

    def of_vector(self, names: list, active, dtype) -> np.ndarray | None:
        """[threads, registers] shadows of what is stored, or None."""
        if not any(name in self.shadows for name in names):
            return None
        parts = [self.bits(name, active).astype(dtype) for name in names]
        return np.stack(parts, axis=1)

    def step(self, operation, active) -> None:
        """Runs an instruction, and says what of its results is poison."""
        self._check_busy(operation, active)
        if not self.shadows:
            self._run(operation, active)
            return
        found = operation.instruction
        for operand in found.operands:
            if isinstance(operand, Address) and isinstance(operand.base, Register):
                if self.bits(operand.base.name, active).any():
                    self._depends("an address", active, self.bits(operand.base.name, active))
        results = self._results(operation, active)
        self._run(operation, active) if operation.taint != "load" else None
        for name, bits in results:
            self.mark(name, active, bits)
        if operation.taint == "load":
            self._run(operation, active)

    def _run(self, operation, active):
        self.machine.passed = operation.run(active)

    def _results(self, operation, active):
        if operation.taint == "load":
            return [(name, np.zeros(active.count, np.uint64)) for name in operation.writes]
        if callable(operation.taint):
            return operation.taint(self, active)
        if operation.taint == "store":
            return []
        if operation.instruction.types[-1:] in (("f16x2",), ("bf16x2",)):
            return self._by_halves(operation, active)
        spoiled = np.zeros(active.count, bool)
        for name in operation.reads:
            if name in self.shadows:
                spoiled |= self.bits(name, active) != 0
        if operation.collective and spoiled.any():
            spoiled = np.repeat(spoiled.reshape(-1, 32).any(axis=1), 32) if active.full else spoiled | spoiled.any()
        return [(name, np.where(spoiled, ~np.uint64(0), np.uint64(0))) for name in operation.writes]

    def _by_halves(self, operation, active):
        """Packed arithmetic: a half of the result depends on that half of the operands."""
        halves = np.zeros((active.count, 2), bool)
        for name in operation.reads:
            halves |= self.bits(name, active).astype(np.uint32)[:, None].view(np.uint16) != 0
        bits = np.where(halves, np.uint16(0xFFFF), np.uint16(0)).view(np.uint32)[:, 0]
        return [(name, bits) for name in operation.writes]

    def _check_busy(self, operation, active) -> None:
        if not self.busy or operation.taint == "wgmma":
            return
        for name in (*operation.reads, *operation.writes):
            flying = self.busy.get(name)
            if flying is not None:
                here = active.of(flying)
                if here.any():
                    thread = active.threads[np.flatnonzero(here)[0]]
                    raise Fault(f"{name} is touched before the wgmma that uses it is waited for", thread)

    def check_guard(self, operation, active) -> None:
        name = operation.instruction.guard.name
        if name in self.shadows:
            bits = self.bits(name, active)
            if bits.any():
                self._depends("a predicate", active, bits)

    def _depends(self, what: str, active, bits) -> None:
        raise Fault(f"{what} depends on memory that nothing has written", active.threads[np.flatnonzero(bits)[0]])
