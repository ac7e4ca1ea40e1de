"""How many floating-point operations dynamic_mixing's products take, of the shapes of its arguments."""

from math import prod


def _of_one_product(x, compressed, dim) -> tuple[int, int]:
    """Of generating all matrices, and of mixing with them."""
    return 2 * x[dim] ** 2 * prod(compressed), 2 * x[dim] * prod(x)


def forward(x, compressed, generate_weight, generate_bias, segments, dim, with_mean) -> int:
    return sum(_of_one_product(x, compressed, dim))


def backward(grad_mixed, grad_mean, x, compressed, generate_weight, generate_bias, segments, dim, needed) -> int:
    """The matrices again; with any gradient but that of x their own gradients, of which the others are made."""
    generate, mix = _of_one_product(x, compressed, dim)
    return (1 + needed[1] + needed[2]) * generate + (needed[0] + any(needed[1:])) * mix
