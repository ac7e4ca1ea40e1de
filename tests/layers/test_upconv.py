"""The up-sampling layers against torch's layers that they replace, whose checkpoints they load."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.parity import assert_runs
from tokenfusion import layers
from tokenfusion.measure import peak_extra_bytes

X, SKIP = torch.randn(2, 6, 3, 5), torch.randn(2, 4, 6, 10)


@pytest.mark.parametrize("skip_first", [False, True])
def test_concat(skip_first):
    up = nn.ConvTranspose2d(6, 3, 2, stride=2)
    layer = layers.UpConvConcat(6, 3, skip_first=skip_first)
    layer.load_state_dict(up.state_dict())
    expected = torch.cat((SKIP, up(X)) if skip_first else (up(X), SKIP), 1)
    with assert_runs("upconv_concat_cpu"):
        torch.testing.assert_close(layer(X, SKIP), expected)
    torch.testing.assert_close(layer(X), up(X))
    with torch.no_grad():
        out = torch.empty_like(expected)
        assert layer(X, SKIP, out=out) is out
        torch.testing.assert_close(out, expected)


def test_add():
    up, layer = nn.ConvTranspose2d(6, 4, 2, stride=2), layers.UpConvAdd(6, 4)
    layer.load_state_dict(up.state_dict())
    with assert_runs("upconv_concat_project_cpu"):
        torch.testing.assert_close(layer(X, SKIP), up(X) + SKIP)


@pytest.mark.parametrize("skip_first", [False, True])
def test_concat_project(skip_first):
    up, proj = nn.ConvTranspose2d(6, 3, 2, stride=2), nn.Conv2d(7, 5, 1)
    layer = layers.UpConvConcatProject(6, 3, 4, 5, skip_first=skip_first)
    layer.load_state_dict(
        {
            f"{name}.{key}": value
            for name, part in (("up", up), ("proj", proj))
            for key, value in part.state_dict().items()
        }
    )
    expected = proj(torch.cat((SKIP, up(X)) if skip_first else (up(X), SKIP), 1))
    with assert_runs("upconv_concat_project_cpu"):
        torch.testing.assert_close(layer(X, SKIP), expected)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_copies(scale):
    skip = torch.randn(2, 6, 3 * scale, 5 * scale)
    up = F.interpolate(X, scale_factor=scale, mode="nearest")
    assert torch.equal(layers.UpCopyConcat(scale)(X, skip), torch.cat((up, skip), 1))
    assert torch.equal(layers.UpCopyConcat(scale, skip_first=True)(X, skip), torch.cat((skip, up), 1))
    assert torch.equal(layers.UpCopyConcat(scale)(X), up)
    assert torch.equal(layers.UpCopyAdd(scale)(X, skip), up + skip)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_copies_make_no_map_of_their_own(memory_format):
    x = torch.randn(2, 32, 16, 16).contiguous(memory_format=memory_format).requires_grad_()
    skip = torch.randn(2, 8, 64, 64).contiguous(memory_format=memory_format).requires_grad_()
    layer, up = layers.UpCopyConcat(4), F.interpolate(x, scale_factor=4, mode="nearest")
    expected = torch.cat((up, skip), 1)
    result = layer(x, skip)
    assert torch.equal(result, expected) and result.is_contiguous(memory_format=memory_format)
    grad = torch.randn_like(result)
    gradients = torch.autograd.grad(result, (x, skip), grad, retain_graph=True)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, (x, skip), grad), strict=True):
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        assert peak_extra_bytes(lambda: layer(x, skip)) < result.nbytes + up.nbytes / 4
    backward = partial(torch.autograd.grad, result, (x, skip), grad, retain_graph=True)
    assert peak_extra_bytes(backward) < x.nbytes + skip.nbytes + up.nbytes / 4


@pytest.mark.parametrize("layer", [layers.UpCopyConcat(2), layers.UpCopyAdd(2)])
def test_a_skip_of_another_size(layer):
    with pytest.raises(ValueError, match="skip: got shape"):
        layer(X, torch.randn(2, 6, 5, 10))
