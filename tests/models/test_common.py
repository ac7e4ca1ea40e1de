"""What the models share: errors that name the argument, initial values, configurations."""

import pytest
import timm
import torch
from torch import nn

import tokenfusion
from tokenfusion.models import common


@pytest.mark.parametrize(
    "check, message",
    [
        (lambda: common.check_choice("up", "all", ("one", "two")), "up: got 'all', expected one of 'one', 'two'"),
        (lambda: common.check_choice("up", "all", ("one",)), "up: got 'all', expected 'one'"),
        (lambda: common.check_output_fmt("NHWC"), "output_fmt: got 'NHWC', expected one of 'NCHW', 'NLC'"),
        (lambda: common.check_lengths(2, "branch", dim=(1,)), "dim: got (1,), expected 2 values, one for each branch"),
    ],
)
def test_errors_name_the_argument(check, message):
    with pytest.raises(ValueError) as caught:
        check()
    assert str(caught.value) == message


def test_linear_layers_alone_start_anew_unless_others_are_named():
    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 64), nn.Conv2d(64, 64, 1)
    before = conv.weight.clone()
    nn.Sequential(linear, conv, nn.Linear(64, 8, bias=False)).apply(common.init_weights)
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1) and not linear.bias.any()
    assert torch.equal(conv.weight, before)
    common.init_weights(conv, kinds=(nn.Conv2d,))
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.1) and not conv.bias.any()


@pytest.mark.parametrize("name", tokenfusion.list_models())
def test_configurations_are_of_imagenet(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.num_classes == 1000 and cfg.input_size[0] == 3
    assert cfg.mean == (0.485, 0.456, 0.406) and cfg.std == (0.229, 0.224, 0.225)
    assert cfg.classifier and cfg.first_conv
