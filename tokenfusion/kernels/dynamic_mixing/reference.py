"""The definition of dynamic_mixing in plain PyTorch."""

import torch
import torch.nn.functional as F


def mixing_matrices(
    compressed: torch.Tensor, generate_weight: torch.Tensor, generate_bias: torch.Tensor, *, segments: int
) -> torch.Tensor:
    """Mixing matrices of every line and segment, Eq. 5 and 6 of DynaMixer.

    Args:
        compressed: [..., N, S * d], lines of N tokens.
        generate_weight, generate_bias: [N * N, N * d] and [N * N].

    Returns:
        [..., S, N, N], indexed [source, target]; the weights of a target's sources sum to one.
    """
    length = compressed.shape[-2]
    flat = compressed.unflatten(-1, (segments, -1)).transpose(-3, -2).flatten(-2)  # [..., S, N * d], token-major
    return F.linear(flat, generate_weight, generate_bias).unflatten(-1, (length, length)).softmax(dim=-2)


def apply_mixing(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """mixed[target] = sum_source matrices[source, target] x[source], each segment of D with its own matrix.

    Args:
        x: [..., N, D].
        matrices: [..., S, N, N], or of fewer leading dimensions where lines share them.
    """
    parts = x.unflatten(-1, (matrices.shape[-3], -1)).transpose(-3, -2)  # [..., S, N, D / S]
    return (matrices.transpose(-2, -1) @ parts).transpose(-3, -2).flatten(-2)


def mix(
    x: torch.Tensor,
    compressed: torch.Tensor,
    generate_weight: torch.Tensor,
    generate_bias: torch.Tensor,
    *,
    segments: int,
    dim: int,
) -> torch.Tensor:
    """dynamic_mixing after the compression: x [B, H, W, D] and compressed [B, H, W, S * d] -> [B, H, W, D]."""
    x, compressed = x.movedim(dim, 2), compressed.movedim(dim, 2)  # [B, lines, N, .]
    matrices = mixing_matrices(compressed, generate_weight, generate_bias, segments=segments)
    return apply_mixing(x, matrices).movedim(2, dim)


def dynamic_mixing(
    x: torch.Tensor,
    compress_weight: torch.Tensor,
    compress_bias: torch.Tensor,
    generate_weight: torch.Tensor,
    generate_bias: torch.Tensor,
    *,
    segments: int,
    dim: int,
) -> torch.Tensor:
    r"""The DynaMixer operation (arXiv:2201.12083, Eq. 5 to 7 without W_o) along rows or columns of an image.

    For every line of N tokens x_1 .. x_N along `dim` and every segment s of the D channels,

        z_j = W_c x_j + b_c,                         d numbers of each token for each segment
        G = W_g flat(z^(s)) + b_g,                   [N, N], indexed [source i, target j]
        P_ij = exp(G_ij) / sum_i' exp(G_i'j),        softmax over the sources
        y_j^(s) = sum_i P_ij x_i^(s)

    W_c differs among the segments, W_g is shared by them. G and P are N / (D / S) times as large as x, 1.3 times for
    32 tokens and segments of 24 channels, and depend on nothing but z: a kernel keeps them on chip, and makes them
    again in the backward pass. There, with g the gradient of y and dropping s,

        dP_ij = g_j . x_i,    dG_ij = P_ij (dP_ij - sum_i' P_i'j dP_i'j),    sum_i' P_i'j dP_i'j = g_j . y_j
        dx_i = sum_j P_ij g_j,    d flat(z) = W_g^T dG,    dW_g = sum dG flat(z)^T over all lines and segments

    All lines of both directions of an image need one product with x: [W_c,rows; W_c,columns] x.
    """
    compressed = F.linear(x, compress_weight, compress_bias)
    return mix(x, compressed, generate_weight, generate_bias, segments=segments, dim=dim)
