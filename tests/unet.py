"""A small U-Net in the usual style, and decoders that are not quite of its shape."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )


class Decoder(nn.Module):
    def __init__(self, channels: int, skip_first: bool = True, **changes):
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * channels, channels, **{"kernel_size": 2, "stride": 2} | changes)
        self.conv = conv(2 * channels, channels)
        self.skip_first = skip_first

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        x = self.up(x)
        if skip is not None:
            x = torch.cat([skip, x] if self.skip_first else [x, skip], dim=1)
        return self.conv(x)


class SizedDecoder(Decoder):
    def forward(self, x, skip):
        x = self.up(x)
        if x.shape[2] != skip.shape[2]:
            raise ValueError("sizes differ")
        return self.conv(torch.cat((x, skip), 1))


class TripleDecoder(Decoder):
    def forward(self, x, skip):
        return torch.cat((self.up(x), skip, skip), 1)


class WideDecoder(Decoder):
    def forward(self, x, skip):
        return torch.cat((self.up(x), skip), 2)


class SharedDecoder(Decoder):
    def forward(self, x, skip):
        up = self.up(x)
        return torch.cat((up, skip), 1), up


class TrainingDecoder(Decoder):
    def forward(self, x, skip):
        return F.dropout(torch.cat((self.up(x), skip), 1), 0.5, self.training)


class BranchingDecoder(Decoder):
    def forward(self, x, skip=None):
        x = self.up(x)
        if isinstance(skip, torch.Tensor):
            x = torch.cat((x, skip), 1)
        return x


class PaddingDecoder(Decoder):
    """As in the most copied of U-Nets: padded to the size of the skip connection, if only by zeros."""

    def forward(self, x, skip):
        x = self.up(x)
        rows, columns = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """Two levels: one decoder block of its own, and one in the model's forward, in a container."""

    def __init__(self, channels: int = 8, classes: int = 3):
        super().__init__()
        self.down = nn.ModuleList([conv(3, channels), conv(channels, 2 * channels), conv(2 * channels, 4 * channels)])
        self.decoder = Decoder(2 * channels)
        self.ups = nn.ModuleList([nn.Sequential(nn.ConvTranspose2d(2 * channels, channels, 2, 2))])
        self.head = nn.Conv2d(2 * channels, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for down in self.down[:2]:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.decoder(self.down[2](x), skips[1])
        return self.head(torch.cat((self.ups[0](x), skips[0]), dim=1))


class PaddingUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([conv(3, 4), conv(4, 8), conv(8, 16)])
        self.up = nn.ModuleList([PaddingDecoder(8), PaddingDecoder(4)])
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        first = self.down[0](x)
        second = self.down[1](F.max_pool2d(first, 2))
        x = self.up[0](self.down[2](F.max_pool2d(second, 2)), second)
        return self.head(self.up[1](x, first))
