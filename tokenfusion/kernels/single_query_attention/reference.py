"""The definition of single_query_attention in plain PyTorch."""

import torch
import torch.nn.functional as F


def single_query_attention(
    query: torch.Tensor,
    tokens: torch.Tensor,
    extra_token: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    r"""Attention of few queries whose keys and values are the tokens themselves.

    With n_j the token j, normalised over C when asked for, and j running over {extra_token, tokens}, of image b those
    of tokens[b, :lengths[b]] alone:

        p_qj = softmax_j(query_q . n_j),    context_q = sum_j p_qj n_j

    This is multi-head attention (CrossViT, arXiv:2103.14899, Eq. 6) with its key and value projections moved to the
    query's side, which is exact. For head h, keys k_j = W_k n_j + b_k and values v_j = W_v n_j + b_v:

        q . k_j       = (W_k^T q) . n_j + q . b_k      the last term is constant in j and cancels in the softmax
        sum_j p_j v_j = W_v (sum_j p_j n_j) + b_v      since sum_j p_j = 1

    so query_h = W_k,h^T q_h (one row of C numbers a head), and W_v is applied to the context. The affine part of a
    LayerNorm, n = gamma * nhat + beta, folds in the same way: gamma scales the query, beta cancels in the scores,
    and both are applied once to the context.
    """
    if extra_token is not None:
        tokens = torch.cat((extra_token.unsqueeze(1), tokens), dim=1)
        lengths = None if lengths is None else lengths.clamp(min=0) + 1
    absent = None if lengths is None else _beyond(lengths, tokens)
    if absent is not None:
        tokens = tokens.masked_fill(absent.unsqueeze(2), 0)
    if normalize:
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=eps)
    scores = query @ tokens.transpose(1, 2)
    return (scores.softmax(dim=-1) if absent is None else _softmax_of_present(scores, absent)) @ tokens


def padded(
    tokens: torch.Tensor, lengths: torch.Tensor | None, offsets: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bags of up to `longest` tokens, packed [1, T, C] -> padded [B, longest, C], and their lengths [B].

    Bag b has the tokens from offsets[b] on up to offsets[b + 1], or the first lengths[b] of them.
    """
    room = offsets.diff()
    rows = offsets[:-1].unsqueeze(1) + torch.arange(longest, device=offsets.device)
    bags = tokens[0][rows.clamp(0, tokens.shape[1] - 1)]
    return bags, room if lengths is None else torch.minimum(lengths, room)


def _beyond(lengths: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[B, N], of whose row b the first lengths[b] are False; without a size, which a tracer would take for a number."""
    return torch.ones_like(tokens[..., 0], dtype=torch.int64).cumsum(1) > lengths.unsqueeze(1)


def _softmax_of_present(scores: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
    """Zero where absent, and so throughout a row without any; no NaN comes up on the way, nor in a gradient."""
    some = ~absent.all(dim=1, keepdim=True)
    weights = scores.masked_fill((absent & some).unsqueeze(1), -torch.inf).softmax(dim=-1)
    return weights.masked_fill(absent.unsqueeze(1), 0)
