"""How calls of gated_sum are told apart where their time is looked up."""

from tokenfusion.kernels.choices import Workloads

_PROJECTED = "projected"


def _of(gates, bias, proj_weight, proj_bias, out, *tensors):
    count, channels = gates.shape[1:]
    branches, weights = tensors[count:], tensors[:count]
    inputs = sum(weight.shape[1] for weight in weights)
    sizes = *branches[0].shape[:2], inputs, channels, count
    return (() if proj_weight is None else (_PROJECTED,)), sizes


def _example(words, sizes, make):
    """With branches of as many inputs each as the number of all allows."""
    batch, tokens, inputs, channels, count = sizes
    each = [inputs // count] * (count - 1)
    each.append(inputs - sum(each))
    branches = [make(batch, tokens, size) for size in each]
    weights = [make(channels, size, scale=size**-0.5) for size in each]
    gates, bias = make(batch, count, channels), make(batch, channels)
    projection = None, None, None
    if _PROJECTED in words:
        out = make(batch, tokens, channels, gradient=False)
        projection = make(channels, channels, scale=channels**-0.5), make(channels), out
    return gates, bias, *projection, *weights, *branches


WORKLOADS = Workloads(("B", "tokens", "Din", "Dout", "branches"), None, _of, _example)
