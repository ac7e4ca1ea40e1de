"""Softmax attention of whole heads, by the tiles of AMX where a processor has them."""

import math

import torch
from torch.nn import functional as F

from tokenfusion.kernels.choices import Workloads
from tokenfusion.kernels.dispatch import Implementation, register
from tokenfusion.kernels.library import define_without_gradient
from tokenfusion.kernels.tiles import why_not_tiles

_MOST_TOKENS = 2048  # scores of more do not fit into a core's cache
_MOST_CHANNELS = 128
_FEWEST_SCORES = 1 << 15  # of fewer, PyTorch's function takes less time to begin


def _flops(q, k, v, *_) -> int:
    batch, heads, queries, channels = q
    return 4 * batch * heads * queries * k[2] * channels


def _fake(q, k, v, scale):
    return torch.empty_like(q.transpose(1, 2)).transpose(1, 2)


_run_kernel = define_without_gradient(
    "attention_cpu", "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor", fake=_fake, flops=_flops
)


def _run_reference(q, k, v, scale):
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _kernel_can_run(q, k, v, scale) -> str | None:
    reason = why_not_tiles(q, k, v)
    if reason is not None:
        return reason
    if not (q.dim() == k.dim() == 4 and v.shape == k.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]):
        return "its sizes do not match"
    if not (0 < k.shape[2] <= _MOST_TOKENS and 0 < k.shape[3] <= _MOST_CHANNELS and q.numel() > 0):
        return f"it takes up to {_MOST_TOKENS} tokens of up to {_MOST_CHANNELS} channels a head"
    if q.numel() // q.shape[3] * k.shape[2] < _FEWEST_SCORES:
        return "of so few scores PyTorch's function is faster"
    if not 0 < scale < math.inf:
        return f"it takes a positive scale, not {scale}"
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return "channels lie apart"
    return None


def _workload_of(q, k, v, scale):
    *heads, queries, channels = q.shape
    return (), (math.prod(heads), queries, k.shape[-2], channels)


def _example(words, sizes, make):
    count, queries, tokens, channels = sizes
    q, k, v = make(1, count, queries, channels), make(1, count, tokens, channels), make(1, count, tokens, channels)
    return q, k, v, channels**-0.5


OPERATOR = register(
    "attention",
    Implementation("cpu", _run_kernel, _kernel_can_run),
    Implementation("reference", _run_reference, lambda q, k, v, scale: None),
    supporting=True,
    workloads=Workloads(("B heads", "queries", "N", "d"), None, _workload_of, _example),
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(q k^T scale) v of each head (arXiv:1706.03762, Eq. 1), as F.scaled_dot_product_attention.

    In inference in bfloat16 on a CPU with AMX, without mask and dropout, a kernel multiplies by tiles and keeps the
    scores of some queries in the core's cache; weights are rounded to bfloat16 before they are multiplied with v, and
    sums are float32. Elsewhere, and under the reference backend, this is PyTorch's function.

    Args:
        q: [B, heads, Nq, d], any strides; k, v: [B, heads, N, d]; all of one floating-point dtype.
        attn_mask, dropout_p, is_causal: as of PyTorch's function.
        scale: None for 1 / sqrt(d).

    Returns:
        [B, heads, Nq, d], a new tensor.
    """
    plain = attn_mask is None and not dropout_p and not is_causal
    if not plain or q.dtype != torch.bfloat16 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    call = q, k, v, q.shape[-1] ** -0.5 if scale is None else scale
    return OPERATOR.select(*call).run(*call)
