"""How calls of tied_ffn are told apart where their time is looked up."""

from tokenfusion.kernels.choices import Workloads


def _of(x, weight, bias_in, bias_out):
    features, channels = weight.shape
    return (), (x.numel() // channels, channels, features)


def _example(words, sizes, make):
    tokens, channels, features = sizes
    weight = make(features, channels, scale=channels**-0.5)
    return make(tokens, channels), weight, make(features), make(channels), "gelu", "auto"


WORKLOADS = Workloads(("tokens", "C", "F"), 4, _of, _example)
