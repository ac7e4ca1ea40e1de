"""How many floating-point operations upconv_concat_project's products take, of the shapes of its arguments."""

from math import prod

from tokenfusion.kernels.upconv.concat.flops import of_one_product


def _of_projecting(proj, x, weight) -> int:
    """Of all pixels of the result with a projection [Cp, C]; none where there is no projection."""
    batch, _, height, width = x
    return 0 if proj is None else 2 * batch * height * width * weight[2] ** 2 * prod(proj)


def forward(x, weight, bias, skip, proj_up, proj_skip, channels_last) -> int:
    projections = _of_projecting(proj_up, x, weight) + _of_projecting(proj_skip, x, weight)
    return of_one_product(x, weight) + projections


def backward(grad_out, x, weight, skip, proj_up, proj_skip, needed) -> int:
    """The up-sampled map again for the gradient of its projection; else two products for each product forward."""
    need_x, need_weight, _, need_skip, need_proj_up, need_proj_skip = needed
    products = need_x + need_weight + need_proj_up
    of_up = _of_projecting(proj_up, x, weight) * ((need_x or need_weight) + need_proj_up)
    of_skip = _of_projecting(proj_skip, x, weight) * (need_skip + need_proj_skip)
    return products * of_one_product(x, weight) + of_up + of_skip
