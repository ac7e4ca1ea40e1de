"""Up-sampling and a skip connection in one step: U-Net decoders (arXiv:1505.04597), Token Fusion (Choi et al., 2022).

Parameters have the layouts of nn.ConvTranspose2d and nn.Conv2d, so that checkpoints of the layers replaced load.
"""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import nn

from tokenfusion.kernels import dispatch, upconv_add, upconv_concat, upconv_concat_project
from tokenfusion.kernels.checks import check_sizes, symbolic
from tokenfusion.layers.drop_in import remember_forwards, why_not_part
from tokenfusion.layers.own_layer import OwnLayer

remember_forwards(nn.ConvTranspose2d, nn.Conv2d)


@register_notrace_module
class UpConvConcat(nn.ConvTranspose2d):
    """ConvTranspose2d with kernel = stride, then concatenation with a skip connection.

    Equivalent to torch.cat((up(x), skip), 1) with up = nn.ConvTranspose2d(in_channels, out_channels, k, stride=k). Its
    parameters have the same names.

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
        check_sizes(in_channels=in_channels, out_channels=out_channels, **_sides(kernel_size))
        super().__init__(
            in_channels, out_channels, kernel_size, stride=kernel_size, bias=bias, device=device, dtype=dtype
        )
        self.skip_first = skip_first

    def forward(
        self, x: torch.Tensor, skip: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, Cin, h, w], [B, Cs, k h, k w] or None -> [B, Cout + Cs, k h, k w]; out as of `upconv_concat`."""
        if torch.jit.is_scripting():
            assert out is None, "out: got a tensor, expected None in TorchScript"
            up = F.conv_transpose2d(x, self.weight, self.bias, self.stride)
            return _concat(up, skip, self.skip_first)
        return upconv_concat(x, self.weight, self.bias, skip, skip_first=self.skip_first, out=out)


@register_notrace_module
class UpConvAdd(nn.ConvTranspose2d):
    """ConvTranspose2d with kernel = stride, added to a skip connection: up(x) + skip."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 2, bias: bool = True, *, device=None, dtype=None
    ):
        check_sizes(in_channels=in_channels, out_channels=out_channels, **_sides(kernel_size))
        super().__init__(
            in_channels, out_channels, kernel_size, stride=kernel_size, bias=bias, device=device, dtype=dtype
        )

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """[B, Cin, h, w], [B, Cout, k h, k w] -> [B, Cout, k h, k w]."""
        if torch.jit.is_scripting():
            return F.conv_transpose2d(x, self.weight, self.bias, self.stride) + skip
        return upconv_add(x, self.weight, self.bias, skip)


@register_notrace_module
class UpConvConcatProject(OwnLayer, nn.Module):
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
        check_sizes(in_channels=in_channels, up_channels=up_channels, out_channels=out_channels, **_sides(kernel_size))
        check_sizes(least=0, skip_channels=skip_channels)
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.up = nn.ConvTranspose2d(in_channels, up_channels, kernel_size, stride=kernel_size, **options)
        self.proj = nn.Conv2d(up_channels + skip_channels, out_channels, 1, **options)
        self.skip_first = skip_first

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        parts = module._modules
        return _why_not_up(parts.get("up")) or _why_not_proj(parts.get("proj"))

    def plain_forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        return self.proj(_concat(self.up(x), skip, self.skip_first))

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """[B, Cin, h, w], [B, Cs, k h, k w] or None -> [B, out_channels, k h, k w]."""
        if torch.jit.is_scripting():
            return self.plain_forward(x, skip)
        if not self.fuses(x, skip):
            return self.plain_forward(x, skip)
        up, proj = self.up, self.proj
        return upconv_concat_project(
            x, up.weight, up.bias, skip, proj.weight.flatten(1), proj.bias, skip_first=self.skip_first
        )


class UpCopyConcat(nn.Module):
    """Each pixel copied to k x k pixels (nearest up-sampling), then concatenation with a skip connection.

    Pixels are copied into the result: there is no up-sampled map, and the gradient of x is summed from the result's.
    """

    def __init__(self, scale: int = 2, *, skip_first: bool = False):
        super().__init__()
        check_sizes(scale=scale)
        self.scale = scale
        self.skip_first = skip_first

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C, h, w], [B, Cs, k h, k w] or None -> [B, C + Cs, k h, k w], channels_last where x is.

        Raises:
            ValueError: a skip of another size.
        """
        if torch.jit.is_scripting():
            return _concat(_copied(x, self.scale), skip, self.skip_first)
        up = x[:, :, :, None, :, None].expand(-1, -1, -1, self.scale, -1, self.scale)
        parts = [up]
        if skip is not None:
            _check_size(x, skip, self.scale)
            parts.insert(0 if self.skip_first else 1, _split_pixels(skip, self.scale))
        innermost = -1 if dispatch.transform() is None and _is_channels_last(x) else 1
        joined = torch.cat([part.movedim(1, innermost) for part in parts], dim=innermost)
        return joined.movedim(innermost, 1).flatten(4, 5).flatten(2, 3)


