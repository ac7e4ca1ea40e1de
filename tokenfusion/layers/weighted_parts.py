"""A sum of linear layers, each with its own input, whose outputs are weighted for every image and channel.

    y[b, t] = sum_k a_k[b] * (part_k[b, t] W_k^T + bias_k)

The weights a_k[b] scale the output channels of W_k, so that each image needs one product with as many K-loops as there
are parts, and the output of no layer is written. The same holds for gradients: M_k[b] = dy[b]^T part_k[b] gives
dW_k = sum_b diag(a_k[b]) M_k[b] as well as da_k[b], the row sums of W_k * M_k[b].
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F

from tokenfusion.kernels import dispatch, extension
from tokenfusion.kernels.library import define_without_gradient
from tokenfusion.layers.linear import kernels_may_run, linear

_LARGE_MATRIX = 1 << 17  # bytes; below, and in bfloat16, PyTorch's products of a whole batch are as fast in backward


def _flops(out, parts, weights, shares, bias, proj_weight, proj_bias) -> int:
    return _flops_of_sum(parts, weights) + (0 if proj_weight is None else 2 * prod(out) * proj_weight[1])


def _flops_backward(grad, shares, parts, weights) -> int:
    return 2 * _flops_of_sum(parts, weights)


def _flops_of_sum(parts, weights) -> int:
    return sum(2 * prod(part) * weight[0] for part, weight in zip(parts, weights, strict=True))


_run_kernel = define_without_gradient(
    "weighted_parts",
    "(Tensor(a!) out, Tensor[] parts, Tensor[] weights, Tensor shares, Tensor bias,"
    " Tensor? proj_weight, Tensor? proj_bias) -> ()",
    flops=_flops,
)
_run_kernel_backward = define_without_gradient(
    "weighted_parts_backward",
    "(Tensor grad, Tensor shares, Tensor[] parts, Tensor[] weights)"
    " -> (Tensor grad_shares, Tensor[] grad_weights, Tensor[] grad_parts)",
    flops=_flops_backward,
)


def _kernel_serves(tokens: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """Whether the C++ kernel takes the sum, and is faster than PyTorch's products."""
    return kernels_may_run(tokens, *weights) and tokens.dtype in extension.own_product_dtypes()


def _products(
    parts: Sequence[torch.Tensor], matrices: Sequence[torch.Tensor], bias: torch.Tensor, add: Callable = torch.baddbmm
) -> torch.Tensor:
    """sum_k parts[k] @ matrices[k] + bias, for each image; `add` adds a further product to the sum."""
    total = torch.baddbmm(bias.unsqueeze(1), parts[0], matrices[0])
    for part, matrix in zip(parts[1:], matrices[1:], strict=True):
        total = add(total, part, matrix)
    return total


def _scaled(weights: Sequence[torch.Tensor], shares: torch.Tensor) -> list[torch.Tensor]:
    """K matrices [B, D_in, D_out]."""
    of_parts = shares.unbind(1)  # torch.fx iterates over nothing, and TorchScript's ONNX exporter has no mT
    return [weight.t() * of_parts[k].unsqueeze(1) for k, weight in enumerate(weights)]


def _weighted_bias(biases: Sequence[torch.Tensor | None], shares: torch.Tensor) -> torch.Tensor:
    """[B, D_out]."""
    bias, of_parts = torch.zeros_like(shares[:, 0]), shares.unbind(1)
    for k, given in enumerate(biases):
        if given is not None:
            bias = torch.addcmul(bias, given, of_parts[k])
    return bias


class _WeightedParts(torch.autograd.Function):
    """Keeps the parts alone: the scaled weights of a batch can take more memory than its activations."""

    @staticmethod
    def forward(ctx, shares, bias, *tensors):
        ctx.save_for_backward(shares, *tensors)
        weights, parts = tensors[: shares.shape[1]], tensors[shares.shape[1] :]
        if not _kernel_serves(parts[0], weights):
            return _products(parts, _scaled(weights, shares), bias)
        out = parts[0].new_empty(*parts[0].shape[:2], shares.shape[2])
        _run_kernel(out, parts, weights, shares, bias, None, None)
        return out

    @staticmethod
    def backward(ctx, grad):
        shares, *tensors = ctx.saved_tensors
        weights, parts = tensors[: shares.shape[1]], tensors[shares.shape[1] :]
        by_kernel = grad.dtype == torch.float32 and weights[0].nbytes >= _LARGE_MATRIX and _kernel_serves(grad, weights)
        gradients = _run_kernel_backward if by_kernel else _gradients
        grad_shares, grad_weights, grad_parts = gradients(grad, shares, parts, weights)
        return grad_shares, grad.sum(1), *grad_weights, *grad_parts


def _gradients(grad, shares, parts, weights):
    grad_shares, grad_weights, grad_parts = [], [], []
    for share, weight, part in zip(shares.unbind(1), weights, parts, strict=True):
        share = share.unsqueeze(2)  # [B, D_out, 1]
        grad_parts.append(torch.bmm(grad, weight * share))
        product = torch.bmm(grad.mT, part)  # [B, D_out, D_in]
        grad_shares.append((product * weight).sum(2))
        grad_weights.append((product * share).sum(0))
    return torch.stack(grad_shares, 1), grad_weights, grad_parts


def weighted_parts(
    parts: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    shares: torch.Tensor,
) -> torch.Tensor:
    """The sum above, differentiable.

    Args:
        parts: K tensors [B, T, D_in].
        weights: K tensors [D_out, D_in]; biases: K tensors [D_out] or None.
        shares: [B, K, D_out].

    Returns:
        [B, T, D_out].
    """
    bias = _weighted_bias(biases, shares)
    if dispatch.transform() is not None:
        return _products(parts, _scaled(weights, shares), bias)
    return _WeightedParts.apply(shares, bias, *weights, *parts)


def project_weighted_parts(
    parts: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    shares: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    *,
    out: torch.Tensor,
) -> None:
    """A linear layer [D_out, D_out] after the sum above, into `out`, where no gradient is recorded."""
    bias, tokens, inputs = _weighted_bias(biases, shares), parts[0].shape[1], len(parts) * parts[0].shape[2]
    if tokens < 2 * inputs and _kernel_serves(parts[0], weights):
        _run_kernel(out, parts, weights, shares, bias, proj_weight, proj_bias)
        return
    matrices, add = _scaled(weights, shares), torch.Tensor.baddbmm_
    if inputs < tokens:  # then projecting the weights is less work than projecting the tokens
        projected = [matrix @ proj_weight.mT for matrix in matrices]
        out.copy_(_products(parts, projected, F.linear(bias, proj_weight, proj_bias), add))
    else:
        out.copy_(linear(_products(parts, matrices, bias, add), proj_weight, proj_bias))
