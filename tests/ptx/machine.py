"""A batch of blocks that run together: registers, memories, and what is under way between them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .active import Active
from .bulk import Bulk
from .copies import Copies
from .errors import Fault
from .mbarriers import Mbarriers
from .memory import Memory, Window
from .parse import Instruction, Kernel
from .poison import Poison
from .products import Products
from .registers import Registers
from .shared import SharedMemory, narrowest_access, uses_async_proxy

# Where the windows of other state spaces begin in generic addresses; no pointer of a process is as large.
SHARED_WINDOW, LOCAL_WINDOW, PARAMETER_WINDOW = 1 << 56, 1 << 57, 1 << 58


@dataclass(eq=False)
class Operation:
    """An instruction bound to a machine."""

    instruction: Instruction
    run: Callable[[Active], object]
    guard: Callable[[Active], np.ndarray] | None = None
    kind: str = ""  # what the scheduler has to do: "branch", "exit", "barrier", "wait" or nothing
    collective: int = 0  # all threads of so many warps execute it together
    members: Callable[[Active], np.ndarray] | None = None  # the lanes that a membermask names, a warp
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    taint: object = None


class Machine(Registers):
    """Runs blocks of one kernel: `begin` says in which launch, `place` which of its blocks."""

    def __init__(self, kernel: Kernel, room: int):
        super().__init__(kernel, room)
        self.late, self.approximate, self.seed, self.observers = True, False, 0, ()
        self.first_lane_stays = False  # of lanes that store to one place; else the last
        self.poison = Poison(self)
        self.carry = np.zeros(room, bool)
        self._shared_bytes, self._local_bytes = self._lay_out(), self._lay_out_local()
        self._narrowest, self._uses_async_proxy = narrowest_access(kernel), uses_async_proxy(kernel)
        self.products = Products(self)

    def begin(self, threads, grid, memory: Memory, shared: int, parameters: np.ndarray) -> None:
        super().begin(threads, grid)
        self.memory, self.parameters, self.dynamic_shared = memory, parameters, shared

    def end(self) -> None:
        """The launch is over: what it alone needed is not kept."""
        self.memory = self.parameters = self.shared = self.local = self.copies = self.bulk = self.mbarriers = None
        self.observers = ()
        self.poison.clear()
        self.products.clear()

    def _resize(self, blocks: int) -> None:
        super()._resize(blocks)
        dynamic = self.dynamic_shared if any(each.bytes is None for each in self.kernel.shared) else 0
        self.shared = SharedMemory(self, self._shared_bytes + dynamic, self._narrowest, self._uses_async_proxy)
        self.local = Window("local", self._local_bytes, self.threads)

    def _nothing_is_under_way(self) -> None:
        self.products.clear()
        self.copies = Copies(self)
        self.bulk, self.mbarriers = Bulk(self), Mbarriers(self)
        self.vain, self.passed = 0, True

    def _lay_out(self) -> int:
        """Variables in shared memory get addresses, those of a size given by the launch the one behind all others.

        Returns the bytes before these.
        """
        end = 0
        for name, size, alignment in sorted(self.kernel.shared, key=lambda each: each.bytes is None):
            start = -(-end // alignment) * alignment
            self.symbols[name] = start
            end = start + size if size is not None else end
        if any(each.bytes is None for each in self.kernel.shared):
            end = max(self.symbols[each.name] for each in self.kernel.shared if each.bytes is None)
        for parameter in self.kernel.parameters:
            self.symbols[parameter.name] = PARAMETER_WINDOW + parameter.offset
        return end

    def _lay_out_local(self) -> int:
        end = 0
        for name, size, alignment in self.kernel.local:
            start = -(-end // alignment) * alignment
            self.symbols[name] = start
            end = start + size
        return end

    def place(self, blocks: np.ndarray) -> None:
        """The batch's blocks are these: [blocks, 3] indices in the grid. All state begins anew."""
        super().place(blocks)
        self.poison.clear()
        self.shared.clear()
        self.local.clear()
        self.carry[:] = False
        self._nothing_is_under_way()

    # Memory ----------------------------------------------------------------------------------------------------------

    def load(self, found: Instruction, space: str, active: Active, addresses, width: int, together: bool = False):
        """Words [threads, n], and which of their bits are poison, or None."""
        self.observe(found, space, active, addresses, width)
        if space == "shared":
            places = self.shared.places(active, addresses, width)
            return self.shared.load(places, width, active.threads, together)
        if space == "global":
            self.memory.check(addresses, width, active.threads)
            return self.memory.load(addresses, width), None
        if space == "local":
            return self.local.load(active, addresses, width)
        return self._load_parameters(active, addresses, width), None

    def store(self, found: Instruction, space: str, active: Active, addresses, words, poison) -> None:
        width = words.shape[1] * words.dtype.itemsize
        self.observe(found, space, active, addresses, width)
        if space == "shared":
            places = self.shared.places(active, addresses, width)
            self.shared.store(places, words, active.threads, poison)
        elif space == "global":
            if poison is not None and poison.any():
                first = np.flatnonzero(poison.any(axis=1))[0]
                raise Fault("stores a value that depends on memory that nothing has written", active.threads[first])
            self.memory.check(addresses, width, active.threads, writes=True)
            self.memory.store(addresses, words)
        elif space == "local":
            self.local.store(active, addresses, words, poison)
        else:
            raise Fault("a store to parameters", active.threads[0])

    def observe(self, found: Instruction, space: str, active: Active, addresses: np.ndarray, width: int) -> None:
        """Tells observers of an access."""
        if space in ("global", "shared"):
            for observer in self.observers:
                observer.accessed(found, space, addresses, width, active.threads)

    def _load_parameters(self, active, addresses, width):
        if (addresses < 0).any() or (addresses + width > len(self.parameters)).any() or (addresses % width).any():
            raise Fault("a load outside of the parameters", active.threads[0])
        words = self.parameters[addresses[:, None] + np.arange(width)]
        return words if width == 1 else words.view(f"u{min(width, 8)}")

    # Synchronisation -------------------------------------------------------------------------------------------------

    def synchronised(self, blocks: np.ndarray, arrivals: list[tuple[Active, bool]]) -> None:
        """A barrier of these blocks is complete."""
        self.shared.races.barrier(blocks, arrivals)

    def warp_synchronised(self, active: Active) -> None:
        """These warps' threads wait for each other."""
        self.shared.races.warp_barrier(active.warps)

    def deliver(self) -> bool:
        """Time passes while all threads wait: something asynchronous happens, if anything is under way."""
        return self.bulk.deliver()

    def finish(self) -> None:
        """All threads have ended."""
        self.bulk.finish()
