"""How calls of upconv_concat are told apart where their time is looked up."""

from tokenfusion.kernels.choices import Workloads
from tokenfusion.kernels.upconv.maps import Maps, words_of


def _of(x, weight):
    batch, channels, height, width = x.shape
    return words_of(x, weight), (batch, channels, weight.shape[1], height * width)


def _example(words, sizes, make):
    """With a skip of as many channels."""
    batch, channels, out_channels, pixels = sizes
    maps = Maps(words, batch, pixels, make)
    x, skip, weight = maps.coarse(channels), maps.fine(out_channels), maps.weight(channels, out_channels)
    return x, weight, make(out_channels), skip, False, None


WORKLOADS = Workloads(("B", "Cin", "Cout", "pixels"), 2, _of, _example)
