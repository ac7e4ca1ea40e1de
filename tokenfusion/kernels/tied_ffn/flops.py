"""How many floating-point operations tied_ffn's products take, of the shapes of its arguments."""

from math import prod


def _of_one_product(x, weight) -> int:
    return 2 * prod(x) * weight[0]


def forward(x, weight, bias_in, bias_out, activation, hold) -> int:
    return 2 * _of_one_product(x, weight)


def backward(grad_y, x, weight, bias_in, hidden, activation, needed) -> int:
    """The hidden layer again where it was not held, its gradient, that of x, and two products for the weight's."""
    if not any(needed[:3]):
        return 0
    again = prod(hidden) == 0
    return (1 + again + needed[0] + 2 * needed[1]) * _of_one_product(x, weight)