class UpCopyAdd(nn.Module):
    """Each pixel copied to k x k pixels and added to a skip connection, without the up-sampled map by itself."""

    def __init__(self, scale: int = 2):
        super().__init__()
        check_sizes(scale=scale)
        self.scale = scale

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w], [B, C, k h, k w] -> [B, C, k h, k w]."""
        if torch.jit.is_scripting():
            return _copied(x, self.scale) + skip
        _check_size(x, skip, self.scale)
        return (_split_pixels(skip, self.scale) + x[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)


def _sides(kernel_size: int | tuple[int, int]) -> dict[str, int]:
    """For `check_sizes`: k, also where it is given for both sides."""
    sides = set(kernel_size) if isinstance(kernel_size, (tuple, list)) else {kernel_size}
    return {"kernel_size": sides.pop() if len(sides) == 1 else kernel_size}


def _why_not_up(up: nn.Module | None) -> str | None:
    reason = why_not_part(up, "up", nn.ConvTranspose2d)
    if reason is not None:
        return reason
    others = (up.padding, up.output_padding, up.dilation, up.groups)
    if up.stride != tuple(up.weight.shape[2:]) or others != ((0, 0), (0, 0), (1, 1), 1):
        return "up: its patches overlap or leave gaps"
    return None


def _why_not_proj(proj: nn.Module | None) -> str | None:
    reason = why_not_part(proj, "proj", nn.Conv2d)
    if reason is not None:
        return reason
    others = (tuple(proj.weight.shape[2:]), proj.stride, proj.padding, proj.groups)
    return None if others == ((1, 1), (1, 1), (0, 0), 1) else "proj is no 1x1 convolution of each pixel"


def _concat(up: torch.Tensor, skip: torch.Tensor | None, skip_first: bool) -> torch.Tensor:
    if skip is None:
        return up
    return torch.cat((skip, up) if skip_first else (up, skip), dim=1)


def _copied(x: torch.Tensor, scale: int) -> torch.Tensor:
    return x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def _split_pixels(fine: torch.Tensor, scale: int) -> torch.Tensor:
    """[B, C, k h, k w] -> [B, C, h, k, w, k]."""
    return fine.unflatten(3, (-1, scale)).unflatten(2, (-1, scale))


def _is_channels_last(x: torch.Tensor) -> bool:
    return not symbolic(x) and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _check_size(x: torch.Tensor, skip: torch.Tensor, scale: int) -> None:
    if symbolic(x, skip):
        return
    expected = [x.shape[0], scale * x.shape[2], scale * x.shape[3]]
    if [skip.shape[0], *skip.shape[2:]] != expected:
        raise ValueError(
            f"skip: got shape {list(skip.shape)}, expected [{expected[0]}, Cs, {expected[1]}, {expected[2]}]"
        )
