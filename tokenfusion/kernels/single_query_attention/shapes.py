"""What the results of single_query_attention look like, for fakes and for every backend's host."""

import torch


def statistics_dtype(tokens: torch.Tensor) -> torch.dtype:
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32


def empty_gradients(query, tokens, extra_token, needed):
    """Uninitialised contiguous gradients of (query, tokens, extra_token); of size 0 where none is needed."""
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if wanted else query.new_empty(0)
        for tensor, wanted in zip((query, tokens, extra_token), needed, strict=True)
    )
