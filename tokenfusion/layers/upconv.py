"""Up-sampling and a skip connection in one step: U-Net decoders (arXiv:1505.04597), Token Fusion (Choi et al., 2022).

Parameters have the layouts of nn.ConvTranspose2d and nn.Conv2d, so that checkpoints of the layers replaced load.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tokenfusion.kernels import upconv_add, upconv_concat, upconv_concat_project


class UpConvConcat(nn.ConvTranspose2d):
    """ConvTranspose2d with kernel = stride, then concatenation with a skip connection.

    Equivalent to torch.cat((up(x), skip), 1) with up = nn.ConvTranspose2d(in_channels, out_channels, k, stride=k), whose
    parameters and names it has.

    Args:
        in_channels, out_channels, bias: as of nn.ConvTranspose2d.
        kernel_size: k, and the stride.
        skip_first: the skip comes first in the result.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 2,
        bias: bool = True,
        *,
        skip_first: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride=kernel_size, bias=bias, device=device, dtype=dtype
        )
        self.skip_first = skip_first

    def forward(
        self, x: torch.Tensor, skip: torch.Tensor | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, Cin, h, w], [B, Cs, k h, k w] or None -> [B, Cout + Cs, k h, k w]; out as of `upconv_concat`."""
        return upconv_concat(x, self.weight, self.bias, skip, skip_first=self.skip_first, out=out)


class UpConvAdd(nn.ConvTranspose2d):
    """ConvTranspose2d with kernel = stride, added to a skip connection: up(x) + skip."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 2, bias: bool = True, *, device=None, dtype=None
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride=kernel_size, bias=bias, device=device, dtype=dtype
        )

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """[B, Cin, h, w], [B, Cout, k h, k w] -> [B, Cout, k h, k w]."""
        return upconv_add(x, self.weight, self.bias, skip)


class UpConvConcatProject(nn.Module):
    """UpConvConcat, then a 1x1 convolution: proj(torch.cat((up(x), skip), 1)), without the concatenation.

    up is an nn.ConvTranspose2d and proj an nn.Conv2d, which hold the parameters.

    Args:
        in_channels, up_channels, kernel_size: of the up-convolution.
        skip_channels: of the skip connection; 0 where there is none.
        out_channels: of the 1x1 convolution.
        skip_first: the skip comes first in the concatenation.
    """

    def __init__(
        self,
        in_channels: int,
        up_channels: int,
        skip_channels: int,
        out_channels: int,
        kernel_size: int = 2,
        bias: bool = True,
        *,
        skip_first: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.up = nn.ConvTranspose2d(in_channels, up_channels, kernel_size, stride=kernel_size, **options)
        self.proj = nn.Conv2d(up_channels + skip_channels, out_channels, 1, **options)
        self.skip_first = skip_first

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """[B, Cin, h, w], [B, Cs, k h, k w] or None -> [B, out_channels, k h, k w]."""
        up, proj = self.up, self.proj
        return upconv_concat_project(
            x, up.weight, up.bias, skip, proj.weight.flatten(1), proj.bias, skip_first=self.skip_first
        )


class UpCopyConcat(nn.Module):
    """Each pixel copied to k x k pixels (nearest up-sampling), then concatenation with a skip connection."""

    def __init__(self, scale: int = 2, *, skip_first: bool = False):
        super().__init__()
        self.scale = scale
        self.skip_first = skip_first

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C, h, w], [B, Cs, k h, k w] or None -> [B, C + Cs, k h, k w]."""
        up = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        if skip is None:
            return up
        return torch.cat((skip, up) if self.skip_first else (up, skip), dim=1)


class UpCopyAdd(nn.Module):
    """Each pixel copied to k x k pixels and added to a skip connection, without the up-sampled map by itself."""

    def __init__(self, scale: int = 2):
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w], [B, C, k h, k w] -> [B, C, k h, k w]."""
        split = skip.unflatten(3, (-1, self.scale)).unflatten(2, (-1, self.scale))
        return (split + x[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)
