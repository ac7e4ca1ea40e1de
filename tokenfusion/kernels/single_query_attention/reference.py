"""The definition of single_query_attention in plain PyTorch."""

import torch
import torch.nn.functional as F


def single_query_attention(
    query: torch.Tensor,
    tokens: torch.Tensor,
    extra_token: torch.Tensor | None = None,
    *,
    normalize: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    r"""Attention of few queries whose keys and values are the tokens themselves.

    With n_j the token j, normalised over C when asked for, and j running over {extra_token, tokens}:

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
    if normalize:
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=eps)
    return (query @ tokens.transpose(1, 2)).softmax(dim=-1) @ tokens
