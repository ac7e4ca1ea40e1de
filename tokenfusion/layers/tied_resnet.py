"""A ResNet's bottleneck blocks around one matrix and its transpose, in place of all 1x1 convolutions of a stage.

Koyun and Töreyin, "Do deep neural networks utilize the weight space efficiently?", 2024, Eq. 6 to 9.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck
from torch import nn

from tokenfusion.kernels.checks import check_sizes


def _conv1x1(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, matrix[:, :, None, None])


class TiedBottleneck(nn.Module):
    """A bottleneck block whose 1x1 convolutions are W and W^T, Eq. 6 of the paper, on a W that it is given.

    y = relu(norm3(W^T relu(norm2(conv2(relu(norm1(W e)))))) + shortcut(e)), where e is x with its channels repeated
    until there are 4 * width of them: so the first block of a stage needs no matrices of its own. The shortcut is e,
    averaged over 2 x 2 pixels where the block has stride 2. W e is computed as (sum of W's column blocks) x.

    Args:
        in_channels: of x, a divisor of 4 * width.
        width: channels inside; 4 * width come out.
        stride: of the 3x3 convolution, 1 or 2.
        dilation: of the 3x3 convolution.
        norm_layer: makes a norm of a number of channels.
        drop_path: module for the branch, such as timm's DropPath; or None.

    Raises:
        ValueError: in_channels does not divide 4 * width; another stride; a size below 1.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        drop_path: nn.Module | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(in_channels=in_channels, width=width, dilation=dilation)
        out_channels = width * self.expansion
        if out_channels % in_channels:
            raise ValueError(f"in_channels: got {in_channels}, expected a divisor of 4 * width, {out_channels}")
        if stride not in (1, 2):
            raise ValueError(f"stride: got {stride}, expected 1 or 2")
        factory = {"device": device, "dtype": dtype}
        self.repeats = out_channels // in_channels
        self.stride = stride
        self.bn1 = norm_layer(width, **factory)
        self.conv2 = nn.Conv2d(
            width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False, **factory
        )
        self.bn2 = norm_layer(width, **factory)
        self.bn3 = norm_layer(out_channels, **factory)
        self.drop_path = drop_path or nn.Identity()

    def zero_init_last(self) -> None:
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: [B, in_channels, h, w].
            weight: W, [width, 4 * width].

        Returns:
            [B, 4 * width, h / stride, w / stride], sizes rounded up.
        """
        shortcut = x
        if self.stride == 2:
            shortcut = F.avg_pool2d(x, 2, ceil_mode=True)
        reduce = weight
        if self.repeats > 1:
            shortcut = shortcut.repeat(1, self.repeats, 1, 1)
            reduce = weight.unflatten(1, (self.repeats, -1)).sum(1)
        x = F.relu(self.bn1(_conv1x1(x, reduce)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(_conv1x1(x, weight.t()))
        return F.relu(self.drop_path(x) + shortcut)


class TiedStage(nn.Module):
    """The bottleneck blocks of one stage of a ResNet around one matrix, Eq. 7 to 9 of the paper.

    Holds weight [width, 4 * width], the only 1x1 weights of the stage, and blocks. Iterating gives each block as a
    function of x alone, as timm's gradient checkpointing wants it.

    Args:
        blocks: TiedBottleneck modules of equal width.
    """

    def __init__(self, *blocks: TiedBottleneck):
        super().__init__()
        conv = blocks[0].conv2
        width = conv.out_channels
        self.weight = nn.Parameter(conv.weight.new_empty(width, width * TiedBottleneck.expansion))
        self.blocks = nn.ModuleList(blocks)
        self.reset_parameters()

    @classmethod
    def of(cls, stage: Sequence[Bottleneck]) -> "TiedStage":
        """A stage with a new matrix, and the 3x3 convolutions, norms and drop paths of blocks of timm's ResNet.

        Raises:
            ValueError: the blocks have parts that the tied form does not have.
        """
        reason = cls.why_not(stage)
        if reason is not None:
            raise ValueError(f"stage: {reason}")
        blocks = []
        for block in stage:
            conv, weight = block.conv2, block.conv1.weight
            sizes = weight.shape[1], conv.out_channels, conv.stride[0], conv.dilation[0]
            tied = TiedBottleneck(*sizes, drop_path=block.drop_path, device=weight.device, dtype=weight.dtype)
            tied.conv2, tied.bn1, tied.bn2, tied.bn3 = conv, block.bn1, block.bn2, block.bn3
            blocks.append(tied)
        return cls(*blocks)

    @staticmethod
    def why_not(stage: Sequence[Bottleneck]) -> str | None:
        """Why `of` cannot take these blocks of timm; None where it can."""
        width = stage[0].conv2.out_channels
        for i, block in enumerate(stage):
            conv = block.conv2
            if type(conv) is not nn.Conv2d or conv.kernel_size != (3, 3) or conv.groups != 1:
                return f"{i}.conv2 is not a plain 3x3 convolution"
            if conv.in_channels != width or block.conv3.out_channels != 4 * width:
                return f"{i} does not have {width} channels inside and {4 * width} outside"
            if conv.dilation != conv.padding or conv.stride[0] not in (1, 2) or (i > 0 and conv.stride != (1, 1)):
                found = f"stride {conv.stride} and dilation {conv.dilation}"
                return f"{i}.conv2 has {found}, expected a stride at the first alone"
            if type(block.act1) is not nn.ReLU or block.se is not None or not isinstance(block.aa, nn.Identity):
                return f"{i} has another activation than ReLU, an attention module or anti-aliasing"
            if not isinstance(block.drop_block, nn.Identity):
                return f"{i} has DropBlock, which the tied form does not have"
        if 4 * width % stage[0].conv1.in_channels:
            return f"0.conv1 takes {stage[0].conv1.in_channels} channels, expected a divisor of {4 * width}"
        return None

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight[:, :, None, None], mode="fan_out", nonlinearity="relu")

    def __iter__(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        return iter([functools.partial(block, weight=self.weight) for block in self.blocks])

    def __len__(self) -> int:
        return len(self.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, h, w] -> [B, 4 * width, h / stride, w / stride]."""
        for block in self.blocks:
            x = block(x, self.weight)
        return x
