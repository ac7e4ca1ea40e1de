"""How calls of upconv_concat are told apart where their time is looked up."""

import torch

from tokenfusion.kernels.choices import Workloads

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _of(x, weight):
    batch, channels, height, width = x.shape
    pixels = x.stride(1) == 1 and channels > 1
    return (f"k {weight.shape[2]}", "channels_last" if pixels else "contiguous"), (
        batch,
        channels,
        weight.shape[1],
        height * width,
    )


def _example(words, sizes, make):
    """With a skip of as many channels; the map as square as it can be."""
    scale, format = int(words[0].removeprefix("k ")), _FORMATS[words[1]]
    batch, channels, out_channels, pixels = sizes
    height = next(n for n in range(max(int(pixels**0.5), 1), 0, -1) if pixels % n == 0)
    size = height, pixels // height
    x = make(batch, channels, *size, memory_format=format)
    skip = make(batch, out_channels, *(scale * n for n in size), memory_format=format)
    weight = make(channels, out_channels, scale, scale, scale=channels**-0.5)
    return x, weight, make(out_channels), skip, False, None


WORKLOADS = Workloads(("B", "Cin", "Cout", "pixels"), 2, _of, _example)
