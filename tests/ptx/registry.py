"""Which instructions are known, in which types and with which modifiers."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from .errors import Fault
from .formats import TYPES
from .machine import Machine, Operation
from .operands import Register
from .parse import Instruction, Kernel


class _Entry(NamedTuple):
    name: tuple[str, ...]
    types: frozenset[str]
    modifiers: frozenset[str]
    bind: Callable
    kind: str
    collective: int


_ENTRIES: dict[str, list[_Entry]] = {}


def instruction(name: str, types: str = "", modifiers: str = "", kind: str = "", collective: int = 0):
    """Declares the function that binds an instruction: (Instruction, Machine) -> function of the active threads.

    `name` is the opcode with the modifiers that make it another instruction (`cp.async.bulk`). What is named in neither
    `types` nor `modifiers` is an error in a kernel. collective: how many warps run it together.
    """
    entry = tuple(name.split("."))

    def declare(bind):
        made = _Entry(entry, frozenset(types.split()), frozenset(modifiers.split()), bind, kind, collective)
        entries = _ENTRIES.setdefault(entry[0], [])
        entries.append(made)
        entries.sort(key=lambda each: -len(each.name))
        return bind

    return declare


@functools.cache
def _find(words: tuple[str, ...]) -> _Entry:
    reason = f"the instruction {words[0]} is not known"
    for entry in _ENTRIES.get(words[0], ()):
        if not _starts(words, entry.name):
            continue
        rest = [word for word in words[1:] if word not in entry.name]
        unknown = [word for word in rest if word not in entry.types and word not in entry.modifiers]
        if not unknown:
            return entry
        what = "type" if unknown[0] in TYPES else "modifier"
        reason = f"the {what} .{unknown[0]} of {'.'.join(entry.name)} is not known"
    raise Fault(reason)


def _starts(words: tuple[str, ...], name: tuple[str, ...]) -> bool:
    return words[: len(name)] == name


def check(kernel: Kernel) -> list[tuple[Instruction, str]]:
    """Instructions that are not known, each with the reason."""
    unknown = []
    for each in kernel.instructions:
        try:
            _find((each.opcode, *each.modifiers))
        except Fault as fault:
            unknown.append((each, fault.message))
    return unknown


def bind(found: Instruction, machine: Machine) -> Operation:
    """The instruction ready to run in the machine's registers."""
    entry = _find((found.opcode, *found.modifiers))
    machine.taken()
    bound = entry.bind(found, machine)
    extras = {}
    if isinstance(bound, tuple):
        bound, extras = bound
    reads, writes = machine.taken()
    guard = machine.source(found.guard, "pred") if isinstance(found.guard, Register) else None
    return Operation(
        found, bound, guard, **(dict(kind=entry.kind, collective=entry.collective, reads=reads, writes=writes) | extras)
    )
