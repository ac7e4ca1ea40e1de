"""dynamic_mixing: argument checks, registration, autograd and the public function."""

import torch
import torch.nn.functional as F

from tokenfusion.kernels.checks import autocast, check_floating, check_rank, check_same
from tokenfusion.kernels.dispatch import Implementation, register
from tokenfusion.kernels.dynamic_mixing import reference


def _run_reference(x, compressed, generate_weight, generate_bias, segments, dim):
    return reference.mix(x, compressed, generate_weight, generate_bias, segments=segments, dim=dim)


OPERATOR = register(
    "dynamic_mixing",
    Implementation("reference", _run_reference, lambda *tensors: None),
)


def _check_shape(name: str, tensor: torch.Tensor, expected: list[int], because: str) -> None:
    if list(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {expected} {because}")


def _check(x, weights: dict[str, torch.Tensor], segments: int, dim: int) -> None:
    check_floating("x", x)
    check_rank("x", x, "[B, H, W, D]")
    if dim not in (1, 2):
        raise ValueError(f"dim: got {dim!r}, expected 1 (along H) or 2 (along W)")
    channels, length = x.shape[3], x.shape[dim]
    if not isinstance(segments, int) or segments < 1 or channels % segments:
        raise ValueError(f"segments: got {segments!r}, expected a divisor of D = {channels} of x {list(x.shape)}")
    if length == 0:
        raise ValueError(f"x: got shape {list(x.shape)}, expected at least one token along dimension {dim}")
    for name, weight in weights.items():
        check_floating(name, weight)
        check_rank(name, weight, "[S * d, D]" if name.endswith("weight") else "[S * d]")
        check_same(name, weight, "x", x)
    rows = weights["compress_weight"].shape[0]
    if rows % segments or rows == 0:
        raise ValueError(
            f"compress_weight: got shape {list(weights['compress_weight'].shape)}, expected [S * d, {channels}] "
            f"with S = {segments} segments"
        )
    reduced = rows // segments
    for_x = f"for D = {channels} of x and S * d = {segments} * {reduced}"
    for_length = f"for N = {length} tokens along dimension {dim} of x {list(x.shape)} and d = {reduced}"
    _check_shape("compress_weight", weights["compress_weight"], [rows, channels], for_x)
    _check_shape("compress_bias", weights["compress_bias"], [rows], for_x)
    _check_shape("generate_weight", weights["generate_weight"], [length**2, length * reduced], for_length)
    _check_shape("generate_bias", weights["generate_bias"], [length**2], for_length)


def mix(
    x: torch.Tensor,
    compressed: torch.Tensor,
    generate_weight: torch.Tensor,
    generate_bias: torch.Tensor,
    *,
    segments: int,
    dim: int,
) -> torch.Tensor:
    """dynamic_mixing after the compression, unchecked: x [B, H, W, D], compressed [B, H, W, S * d]."""
    tensors = (x, compressed, generate_weight, generate_bias)
    return OPERATOR.select(*tensors, segments, dim).run(*tensors, segments, dim)


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
    """Mixes the tokens of every row or every column with weights that the tokens themselves generate.

    The DynaMixer operation without its output projection (arXiv:2201.12083, Eq. 5 to 7): each token is compressed to
    d numbers a segment; those of all N tokens of a line generate, for each of S segments of the channels, an N x N
    matrix, whose softmax over the sources mixes that segment. `reference.py` has the formula. Differentiable in all
    five tensors.

    Args:
        x: [B, H, W, D].
        compress_weight: [S * d, D].
        compress_bias: [S * d].
        generate_weight: [N * N, N * d], row i * N + j giving the weight of source i for target j; shared by the
            segments.
        generate_bias: [N * N].
        segments: S, a divisor of D.
        dim: 1 mixes along H (N = H), 2 along W (N = W).

    All of one device and of one dtype: float16, bfloat16, float32 or float64. Under autocast, all are cast to its
    dtype, as for a matrix product.

    Returns:
        [B, H, W, D], in the dtype of x.

    Raises:
        TypeError: a dtype that is not floating point, or differing dtypes.
        ValueError: wrong rank, segments that do not divide D, weights that do not match D, N, S or d, another dim,
            tensors on different devices.
        RuntimeError: the backend chosen by `set_backend` cannot run this call; the message says why.
    """
    x, *weights = autocast(x, compress_weight, compress_bias, generate_weight, generate_bias)
    names = ("compress_weight", "compress_bias", "generate_weight", "generate_bias")
    _check(x, dict(zip(names, weights, strict=True)), segments, dim)
    compress_weight, compress_bias, generate_weight, generate_bias = weights
    compressed = F.linear(x, compress_weight, compress_bias)
    return mix(x, compressed, generate_weight, generate_bias, segments=segments, dim=dim)
