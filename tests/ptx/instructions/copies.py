"""Asynchronous copies without bulk: PTX ISA, "cp.async", "cp.async.commit_group", "cp.async.wait_group"."""

import numpy as np

from ..errors import Fault
from ..registry import instruction


@instruction("cp.async", "b64", "ca cg shared shared::cta global L2::64B L2::128B L2::256B L2::cache_hint")
def _cp_async(found, machine):
    """The bytes beyond src-size are zeros; with an ignore-src predicate that holds, all are."""
    write, read = machine.address(found.operands[0]), machine.address(found.operands[1])
    width = found.operands[2].value
    if width not in ((16,) if found.has("cg") else (4, 8, 16)):
        raise Fault(f"cp.async of {width} bytes")
    rest = found.operands[3 : 4 if found.has("L2::cache_hint") and len(found.operands) == 5 else None]
    if found.has("L2::cache_hint") and len(found.operands) == 4:
        rest = ()
    size = machine.source(rest[0], "u32") if rest else None

    def run(active):
        targets, sources = write(active), read(active)
        sizes = np.broadcast_to(width if size is None else size(active), active.count).astype(np.int64)
        if (sizes > width).any():
            raise Fault("cp.async of more bytes than its size", active.threads[np.flatnonzero(sizes > width)[0]])
        machine.observe(found, "shared", active, targets, width)
        used = active if (sizes > 0).all() else active.only(sizes > 0)
        if used.count:
            some = sources[sizes > 0]
            machine.observe(found, "global", used, some, width)
            machine.memory.check_parts(some, width, sizes[sizes > 0], used.threads)
        machine.copies.issue(active, machine.shared.places(active, targets, width), sources, width, sizes)

    return run


@instruction("cp.async.commit_group")
def _commit(found, machine):
    return lambda active: machine.copies.commit(active)


@instruction("cp.async.wait_group")
def _wait_group(found, machine):
    pending = found.operands[0].value
    return lambda active: machine.copies.wait(active, pending)


@instruction("cp.async.wait_all")
def _wait_all(found, machine):
    return lambda active: machine.copies.wait_all(active)
