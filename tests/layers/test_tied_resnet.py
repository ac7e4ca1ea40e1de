"""The tied layers of a ResNet against layers with a matrix for each use, their gradients summed."""

import pytest
import torch
from timm.models.resnet import Bottleneck
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.crossvit import randomize
from tests.layers.tied import copy_values, with_gradients
from tokenfusion.layers import TiedBottleneck, TiedStage

B = 2


def _untied_block(tied: TiedBottleneck, weight: torch.Tensor) -> nn.Module:
    block = Bottleneck(4 * len(weight), len(weight), stride=tied.stride).to(weight)
    copy_values(((block.conv1.weight, weight[:, :, None, None]), (block.conv3.weight, weight.t()[:, :, None, None])))
    block.conv2.load_state_dict(tied.conv2.state_dict())
    for name in ("bn1", "bn2", "bn3"):
        getattr(block, name).load_state_dict(getattr(tied, name).state_dict())
    return block


@pytest.mark.parametrize("in_channels, stride, size", [(32, 1, 6), (8, 1, 6), (16, 2, 6), (16, 2, 5), (32, 2, 1)])
def test_bottleneck_is_the_untied_one_on_repeated_channels(in_channels, stride, size):
    stage = randomize(TiedStage(TiedBottleneck(in_channels, 8, stride))).double()
    block = _untied_block(stage.blocks[0], stage.weight)
    if stride == 2:
        block.downsample = nn.AvgPool2d(2, ceil_mode=True)

    def untied(x):
        return block(x.repeat(1, 32 // in_channels, 1, 1))

    x = torch.randn(B, in_channels, size, size, dtype=torch.float64)
    y, (dx, dw) = with_gradients(stage, x, (stage.weight,))
    want, (dx_, dw1, dw3) = with_gradients(untied, x, (block.conv1.weight, block.conv3.weight))
    torch.testing.assert_close((y, dx, dw), (want, dx_, dw1[:, :, 0, 0] + dw3[:, :, 0, 0].t()))


def test_stage_shares_its_matrix_and_iterates_for_checkpointing():
    stage = randomize(TiedStage(TiedBottleneck(16, 8, 2), TiedBottleneck(32, 8))).eval()
    x = torch.randn(B, 16, 6, 6)
    one_by_one = x
    for block in stage:
        one_by_one = checkpoint(block, one_by_one, use_reentrant=False)
    assert torch.equal(one_by_one, stage(x))
    matrices = [name for name, p in stage.named_parameters() if p.dim() == 2]
    assert matrices == ["weight"] and len(stage) == 2


@pytest.mark.parametrize(
    "make, parts",
    [
        (lambda: TiedBottleneck(24, 8), ["in_channels", "24", "32"]),
        (lambda: TiedBottleneck(32, 8, stride=3), ["stride", "3", "1 or 2"]),
    ],
)
def test_bad_arguments(make, parts):
    with pytest.raises(ValueError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts)
