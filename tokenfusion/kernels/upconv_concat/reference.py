"""The definition of upconv_concat in plain PyTorch."""

import torch
import torch.nn.functional as F

from tokenfusion.kernels.checks import symbolic


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
    scale = weight.shape[2]
    up = F.conv_transpose2d(x, weight, bias, stride=scale if symbolic(scale) else int(scale))
    if skip is None:
        return up
    return torch.cat((skip, up) if skip_first else (up, skip), dim=1)


def up_as_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The up-convolution as the matrix product above: what second derivatives are taken of.

    PyTorch's second derivative of a convolution does not take symbolic sizes.
    """
    up = torch.einsum("bcyx,cdij->bdyixj", x, weight).flatten(4, 5).flatten(2, 3)
    return up + bias[:, None, None]
