"""How many floating-point operations single_query_attention's products take, of the shapes of its arguments.

Shapes do not tell lengths: all tokens of a padded batch count, and what lies between packed bags.
"""


def _of_one_product(query, tokens, extra_token) -> int:
    """Of the queries with all tokens."""
    batch, queries, channels = query
    rows = tokens[0] * tokens[1] + (0 if extra_token is None else batch)
    return 2 * rows * queries * channels


def forward(query, tokens, extra_token, lengths, offsets, normalize, eps) -> int:
    return 2 * _of_one_product(query, tokens, extra_token)


def backward(
    grad_context, query, tokens, extra_token, lengths, offsets, context, log_sum_exp, normalize, eps, needed
) -> int:
    """The scores again and their gradient, the gradient of the query, and two products for that of the tokens."""
    products = 2 + needed[0] + 2 * (needed[1] or needed[2])
    return products * _of_one_product(query, tokens, extra_token)
