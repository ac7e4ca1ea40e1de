"""Control flow and synchronisation: PTX ISA, "Control Flow", "Parallel Synchronization and Communication"."""

from dataclasses import replace

import numpy as np

from ..errors import Fault
from ..operands import Immediate, Symbol
from ..registry import instruction


@instruction("bra", "", "uni", kind="branch")
def _bra(found, machine):
    target = found.operands[0]
    if not isinstance(target, Symbol) or target.name not in machine.kernel.labels:
        raise Fault("the branch leads nowhere")
    return machine.kernel.labels[target.name]


@instruction("ret", "", "uni", kind="exit")
@instruction("exit", kind="exit")
def _exit(found, machine):
    return None


@instruction("trap")
def _trap(found, machine):
    def run(active):
        raise Fault("trap", active.threads[0])

    return run


class Barrier:
    """bar and barrier: which barrier, how many threads (None: all of the block), and whether these wait."""

    def __init__(self, found, machine, waits: bool, aligned: bool):
        operands = found.operands
        self.read_number = machine.source(operands[0], "u32")
        self.read_count = machine.source(operands[1], "u32") if len(operands) > 1 else None
        self.waits, self.aligned = waits, aligned
        if not waits and self.read_count is None:
            raise Fault("bar.arrive without a number of threads")

    def numbers(self, active):
        numbers = np.broadcast_to(self.read_number(active), active.count)
        if (numbers > 16).any():
            raise Fault("there are 16 barriers", active.threads[0])
        return numbers

    def counts(self, active):
        """Threads that the barrier waits for, or None."""
        if self.read_count is None:
            return None
        counts = np.broadcast_to(self.read_count(active), active.count).astype(np.int64)
        if (counts % 32).any() or (counts == 0).any():
            raise Fault("a barrier's number of threads is no multiple of a warp", active.threads[0])
        return counts


@instruction("bar.sync", kind="barrier")
@instruction("bar.cta.sync", kind="barrier")
@instruction("barrier.sync.aligned", kind="barrier")
@instruction("barrier.cta.sync.aligned", kind="barrier")
def _sync_aligned(found, machine):
    return Barrier(found, machine, waits=True, aligned=True)


@instruction("barrier.sync", kind="barrier")
@instruction("barrier.cta.sync", kind="barrier")
def _sync(found, machine):
    return Barrier(found, machine, waits=True, aligned=False)


@instruction("bar.arrive", kind="barrier")
@instruction("bar.cta.arrive", kind="barrier")
@instruction("barrier.arrive.aligned", kind="barrier")
@instruction("barrier.cta.arrive.aligned", kind="barrier")
def _arrive_aligned(found, machine):
    return Barrier(found, machine, waits=False, aligned=True)


@instruction("barrier.arrive", kind="barrier")
@instruction("barrier.cta.arrive", kind="barrier")
def _arrive(found, machine):
    return Barrier(found, machine, waits=False, aligned=False)


@instruction("fence.proxy.async", "", "shared::cta shared::cluster global")
def _fence_proxy(found, machine):
    return lambda active: machine.shared.fence(active)


@instruction("barrier.cluster.wait", "", "acquire aligned", kind="barrier")
def _cluster_wait(found, machine):
    """Of the block's threads, a cluster being one block; barrier.cluster.arrive does nothing."""
    return Barrier(replace(found, operands=(Immediate(16),)), machine, waits=True, aligned=False)


@instruction("mapa", "u32 u64", "shared::cluster")
def _mapa(found, machine):
    """The same address, as block 0 is the only one of the cluster."""
    kind = found.types[0]
    read, write = machine.source(found.operands[1], kind), machine.destination(found.operands[0], kind)
    rank = machine.source(found.operands[2], "u32")

    def run(active):
        if np.any(rank(active) != 0):
            raise Fault("a cluster is one block here", active.threads[0])
        write(active, read(active))

    return run


def _nothing(found, machine):
    return lambda active: None


for _name, _modifiers in {
    "membar": "cta gl sys",
    "fence": "sc acq_rel acquire release cta cluster gpu sys",
    "fence.mbarrier_init.release.cluster": "",
    "barrier.cluster.arrive": "release relaxed aligned",
    "griddepcontrol": "launch_dependents wait",
    "nanosleep": "u32",
    "setmaxnreg.inc": "sync aligned u32",
    "setmaxnreg.dec": "sync aligned u32",
}.items():
    instruction(_name, "u32", _modifiers)(_nothing)
