"""Multi-head attention of one query token over a sequence, with the key and value projections absorbed."""

import torch
from torch import nn

from tokenfusion.kernels import single_query_attention


def absorbed_attention(
    query_token: torch.Tensor,
    tokens: torch.Tensor,
    extra_token: torch.Tensor | None,
    norm: nn.LayerNorm,
    query: nn.Linear,
    key: nn.Linear,
    value: nn.Linear,
    *,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    """softmax(q k^T * scale) v of one query per head, without ever forming keys and values.

    Equivalent to, with x = cat(extra_token, tokens) and d = C / num_heads,

        n = norm(x);  q, k, v = query(query_token), key(n), value(n), each split into heads of d channels
        attention(q, k, v) with its heads concatenated

    in exact arithmetic; see tokenfusion/kernels/single_query_attention/reference.py for the algebra.

    Args:
        query_token: [B, C], already normalised.
        tokens: [B, N, C], not normalised, any strides with a contiguous innermost dimension.
        extra_token: [B, C], not normalised, one more key; or None.
        norm: the LayerNorm of the keys, over C.
        query, key, value: the projections, C -> C.

    Returns:
        [B, C], the heads' outputs side by side, before the output projection.
    """

    def heads_of(weight: torch.Tensor) -> torch.Tensor:
        return weight.unflatten(0, (num_heads, -1))  # [heads, d, C]

    query_token = query(query_token) * scale
    if key.bias is not None and torch.is_grad_enabled():
        query_token = query_token + 0 * key.bias  # its gradient is zero, and not absent, as optimizers and DDP expect
    q = query_token.unflatten(-1, (num_heads, -1))
    absorbed = torch.bmm(q.transpose(0, 1), heads_of(key.weight)).transpose(0, 1)  # [B, heads, C]
    if norm.weight is not None:
        absorbed = absorbed * norm.weight
    context = single_query_attention(absorbed, tokens, extra_token, normalize=True, eps=norm.eps)
    if norm.weight is not None:
        context = context * norm.weight
    if norm.bias is not None:
        context = context + norm.bias
    out = torch.bmm(context.transpose(0, 1), heads_of(value.weight).transpose(1, 2))  # [heads, B, d]
    out = out.transpose(0, 1).flatten(1)
    return out if value.bias is None else out + value.bias
