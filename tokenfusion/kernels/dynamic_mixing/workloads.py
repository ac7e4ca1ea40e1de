"""How calls of dynamic_mixing are told apart where their time is looked up."""

from tokenfusion.kernels.choices import Workloads

_DIMS = {1: "columns", 2: "rows"}


def _of(x, compressed, generate_weight, generate_bias, segments, dim):
    batch, height, width, channels = x.shape
    return (_DIMS[dim],), (batch, height, width, channels, segments, compressed.shape[3] // segments)


def _example(words, sizes, make):
    batch, height, width, channels, segments, reduced = sizes
    dim = next(dim for dim, word in _DIMS.items() if word in words)
    length = (height, width)[dim - 1]
    compressed = make(batch, height, width, segments * reduced)
    generate = make(length**2, length * reduced, scale=(length * reduced) ** -0.5)
    return make(batch, height, width, channels), compressed, generate, make(length**2), segments, dim, False


WORKLOADS = Workloads(("B", "H", "W", "D", "S", "d"), 6, _of, _example)
