"""Which threads run when: groups at the same instruction, barriers, and the order of warps between them."""

import enum

import numpy as np

from .active import WARP, Active
from .barriers import Waiting
from .errors import Fault
from .machine import Machine, Operation

_MOST_STEPS = 20_000_000
_WAITS_IN_VAIN = 4  # of all groups one after another, which is a deadlock


class Order(enum.Enum):
    """ROUND_ROBIN: the warps of a block advance together. REVERSED: one after another, the last one first, each as far
    as it gets without the others. A number in the place of an Order: so in random sets of warps."""

    ROUND_ROBIN = 0
    REVERSED = 1


class Group:
    """Threads at the same instruction."""

    __slots__ = ("rank", "place", "active", "parked")

    def __init__(self, rank: int, place: int, active: Active):
        self.rank, self.place, self.active = rank, place, active
        # The operation that it cannot go on from: a collective for which threads of its warps are missing, or a wait in
        # vain, after which it does go on when others have had their turn.
        self.parked: Operation | None = None


class Scheduler:
    def __init__(self, machine: Machine, operations: list[Operation], order: Order | int):
        self.machine, self.operations, self.order = machine, operations, order
        self.random = np.random.default_rng(order) if isinstance(order, int) else None
        self.groups: list[Group] = []
        self.barriers: dict[int, Waiting] = {}
        self.live = np.ones(machine.size, bool)
        self.live_count = np.zeros(machine.blocks, np.int64)
        self.steps = 0

    def run(self) -> None:
        machine = self.machine
        self.live[:] = machine.threads % machine.threads_a_block < machine.launched
        self.live_count[:] = machine.launched
        everyone = machine.everyone if self.live.all() else Active(machine, np.flatnonzero(self.live))
        self._release(0, everyone)
        while self.groups:
            self._advance(self._choose())
        if self.barriers:
            raise Fault("deadlock: " + self._who_waits())

    def _choose(self) -> Group:
        ready = [group for group in self.groups if not group.parked]
        if not ready:
            self._nothing_advances()
            ready = self.groups
        return min(ready, key=lambda group: (group.rank, group.place))

    def _nothing_advances(self) -> None:
        machine = self.machine
        waiting = [group for group in self.groups if group.parked.kind == "wait"]
        if machine.deliver():
            machine.vain = 0
        elif waiting and machine.vain < _WAITS_IN_VAIN:
            machine.vain += 1
        else:
            stuck = waiting[0] if waiting else self.groups[0]
            self.current = stuck.parked, stuck.active
            what = "deadlock: " if waiting else "divergent: a warp's other threads do not come to this instruction; "
            raise Fault(what + self._who_waits(), stuck.active.threads[0])
        for group in self.groups:
            group.parked = None

    def _who_waits(self) -> str:
        lines = []
        for group in self.groups:
            lines.append(self._describe(group.parked or self.operations[group.place], group.active))
        for number, waiting in self.barriers.items():
            for place, active in waiting.members:
                what = self._describe(self.operations[place - 1], active)
                arrived = waiting.arrived[active.threads[0] // self.machine.threads_a_block]
                lines.append(f"{what}, barrier {number}, where {arrived} threads arrived")
        lines.append(self.machine.mbarriers.describe())
        return "; ".join(filter(None, lines))

    def _describe(self, operation, active) -> str:
        blocks, warps = np.divmod(active.warps, self.machine.warps_a_block)
        first = blocks[0]
        return (
            f"warps {warps[blocks == first].tolist()} of block {self.machine.block_index[first].tolist()} wait at line "
            f"{operation.instruction.line} ({operation.instruction.text})"
        )

    # Groups ----------------------------------------------------------------------------------------------------------

    def _release(self, place: int, active: Active) -> None:
        """These threads go on there, in sets of warps that run one after another as the order says."""
        machine = self.machine
        if self.order is Order.ROUND_ROBIN:
            self._join(Group(0, place, active))
            return
        count = machine.warps_a_block
        if self.random is None:
            ranks = np.arange(count)[::-1]
        else:
            ranks = self.random.integers(0, 2 if count < 8 else 3, count)
        ranks = ranks[active.threads % machine.threads_a_block // WARP]
        for rank in np.unique(ranks):
            self._join(Group(int(rank), place, Active(machine, active.threads[ranks == rank])))

    def _join(self, group: Group) -> None:
        for other in self.groups:
            if other.place == group.place and other.rank == group.rank:
                threads = np.sort(np.concatenate((other.active.threads, group.active.threads)))
                machine = self.machine
                other.active = machine.everyone if len(threads) == machine.size else Active(machine, threads)
                other.parked = None
                return
        self.groups.append(group)

    def _advance(self, group: Group) -> None:
        """Runs the group until it meets another, splits, waits or ends."""
        stops = {other.place for other in self.groups if other is not group and other.rank == group.rank}
        limit = min((place for place in stops if place > group.place), default=len(self.operations))
        machine, operations, active = self.machine, self.operations, group.active
        poison, observers = machine.poison, machine.observers
        place = group.place
        while True:
            operation = operations[place]
            self.current = operation, active
            self.steps += 1
            if self.steps > _MOST_STEPS:
                raise Fault(f"more than {_MOST_STEPS} steps", active.threads[0])
            doing = active
            if operation.guard is not None:
                doing = self._guarded(operation, active)
            if operation.collective and doing is not None and not self._complete(operation, doing, active):
                group.place, group.parked = place, operation
                if operation.collective > 1:
                    self._gather(group, operation)
                return
            for observer in observers:
                observer.issued(operation.instruction, active.warps)
            kind = operation.kind
            if not kind:
                if doing is not None:
                    if poison.shadows or poison.busy:
                        poison.step(operation, doing)
                    else:
                        operation.run(doing)
                place += 1
            elif kind == "branch":
                if doing is active:
                    place = operation.run
                elif doing is None:
                    place += 1
                else:
                    self._split(group, place, doing, operation.run)
                    return
            elif kind == "wait":
                place += 1
                if doing is not None:
                    if poison.active:
                        poison.step(operation, doing)
                        passed = machine.passed
                    else:
                        passed = operation.run(doing)
                    if passed:
                        machine.vain = 0
                    else:
                        group.place, group.parked = place, operation
                        return
            else:
                group.place = place
                self.groups.remove(group)
                self._leave(operation, group, active, doing)
                return
            if place in stops or place >= limit:
                self.groups.remove(group)
                group.place = place
                self._join(group)
                return

    def _guarded(self, operation, active):
        if self.machine.poison.active:
            self.machine.poison.check_guard(operation, active)
        mask = operation.guard(active)
        if mask.all():
            return active
        return active.only(mask) if mask.any() else None

    def _complete(self, operation, doing: Active, active: Active) -> bool:
        """Whether all threads that the instruction wants of each warp are here; where some never can be, a fault."""
        if operation.members is None:
            complete = doing.full and _whole(doing.warps, operation.collective)
        else:
            complete = self._members_here(operation, doing)
        if not doing.full and doing is not active and active.full:
            raise Fault("divergent: only some threads of a warp execute this instruction", doing.threads[0])
        return complete

    def _members_here(self, operation, doing: Active) -> bool:
        named = operation.members(doing)
        if doing.full:
            if (named == 0xFFFFFFFF).all():
                return True
            raise Fault("a thread executes this instruction that its membermask does not name", doing.threads[0])
        warp = np.searchsorted(doing.warps, doing.threads // WARP)
        here = np.zeros(len(doing.warps), np.uint32)
        np.bitwise_or.at(here, warp, np.uint32(1) << (doing.threads % WARP).astype(np.uint32))
        if (here & ~named).any():
            raise Fault("a thread executes this instruction that its membermask does not name", doing.threads[0])
        lanes = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
        alive = (self.live.reshape(-1, WARP)[doing.warps] * lanes).sum(axis=1, dtype=np.uint32)
        return bool(((named & alive) == here).all())

    def _gather(self, group: Group, operation: Operation) -> None:
        """Warps of other sets that wait at the same instruction of several warps go on with these."""
        others = [each for each in self.groups if each.parked and each.place == group.place and each is not group]
        for other in others:
            self.groups.remove(other)
            threads = np.sort(np.concatenate((other.active.threads, group.active.threads)))
            group.active = Active(self.machine, threads)
        group.parked = None if others else operation

    def _split(self, group: Group, place: int, taken: Active, target: int) -> None:
        self.groups.remove(group)
        stay = np.ones(group.active.count, bool)
        stay[np.searchsorted(group.active.threads, taken.threads)] = False
        self._join(Group(group.rank, place + 1, group.active.only(stay)))
        self._join(Group(group.rank, target, taken))

    # Exits and barriers ----------------------------------------------------------------------------------------------

    def _leave(self, operation, group: Group, active: Active, doing: Active | None) -> None:
        following = group.place + 1
        if doing is not None and doing is not active:
            if operation.kind == "barrier" and operation.run.aligned and active.full and not doing.full:
                raise Fault("divergent: only some threads of a warp come to the barrier", doing.threads[0])
            stay = np.ones(active.count, bool)
            stay[np.searchsorted(active.threads, doing.threads)] = False
            self._join(Group(group.rank, following, active.only(stay)))
        if doing is None:
            self._join(Group(group.rank, following, active))
        elif operation.kind == "exit":
            self.live[doing.threads] = False
            self.live_count -= np.bincount(self.machine.block_of[doing.threads], minlength=self.machine.blocks)
            for number in list(self.barriers):
                self._complete_barrier(number)
        else:
            self._arrive(operation, group, following, doing)

    def _arrive(self, operation: Operation, group: Group, following: int, doing: Active) -> None:
        barrier = operation.run
        if barrier.aligned and not doing.full:
            here = np.bincount(np.searchsorted(doing.warps, doing.threads // WARP), minlength=len(doing.warps))
            if (self.live.reshape(-1, WARP)[doing.warps].sum(axis=1) != here).any():
                group.parked = operation
                self._join(group)
                return
        numbers, counts = barrier.numbers(doing), barrier.counts(doing)
        for number in np.unique(numbers):
            chosen = numbers == number
            part = doing if chosen.all() else doing.only(chosen)
            waiting = self.barriers.setdefault(int(number), Waiting(self.machine.blocks))
            waiting.add(self.machine, part, None if counts is None else counts[chosen], barrier.waits)
            if barrier.waits:
                waiting.members.append((following, part))
            else:
                self._join(Group(group.rank, following, part))
            self._complete_barrier(int(number))

    def _complete_barrier(self, number: int) -> None:
        machine, waiting = self.machine, self.barriers[number]
        wanted = np.where(waiting.wanted > 0, waiting.wanted, self.live_count)
        ready = (waiting.arrived > 0) & (waiting.arrived >= wanted)
        if not ready.any():
            return
        if (waiting.arrived > wanted)[ready].any():
            raise Fault(f"more threads arrive at barrier {number} than it waits for")
        machine.synchronised(ready, waiting.arrivals)
        released = []
        kept = []
        for place, active in waiting.members:
            mask = ready[machine.block_of[active.threads]]
            released.append((place, active if mask.all() else active.only(mask)))
            if not mask.all():
                kept.append((place, active.only(~mask)))
        waiting.members = kept
        waiting.reset(machine, ready)
        if not waiting.arrived.any():
            del self.barriers[number]
        machine.vain = 0
        for place, active in released:
            if active.count:
                self._release(place, active)


def _whole(warps: np.ndarray, together: int) -> bool:
    """Whether of each `together` warps, which begin at a multiple of that, all are here or none."""
    return together <= 1 or len(np.unique(warps // together)) * together == len(warps)
