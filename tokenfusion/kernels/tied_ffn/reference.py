"""The definition of tied_ffn in plain PyTorch."""

import functools

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}


def tied_ffn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_in: torch.Tensor | None = None,
    bias_out: torch.Tensor | None = None,
    *,
    activation: str = "gelu",
) -> torch.Tensor:
    r"""A feed-forward network whose second matrix is the transpose of its first (Koyun and Töreyin 2024, Eq. 4).

        y = act(x W^T + b_in) W + b_out

    W is used twice, and its gradient is the sum of both uses. With the pre-activation u = x W^T + b_in, a = act(u) and
    the output's gradient g:

        du = (g W^T) * act'(u),    dx = du W,    dW = du^T x + a^T g,    db_in = sum du,    db_out = sum g

    Both products of dW have the shape of W: they are one product, [du; a]^T [x; g], over twice the tokens. u and a are
    F / C times the size of x; computing u again from x is one matrix product more (seven in all and not six) and
    leaves x alone to be held between forward and backward.
    """
    hidden = ACTIVATIONS[activation](F.linear(x, weight, bias_in))
    return F.linear(hidden, weight.t(), bias_out)
