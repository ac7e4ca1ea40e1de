"""How calls of upconv_concat_project and upconv_add are told apart where their time is looked up."""

from tokenfusion.kernels.choices import Workloads
from tokenfusion.kernels.upconv.maps import Maps, words_of

_WITHOUT_SKIP = "no skip"


def _of(x, weight, bias, skip, proj_up, proj_skip):
    batch, channels, height, width = x.shape
    sizes = batch, channels, weight.shape[1], proj_up.shape[0], height * width
    if skip is None:
        return (*words_of(x, weight), _WITHOUT_SKIP), (*sizes, 1)
    return words_of(x, weight), (*sizes, skip.shape[1])


def _example(words, sizes, make):
    batch, channels, up_channels, out_channels, pixels, skip_channels = sizes
    maps = Maps(words, batch, pixels, make)
    x, weight, bias = maps.coarse(channels), maps.weight(channels, up_channels), make(out_channels)
    proj_up = make(out_channels, up_channels, scale=up_channels**-0.5)
    if _WITHOUT_SKIP in words:
        return x, weight, bias, None, proj_up, None
    proj_skip = make(out_channels, skip_channels, scale=skip_channels**-0.5)
    return x, weight, bias, maps.fine(skip_channels), proj_up, proj_skip


def _of_add(x, weight, *others):
    batch, channels, height, width = x.shape
    return words_of(x, weight), (batch, channels, weight.shape[1], height * width)


def _example_of_add(words, sizes, make):
    batch, channels, out_channels, pixels = sizes
    maps = Maps(words, batch, pixels, make)
    x, skip, weight = maps.coarse(channels), maps.fine(out_channels), maps.weight(channels, out_channels)
    return x, weight, make(out_channels), skip, None, None


WORKLOADS = Workloads(("B", "Cin", "Cout", "Cp", "pixels", "Cs"), 6, _of, _example)
WORKLOADS_OF_ADD = Workloads(("B", "Cin", "Cout", "pixels"), 6, _of_add, _example_of_add)
