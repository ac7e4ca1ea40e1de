"""mbarriers: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier"."""

import numpy as np

from ..errors import Fault
from ..registry import instruction

_SCOPE = "shared shared::cta cta cluster release acquire relaxed"


def _constant(active, values):
    return np.broadcast_to(values, active.count).astype(np.int64)


@instruction("mbarrier.init", "b64", "shared shared::cta")
def _init(found, machine):
    address, count = machine.address(found.operands[0]), machine.source(found.operands[1], "u32")
    return lambda active: machine.mbarriers.init(active, address(active), _constant(active, count(active)))


@instruction("mbarrier.inval", "b64", "shared shared::cta")
def _inval(found, machine):
    address = machine.address(found.operands[0])
    return lambda active: machine.mbarriers.invalidate(active, address(active))


@instruction("mbarrier.arrive", "b64", f"{_SCOPE} expect_tx shared::cluster")
def _arrive(found, machine):
    """Returns the phase of the arrival as the opaque state; expect_tx comes before the arrival."""
    *state, place = found.operands[: 2 if len(found.operands) > 1 and _has_state(found) else 1]
    rest = found.operands[len(state) + 1 :]
    address = machine.address(place)
    write = machine.destination(state[0], "b64") if state else None
    expects = found.has("expect_tx")
    number = machine.source(rest[0], "u32") if rest else None
    if expects and number is None:
        raise Fault("mbarrier.arrive.expect_tx without a number of bytes")

    def run(active):
        given = _constant(active, 1 if number is None else number(active))
        ones = _constant(active, 1)
        phases = machine.mbarriers.arrive(
            active, address(active), ones if expects else given, given if expects else None
        )
        if write:
            write(active, phases.astype(np.uint64))

    return run


def _has_state(found) -> bool:
    return type(found.operands[0]).__name__ != "Address"


@instruction("mbarrier.expect_tx", "b64", _SCOPE)
def _expect(found, machine):
    address, size = machine.address(found.operands[0]), machine.source(found.operands[1], "u32")
    return lambda active: machine.mbarriers.expect(active, address(active), _constant(active, size(active)))


@instruction("mbarrier.test_wait", "b64", f"{_SCOPE} parity", kind="wait")
@instruction("mbarrier.try_wait", "b64", f"{_SCOPE} parity", kind="wait")
def _wait(found, machine):
    """A wait in vain gives false at once; the thread goes on when others have had their turn."""
    write, address = machine.destination(found.operands[0], "pred"), machine.address(found.operands[1])
    parity = found.has("parity")
    phase = machine.source(found.operands[2], "u32" if parity else "b64")

    def run(active):
        phases = _constant(active, phase(active))
        if parity and (phases > 1).any():
            raise Fault("a parity is 0 or 1", active.threads[0])
        passed = machine.mbarriers.test(active, address(active), phases, parity)
        write(active, passed)
        return bool(passed.all())

    return run


@instruction("cp.async.mbarrier.arrive", "b64", "noinc shared shared::cta")
def _arrive_after_copies(found, machine):
    """Arrives when the thread's copies by cp.async are done."""
    address, counted = machine.address(found.operands[0]), found.has("noinc")

    def run(active):
        places = address(active)
        if not counted:
            raise Fault("cp.async.mbarrier.arrive without .noinc is not known")

        issued = machine.copies.issued

        def arrive():
            machine.copies.wait_all(active, issued)
            machine.mbarriers.arrive(active, places, np.ones(active.count, np.int64))

        machine.bulk.arrivals.append(arrive) if machine.late else arrive()

    return run
