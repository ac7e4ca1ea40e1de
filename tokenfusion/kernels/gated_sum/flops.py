"""How many floating-point operations gated_sum's products take, of the shapes of its arguments."""

from math import prod


def forward(branches, weights, gates, bias, proj_weight, proj_bias, out) -> int:
    return _of_layers(branches, weights) + (0 if proj_weight is None else 2 * prod(out) * proj_weight[1])


def backward(grad, gates, branches, weights) -> int:
    return 2 * _of_layers(branches, weights)


def _of_layers(branches, weights) -> int:
    return sum(2 * prod(branch) * weight[0] for branch, weight in zip(branches, weights, strict=True))
