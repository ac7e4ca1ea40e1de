"""fuse on U-Nets: which decoders it replaces, that nothing else changes, and why it leaves the others."""

import copy
import pickle

import pytest
import segmentation_models_pytorch as smp
import torch
from monai.networks import nets
from torch import nn

import tokenfusion
from tests.parity import assert_runs
from tests.unet import (
    BranchingDecoder,
    Decoder,
    PaddedDecoder,
    SharedDecoder,
    SizedDecoder,
    TrainingDecoder,
    TripleDecoder,
    UNet,
    WideDecoder,
)

IMAGES = torch.randn(2, 3, 16, 24)
OP = "upconv_concat_cpu"


def unet() -> UNet:
    torch.manual_seed(0)
    return UNet()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_outputs_parameters_and_back(memory_format):
    model = unet().eval().to(memory_format=memory_format)
    images = IMAGES.to(memory_format=memory_format)
    expected, classes = model(images), {name: type(m) for name, m in model.named_modules()}
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    report = tokenfusion.fuse(model, strict=True)
    assert [m.name for m in report.replaced] == ["", "decoder"]
    assert list(model.state_dict()) == keys
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert isinstance(model, UNet) and isinstance(model.decoder, Decoder)
    with assert_runs(OP):
        torch.testing.assert_close(model(images), expected)
    assert tokenfusion.fuse(model) == report
    tokenfusion.unfuse(model)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    with assert_runs():
        assert torch.equal(model(images), expected)


def test_trains_as_before():
    plain, fused = unet(), unet()
    tokenfusion.fuse(fused, strict=True)
    for model in (plain, fused):
        model.train()(IMAGES).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies_compute_the_same(copied):
    model = unet().eval()
    tokenfusion.fuse(model)
    other = copied(model)
    with assert_runs(OP):
        assert torch.equal(other(IMAGES), model(IMAGES))
    assert other.decoder.up.weight is not model.decoder.up.weight
    tokenfusion.unfuse(other)
    assert type(other.decoder) is Decoder and type(model.decoder) is not Decoder


@pytest.mark.parametrize("skip_first", [False, True])
def test_order_and_absence_of_the_skip(skip_first):
    plain = Decoder(4, skip_first).eval()
    fused = copy.deepcopy(plain)
    tokenfusion.fuse(fused, strict=True)
    x, skip = torch.randn(1, 8, 3, 5), torch.randn(1, 4, 6, 10)
    torch.testing.assert_close(fused(x, skip), plain(x, skip))
    with pytest.raises(ValueError, match="skip: got shape"):
        fused(x, skip[..., 1:])


@pytest.mark.parametrize(
    "decoder, part",
    [
        (Decoder(4, kernel_size=4), r"up has kernel \(4, 4\) and stride \(2, 2\)"),
        (Decoder(4, stride=(2, 1), kernel_size=(2, 1)), "kernel"),
        (Decoder(4, output_padding=1, padding=1, kernel_size=2), "padding"),
        (Decoder(4, output_padding=1), "output_padding"),
        (Decoder(4, groups=2), "groups 2"),
        (Decoder(4, dilation=2), "dilation"),
        (PaddedDecoder(4), "goes through pad"),
        (SizedDecoder(4), "cannot trace its forward"),
        (TripleDecoder(4), "not concatenated with one tensor"),
        (WideDecoder(4), "dimension 2"),
        (SharedDecoder(4), "used 2 times"),
        (TrainingDecoder(4), "depends on self.training"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_are_left_alone_with_the_reason(decoder, part):
    model, before = nn.Sequential(decoder), type(decoder)
    report = tokenfusion.fuse(model)
    assert [m.name for m in report.left] == ["0"] and type(decoder) is before
    with pytest.raises(ValueError, match=part):
        tokenfusion.fuse(model, strict=True)


def test_hooks_and_other_classes_of_convolution():
    decoder = Decoder(4)
    decoder.up.register_forward_hook(lambda *_: None)
    assert "hooks" in tokenfusion.fuse(decoder).left[0].reason

    class Quantised(nn.ConvTranspose2d):
        pass

    decoder = Decoder(4)
    decoder.up = Quantised(8, 4, 2, 2)
    assert "Quantised" in tokenfusion.fuse(decoder).left[0].reason


def test_models_without_a_concatenation_are_none_of_its_business():
    generator = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU())
    assert not tokenfusion.fuse(generator).modules
    assert not tokenfusion.fuse(unet(), ops=["single_query_attention"]).modules


def test_compiled():
    model = unet().eval()
    tokenfusion.fuse(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(IMAGES), model(IMAGES))


def test_unets_of_segmentation_models_pytorch():
    model = smp.Unet("resnet18", encoder_weights=None, decoder_interpolation="nearest").eval()
    assert not tokenfusion.fuse(model).modules  # it up-samples by interpolation


def basic_unet() -> nn.Module:
    return nets.BasicUNet(spatial_dims=2, in_channels=3, out_channels=2, features=(8, 8, 16, 32, 64, 8)).eval()


def dyn_unet() -> nn.Module:
    kernels = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    return nets.DynUNet(spatial_dims=2, in_channels=3, out_channels=2, **kernels).eval()


@pytest.mark.parametrize("make, decoders", [(basic_unet, 4), (dyn_unet, 2)])
def test_unets_of_monai(make, decoders):
    torch.manual_seed(0)
    model = make()
    images = torch.randn(1, 3, 64, 48)
    expected = model(images)
    assert len(tokenfusion.fuse(model, strict=True).replaced) == decoders
    with assert_runs(OP):
        torch.testing.assert_close(model(images), expected)
    other = pickle.loads(pickle.dumps(model))
    with assert_runs(OP):
        assert torch.equal(other(images), model(images))
    tokenfusion.unfuse(model)
    assert torch.equal(model(images), expected)


def test_sizes_that_monai_pads():
    torch.manual_seed(0)
    model, images = basic_unet(), torch.randn(1, 3, 37, 50)
    expected = model(images)
    tokenfusion.fuse(model, strict=True)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("part", ["upsample", "upsample.deconv"])
def test_hooks_in_a_decoder_of_monai(part):
    model = basic_unet()
    model.upcat_1.get_submodule(part).register_forward_hook(lambda *_: None)
    report = tokenfusion.fuse(model)
    assert [m.name for m in report.left] == ["upcat_1"] and "hooks" in report.left[0].reason


def test_a_concatenation_on_a_path_that_is_not_traced():
    assert "does not trace" in tokenfusion.fuse(BranchingDecoder(4)).left[0].reason
