"""What the workloads of the up-convolutions say of maps, and how examples of them are made."""

import torch

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def words_of(x: torch.Tensor, weight: torch.Tensor) -> tuple[str, str]:
    pixels = x.stride(1) == 1 and x.shape[1] > 1
    return f"k {weight.shape[2]}", "channels_last" if pixels else "contiguous"


class Maps:
    """Makers of an up-convolution's operands for the words; the map is as square as its number of pixels allows."""

    def __init__(self, words: tuple[str, ...], batch: int, pixels: int, make):
        self._scale, self._format = int(words[0].removeprefix("k ")), _FORMATS[words[1]]
        height = next(n for n in range(max(int(pixels**0.5), 1), 0, -1) if pixels % n == 0)
        self._batch, self._size, self._make = batch, (height, pixels // height), make

    def coarse(self, channels: int) -> torch.Tensor:
        return self._make(self._batch, channels, *self._size, memory_format=self._format)

    def fine(self, channels: int) -> torch.Tensor:
        size = (self._scale * n for n in self._size)
        return self._make(self._batch, channels, *size, memory_format=self._format)

    def weight(self, channels: int, out_channels: int) -> torch.Tensor:
        return self._make(channels, out_channels, self._scale, self._scale, scale=channels**-0.5)
