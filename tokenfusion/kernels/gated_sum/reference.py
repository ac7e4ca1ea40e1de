"""The definition of gated_sum in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F


def gated_sum(
    branches: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    gates: torch.Tensor,
    proj_weight: torch.Tensor | None = None,
    proj_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""A sum of linear layers, each of its own input, whose outputs are scaled for every image and channel.

        y[b, t] = sum_k g_k[b] * (branch_k[b, t] W_k^T + bias_k)

    The gates g_k[b] scale the output channels of W_k, so that each image needs one product with as many loops over its
    depth as there are branches, and the output of no layer is written. The same holds for gradients: M_k[b] =
    dy[b]^T branch_k[b] gives dW_k = sum_b diag(g_k[b]) M_k[b] as well as dg_k[b], the row sums of W_k * M_k[b].
    """
    y = of_scaled(branches, scaled(weights, gates), gated_bias(biases, gates))
    return y if proj_weight is None else F.linear(y, proj_weight, proj_bias)


def gated_bias(biases: Sequence[torch.Tensor | None], gates: torch.Tensor) -> torch.Tensor:
    """sum_k g_k bias_k, [B, D_out]."""
    bias, of_branches = torch.zeros_like(gates[:, 0]), gates.unbind(1)
    for k, given in enumerate(biases):
        if given is not None:
            bias = torch.addcmul(bias, given, of_branches[k])
    return bias


def scaled(weights: Sequence[torch.Tensor], gates: torch.Tensor) -> list[torch.Tensor]:
    """(diag(g_k) W_k)^T for each image: K matrices [B, D_in, D_out]."""
    of_branches = gates.unbind(1)  # torch.fx iterates over nothing, and TorchScript's ONNX exporter has no mT
    return [weight.t() * of_branches[k].unsqueeze(1) for k, weight in enumerate(weights)]


def of_scaled(
    branches: Sequence[torch.Tensor],
    matrices: Sequence[torch.Tensor],
    bias: torch.Tensor,
    add: Callable = torch.baddbmm,
) -> torch.Tensor:
    """sum_k branches[k] @ matrices[k] + bias, for each image; `add` adds a further product to the sum."""
    total = torch.baddbmm(bias.unsqueeze(1), branches[0], matrices[0])
    for branch, matrix in zip(branches[1:], matrices[1:], strict=True):
        total = add(total, branch, matrix)
    return total


def gradients(
    grad: torch.Tensor, gates: torch.Tensor, branches: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Of the gates, the weights and the branches."""
    grad_gates, grad_weights, grad_branches = [], [], []
    for gate, weight, branch in zip(gates.unbind(1), weights, branches, strict=True):
        gate = gate.unsqueeze(2)  # [B, D_out, 1]
        grad_branches.append(torch.bmm(grad, weight * gate))
        product = torch.bmm(grad.mT, branch)  # [B, D_out, D_in]
        grad_gates.append((product * weight).sum(2))
        grad_weights.append((product * gate).sum(0))
    return torch.stack(grad_gates, 1), grad_weights, grad_branches
