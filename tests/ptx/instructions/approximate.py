"""Approximate functions: PTX ISA, "Floating Point Instructions", with the maximum errors documented there.

By default the correctly rounded value; on a machine that is `approximate`, off by a share of the documented error which
depends on nothing but the operand.
"""

import numpy as np

from ..formats import flush
from ..registry import instruction


def share(values: np.ndarray) -> np.ndarray:
    """A number in [-1, 1] for each float32, always the same for the same bits, else without pattern."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits ^ (bits >> np.uint64(15))) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (bits >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1


def _relative(bound):
    return lambda values, operand: values * (1 + bound * share(operand))


def _units(bound):
    """In units of the result's last place, to which rounding adds half of one."""
    return lambda values, operand: values + (bound - 0.5) * _unit(values) * share(operand)


def _unit(values):
    single = np.abs(values).astype(np.float32)
    return np.where(np.isfinite(single), np.spacing(single), 0).astype(np.float64)


def _absolute(bound):
    return lambda values, operand: values + bound * share(operand)


def _unary(found, machine, function, error):
    read, write = machine.source(found.operands[1], "f32"), machine.destination(found.operands[0], "f32")
    zeros = found.has("ftz")

    def run(active):
        operand = np.asarray(read(active))
        if zeros:
            operand = flush(operand)
        exact = function(operand.astype(np.float64))
        if machine.approximate:
            exact = error(exact, operand)
        result = np.asarray(exact).astype(np.float32)
        write(active, flush(result) if zeros else result)

    return run


@instruction("ex2.approx", "f32", "ftz")
def _ex2(found, machine):
    """Relative error 2^-22.5 over the full range; 1 for zeros."""
    error = _relative(2.0**-22.5)
    return _unary(
        found, machine, np.exp2, lambda values, operand: np.where(operand == 0, values, error(values, operand))
    )


@instruction("lg2.approx", "f32", "ftz")
def _lg2(found, machine):
    """Absolute error 2^-22 where the operand is in (0.5, 2), relative error 2^-22 elsewhere."""

    def error(values, operand):
        inside = (operand > 0.5) & (operand < 2)
        return np.where(inside, values + 2.0**-22 * share(operand), values * (1 + 2.0**-22 * share(operand)))

    return _unary(found, machine, np.log2, error)


@instruction("rcp.approx", "f32", "ftz")
def _rcp(found, machine):
    """Error 1 ulp."""
    return _unary(found, machine, np.reciprocal, _units(1))


@instruction("rsqrt.approx", "f32", "ftz")
def _rsqrt(found, machine):
    """Relative error 2^-22.9."""
    return _unary(found, machine, lambda values: 1 / np.sqrt(values), _relative(2.0**-22.9))


@instruction("sqrt.approx", "f32", "ftz")
def _sqrt(found, machine):
    """Relative error 2^-23."""
    return _unary(found, machine, np.sqrt, _relative(2.0**-23))


@instruction("sin.approx", "f32", "ftz")
def _sin(found, machine):
    """Absolute error 2^-20.5 in [-2 pi, 2 pi]."""
    return _unary(found, machine, np.sin, _absolute(2.0**-20.5))


@instruction("cos.approx", "f32", "ftz")
def _cos(found, machine):
    """Absolute error 2^-20.5 in [-2 pi, 2 pi]."""
    return _unary(found, machine, np.cos, _absolute(2.0**-20.5))


@instruction("tanh.approx", "f32")
def _tanh(found, machine):
    """Relative error 2^-11."""
    return _unary(found, machine, np.tanh, _relative(2.0**-11))


@instruction("div.approx", "f32", "ftz")
@instruction("div.full", "f32", "ftz")
def _div(found, machine):
    """2 ulp: .full over the full range, .approx where the divisor is in [2^-126, 2^126]."""
    first, second = (machine.source(each, "f32") for each in found.operands[1:])
    write = machine.destination(found.operands[0], "f32")
    zeros = found.has("ftz")

    def run(active):
        a, b = np.asarray(first(active)), np.asarray(second(active))
        if zeros:
            a, b = flush(a), flush(b)
        exact = a.astype(np.float64) / b
        if machine.approximate:
            exact = _units(2)(exact, np.asarray(exact, np.float32))
        result = np.asarray(exact).astype(np.float32)
        write(active, flush(result) if zeros else result)

    return run
