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
    """An up-convolution whose kernel is its stride, plus a skip connection: P_up = P_skip = 1 in the above."""
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
    return _sum(reference.upconv_concat(x, weight, None, None), bias, skip, proj_up, proj_skip)


def projected_sum_as_products(x, weight, bias, skip, proj_up, proj_skip) -> torch.Tensor:
    """The same by matrix products alone: what second derivatives are taken of."""
    up = reference.up_as_product(x, weight, x.new_zeros(weight.shape[1]))
    return _sum(up, bias, skip, proj_up, proj_skip)


def _sum(up, bias, skip, proj_up, proj_skip) -> torch.Tensor:
    out = _project(up, proj_up)
    if skip is not None:
        out = out + _project(skip, proj_skip)
    return out if bias is None else out + bias[:, None, None]


def _project(maps: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return maps if weight is None else torch.einsum("pc,bcyx->bpyx", weight, maps)
