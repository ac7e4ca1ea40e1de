"""The definitions of upconv_concat_project and upconv_add in plain PyTorch."""

import torch
import torch.nn.functional as F

from tokenfusion.kernels.upconv_concat import reference


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
    joined = reference.upconv_concat(x, weight, bias, skip, skip_first=skip_first)
    return F.conv2d(joined, proj_weight[:, :, None, None], proj_bias)


def upconv_add(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, skip: torch.Tensor) -> torch.Tensor:
    """An up-convolution whose kernel is its stride, and the sum with a skip connection: P_up = P_skip = 1 in the above."""
    return reference.upconv_concat(x, weight, bias, None) + skip


def upconv_projected_sum(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    skip: torch.Tensor | None,
    proj_up: torch.Tensor | None,
    proj_skip: torch.Tensor | None,
) -> torch.Tensor:
    """P_up U x + P_skip skip + bias, each projection 1 where it is None: what the kernels of both compute."""
    up = reference.upconv_concat(x, weight, None, None)
    out = up if proj_up is None else F.conv2d(up, proj_up[:, :, None, None])
    if skip is not None:
        out = out + (skip if proj_skip is None else F.conv2d(skip, proj_skip[:, :, None, None]))
    return out if bias is None else out + bias[:, None, None]
