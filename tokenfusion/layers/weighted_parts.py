"""A sum of linear layers, each with its own input, whose outputs are weighted for every image and channel.

    y[b, t] = sum_k a_k[b] * (part_k[b, t] W_k) + bias[b]

The weights a_k[b] scale the columns of W_k, so that each image needs one product with as many K-loops as there are
parts, and the output of no layer is written. The same holds for gradients: M_k[b] = part_k[b]^T dy[b] gives
dW_k = sum_b M_k[b] diag(a_k[b]) as well as da_k[b], the column sums of W_k * M_k[b].
"""

from collections.abc import Sequence

import torch

from tokenfusion.layers.linear import linear

_LARGE_MATRIX = 1 << 17  # bytes; below, the calls cost more than they save


def _pays_by_image(tokens: torch.Tensor, matrices: torch.Tensor) -> bool:
    """Is one image after the other, in the cache and in place, better than a product of the whole batch?"""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and tokens.device.type == "cpu"
        and matrices.shape[-2:].numel() * matrices.element_size() >= _LARGE_MATRIX
        and not torch._C._functorch.is_legacy_batchedtensor(tokens)  # of is_grads_batched
    )


def scaled_weights(weight: torch.Tensor, shares: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """weight [K, D_in, D_out] with its columns scaled by shares [B, K, D_out]: [B, K, D_in, D_out]."""
    return torch.mul(weight, shares.unsqueeze(-2), out=out)


def sum_of_products(
    parts: Sequence[torch.Tensor], matrices: torch.Tensor, bias: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """sum_k parts[k] @ matrices[:, k] + bias, into `out` where given.

    Args:
        parts: [B, T, D_in] each.
        matrices: [B, K, D_in, D_out].
        bias: [B, D_out].
    """
    if parts[0].dtype == torch.float32 and _pays_by_image(parts[0], matrices):
        return _one_product_an_image(parts, matrices, bias, out)
    total = bias.unsqueeze(1)
    for part, matrix in zip(parts, matrices.unbind(1), strict=True):
        total = torch.baddbmm(total, part, matrix, out=out)
    return total


def _one_product_an_image(parts, matrices, bias, out) -> torch.Tensor:
    """The sum as one long product: for float32 oneDNN's is a tenth faster than PyTorch's several, copies included."""
    out = parts[0].new_empty(*parts[0].shape[:2], matrices.shape[3]) if out is None else out
    for target, tokens, matrix, shift in zip(out, zip(*parts), matrices.flatten(1, 2), bias, strict=True):
        target.copy_(linear(torch.cat(tokens, dim=-1), matrix.mT, shift))
    return out


class _WeightedParts(torch.autograd.Function):
    """Keeps the parts alone: the scaled weights of a batch can take more memory than its activations."""

    @staticmethod
    def forward(ctx, shares, weight, bias, *parts):
        ctx.save_for_backward(shares, weight, *parts)
        out = None  # what torch.compile 2.11 sees written in place here gets no gradient, silently
        if not torch.compiler.is_compiling():
            out = parts[0].new_empty(*parts[0].shape[:2], weight.shape[2])
        return sum_of_products(parts, scaled_weights(weight, shares), bias, out=out)

    @staticmethod
    def backward(ctx, grad):
        shares, weight, *parts = ctx.saved_tensors
        gradients = _gradients_by_image if _pays_by_image(grad, weight) else _gradients
        grad_shares, grad_weight, grad_parts = gradients(grad, shares, weight, parts)
        return grad_shares, grad_weight, grad.sum(1), *grad_parts


def _gradients(grad, shares, weight, parts):
    grad_shares, grad_weight, grad_parts = [], [], []
    for k, part in enumerate(parts):
        share = shares[:, k, None]  # [B, 1, D_out]
        grad_parts.append(torch.bmm(grad, (weight[k] * share).mT))
        product = torch.bmm(part.mT, grad)  # [B, D_in, D_out]
        grad_shares.append((product * weight[k]).sum(1))
        grad_weight.append((product * share).sum(0))
    return torch.stack(grad_shares, 1), torch.stack(grad_weight), grad_parts


def _gradients_by_image(grad, shares, weight, parts):
    """The same, image by image: the matrices, which can be larger than the activations, stay in the cache."""
    sums = torch.promote_types(weight.dtype, torch.float32)
    grad_shares = torch.empty(shares.shape, dtype=sums)
    grad_weight = torch.zeros(weight.shape, dtype=sums)
    grad_parts = [torch.empty_like(part) for part in parts]
    wide_weight, wide_shares = weight.to(sums), shares.to(sums)
    scaled, product = torch.empty_like(weight[0]), torch.empty_like(weight[0])
    for image, tokens in enumerate(grad):
        for k, part in enumerate(parts):
            torch.mul(weight[k], shares[image, k], out=scaled)
            torch.mm(tokens, scaled.mT, out=grad_parts[k][image])
            torch.mm(part[image].mT, tokens, out=product)
            wide = product.to(sums)
            grad_weight[k].addcmul_(wide, wide_shares[image, k])
            torch.sum(wide.mul_(wide_weight[k]), 0, out=grad_shares[image, k])
    return grad_shares.to(shares.dtype), grad_weight.to(weight.dtype), grad_parts


def weighted_parts(
    parts: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """The sum above, differentiable.

    Args:
        parts: K tensors [B, T, D_in].
        weight: [K, D_in, D_out].
        bias: [B, D_out].
        shares: [B, K, D_out].

    Returns:
        [B, T, D_out].
    """
    return _WeightedParts.apply(shares, weight, bias, *parts)
