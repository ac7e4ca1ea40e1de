"""How calls of single_query_attention are told apart where their time is looked up."""

from tokenfusion.kernels.choices import Workloads

_TRAINED = "tokens with a gradient"


def _of(query, tokens, extra_token, lengths=None, offsets=None):
    batch, queries, channels = query.shape
    length = tokens.shape[1] if offsets is None else tokens.shape[1] // max(batch, 1)
    return ((_TRAINED,) if tokens.requires_grad else ()), (batch, length, channels, queries)


def _example(words, sizes, make):
    batch, length, channels, queries = sizes
    query = make(batch, queries, channels, scale=channels**-0.5)
    tokens = make(batch, length, channels, gradient=_TRAINED in words)
    return query, tokens, None, None, None, True, 1e-6


WORKLOADS = Workloads(("B", "N", "C", "Q"), 5, _of, _example)
