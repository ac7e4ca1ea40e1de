"""What an instruction's operands are."""

from typing import NamedTuple


class Register(NamedTuple):
    name: str
    negated: bool = False


class Special(NamedTuple):
    """%tid.x and its like."""

    name: str


class Immediate(NamedTuple):
    """An integer, or the bits of a floating-point number of `float_bits` bits."""

    value: int
    float_bits: int = 0


class Symbol(NamedTuple):
    """A parameter, a variable, or a label."""

    name: str


class Vector(NamedTuple):
    elements: tuple


def elements(operand) -> tuple:
    return operand.elements if isinstance(operand, Vector) else (operand,)


class Pair(NamedTuple):
    """d|p: two destinations."""

    first: Register
    second: Register


class Address(NamedTuple):
    base: object
    offset: int = 0
    coordinates: Vector | None = None
