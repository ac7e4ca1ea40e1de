"""The weights of few queries over tokens in plain PyTorch, for calls that change them or ask for them."""

import torch
import torch.nn.functional as F
from torch import nn

from tokenfusion.kernels.single_query_attention.op import has_values


def normalized(tokens: torch.Tensor | None, norm: nn.LayerNorm | None) -> torch.Tensor | None:
    """What a LayerNorm computes of tokens before its weight and bias."""
    if tokens is None or norm is None:
        return tokens
    return F.layer_norm(tokens, norm.normalized_shape, None, None, norm.eps)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask that is added to scores: of a boolean one, in which True leaves a token out, and of one that is that."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def beyond(lengths: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[B, N], True for the tokens from lengths[b] on."""
    return torch.arange(tokens.shape[1], device=tokens.device) >= lengths.unsqueeze(1)


def as_lengths(mask: torch.Tensor) -> torch.Tensor | None:
    """[B], how many tokens a mask [B, N] keeps where it does no more than leave out the last ones of each image; None
    where it does, has a gradient, or is on a GPU or under a tracer, where nobody looks."""
    if mask.requires_grad or not has_values(mask):
        return None
    absent = mask if mask.dtype == torch.bool else mask.isneginf()
    lengths = mask.shape[1] - absent.sum(dim=1)
    last = beyond(lengths, mask)
    return lengths if torch.equal(mask, last if mask.dtype == torch.bool else additive(last, mask.dtype)) else None


def left_out(absent: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A mask that leaves out these tokens, too; both [B, N]."""
    if mask is None:
        return absent
    return mask | absent if mask.dtype == torch.bool else mask.masked_fill(absent, float("-inf"))


def attention_weights(
    scores: torch.Tensor, mask: torch.Tensor | None, dropout: float, empty_is_zero: bool = True
) -> torch.Tensor:
    """softmax(scores + mask) with dropout.

    Args:
        scores: [B, heads, L, N], contiguous: random numbers are drawn in the order of memory.
        mask: as `additive` takes it, broadcast to the scores; one that is shorter leaves the first tokens as they are.
        empty_is_zero: where the mask leaves no token, weights are zero, and not NaN.
    """
    if mask is not None:
        scores = scores + F.pad(additive(mask, scores.dtype), [scores.shape[-1] - mask.shape[-1], 0])
    weights = scores.softmax(dim=-1) if mask is None or not empty_is_zero else _softmax_or_zeros(scores)
    return F.dropout(weights, dropout) if dropout > 0 else weights


def _softmax_or_zeros(scores: torch.Tensor) -> torch.Tensor:
    none_left = scores.amax(dim=-1, keepdim=True) == float("-inf")
    return scores.masked_fill(none_left, 0.0).softmax(dim=-1).masked_fill(none_left, 0.0)


def scores_of(query: torch.Tensor, tokens: torch.Tensor, extra_token: torch.Tensor | None) -> torch.Tensor:
    """[B, Q, C] and [B, N, C] -> [B, Q, N], the extra token's first; the query may be one for all images."""
    scores = query @ tokens.transpose(1, 2)
    if extra_token is None:
        return scores
    return torch.cat((query @ extra_token.unsqueeze(2), scores), dim=-1)


def weighted_sum(weights: torch.Tensor, tokens: torch.Tensor, extra_token: torch.Tensor | None) -> torch.Tensor:
    """[B, Q, N] and [B, N, C] -> [B, Q, C]."""
    if extra_token is None:
        return weights @ tokens
    of_extra, of_tokens = weights.split((1, tokens.shape[1]), dim=-1)
    return of_tokens @ tokens + of_extra * extra_token.unsqueeze(1)
