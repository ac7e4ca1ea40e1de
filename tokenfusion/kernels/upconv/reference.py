"""The definitions of upconv_concat, upconv_concat_project and upconv_add in plain PyTorch."""

import torch
import torch.nn.functional as F

from tokenfusion.kernels.checks import symbolic
from tokenfusion.kernels.dispatch import transform
from tokenfusion.kernels.upconv.shapes import gives_channels_last, memory_format


def upconv_concat(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    skip: torch.Tensor | None,
    *,
    skip_first: bool = False,
) -> torch.Tensor:
    r"""A transposed convolution whose kernel is its stride, concatenated with a skip connection.

    Kernel and stride being one number k, no two input pixels reach the same output pixel, and the convolution is one
    matrix product over the pixels of x followed by a rearrangement (depth to space):

        up[b, co, y k + i, x k + j] = sum_ci x[b, ci, y, x] weight[ci, co, i, j] + bias[co]

    so a kernel can store each element of the product at its place in the concatenation; the up-sampled map itself need
    not exist. In the backward pass the gradient of the product is read from its slice of the output's gradient by the
    inverse rearrangement, and the gradient of the skip is the other slice.
    """
    trains = not symbolic(x) and torch.is_grad_enabled() and x.requires_grad
    make_up = _up_as_product if trains and convolution_gives_wrong_gradient(x) else _up
    up = make_up(x, weight, bias)
    if skip is None:
        return up
    return torch.cat((skip, up) if skip_first else (up, skip), dim=1)


def _up(x, weight, bias):
    scale = weight.shape[2]
    return F.conv_transpose2d(x, weight, bias, stride=scale if symbolic(scale) else int(scale))


def convolution_gives_wrong_gradient(x: torch.Tensor) -> bool:
    """May PyTorch's gradient of x be wrong?

    It is a convolution of the output's gradient. That of oneDNN in PyTorch 2.11 is as wrong as random numbers in
    bfloat16 on processors with AMX, for fewer than 32 channels where channels x k is a multiple of 32 and not 32. In
    float16 it is right, and takes many times as long as a product.
    """
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def _up_as_product(x, weight, bias):
    up = up_as_product(x, weight, bias)
    if transform() is not None:  # memory formats are nothing to it
        return up
    return up.contiguous(memory_format=memory_format(gives_channels_last(x)))


def up_as_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The up-convolution as the matrix product above: what second derivatives are taken of.

    PyTorch's second derivative of a convolution does not take symbolic sizes.
    """
    up = torch.einsum("bcyx,cdij->bdyixj", x, weight).flatten(4, 5).flatten(2, 3)
    return up if bias is None else up + bias[:, None, None]


def gradient_as_product(grad_up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """That of x, as the product above."""
    scale = weight.shape[2]
    patches = grad_up.unflatten(3, (-1, scale)).unflatten(2, (-1, scale))
    return torch.einsum("bdyixj,cdij->bcyx", patches, weight)


def upconv_concat_project(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    skip: torch.Tensor | None,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None,
    *,
    skip_first: bool = False,
) -> torch.Tensor:
    r"""upconv_concat followed by a 1x1 convolution.

    With proj_weight = [P_up | P_skip], cut where the concatenation is, and U the up-convolution's weight:

        P [U x + b | skip] + c = P_up U x + P_skip skip + (P_up b + c)

    a sum of two products that needs neither the concatenation nor the up-sampled map. P_up U is an up-convolution's
    weight again, and a small product; where there are few pixels, P_up (U x) takes fewer multiplications.
    """
    joined = upconv_concat(x, weight, bias, skip, skip_first=skip_first)
    return F.conv2d(joined, proj_weight[:, :, None, None], proj_bias)


def upconv_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, skip: torch.Tensor) -> torch.Tensor:
    """An up-convolution whose kernel is its stride, plus a skip connection: P_up = P_skip = 1 in the above."""
    return upconv_concat(x, weight, bias, None) + skip


def upconv_projected_sum(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    skip: torch.Tensor | None,
    proj_up: torch.Tensor | None,
    proj_skip: torch.Tensor | None,
) -> torch.Tensor:
    """P_up U x + P_skip skip + bias, each projection 1 where it is None: what the kernels of both compute."""
    return _sum(upconv_concat(x, weight, None, None), bias, skip, proj_up, proj_skip)


def projected_sum_as_products(x, weight, bias, skip, proj_up, proj_skip) -> torch.Tensor:
    """The same by matrix products alone: what second derivatives are taken of."""
    up = up_as_product(x, weight, x.new_zeros(weight.shape[1]))
    return _sum(up, bias, skip, proj_up, proj_skip)


def _sum(up, bias, skip, proj_up, proj_skip) -> torch.Tensor:
    out = _project(up, proj_up)
    if skip is not None:
        out = out + _project(skip, proj_skip)
    return out if bias is None else out + bias[:, None, None]


def _project(maps: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return maps if weight is None else torch.einsum("pc,bcyx->bpyx", weight, maps)


def compose(weight: torch.Tensor, proj_up: torch.Tensor) -> torch.Tensor:
    """P_up U: [Cin, Cout, k, k] -> [Cin, Cp, k, k], channels_last."""
    by_pixel = weight.permute(0, 2, 3, 1)
    rows = by_pixel.reshape(-1, weight.shape[1])  # one product; F.linear would make one for each k of a strided weight
    return (rows @ proj_up.t()).unflatten(0, by_pixel.shape[:3]).permute(0, 3, 1, 2)
