"""How many floating-point operations single_query_attention's products take, of the shapes of its arguments.

Shapes do not tell lengths: all tokens of a padded batch count.
"""

from math import prod


def _of_one_product(query, tokens, extra_token) -> int:
    """Of the queries with all tokens."""
    return 2 * prod(query) * (tokens[1] + (extra_token is not None))


def forward(query, tokens, extra_token, lengths, normalize, eps) -> int:
    return 2 * _of_one_product(query, tokens, extra_token)


def backward(grad_context, query, tokens, extra_token, lengths, context, log_sum_exp, normalize, eps, needed) -> int:
    """The scores again and their gradient, the gradient of the query, and two products for that of the tokens."""
    products = 2 + needed[0] + 2 * (needed[1] or needed[2])
    return products * _of_one_product(query, tokens, extra_token)
