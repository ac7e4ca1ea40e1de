"""fuse on U-Nets: which up-convolutions it replaces, that nothing else changes, and why it leaves the others."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import tokenfusion
from tests.parity import assert_runs
from tests.unet import (
    BranchingDecoder,
    Decoder,
    PaddingUNet,
    SharedDecoder,
    SizedDecoder,
    TrainingDecoder,
    TripleDecoder,
    UNet,
    WideDecoder,
)

OP, BACKWARD = "upconv_concat_cpu", "upconv_concat_backward_cpu"
IMAGES = torch.randn(2, 3, 16, 24)


def unet() -> UNet:
    torch.manual_seed(0)
    return UNet()


def fused_copy(plain: nn.Module) -> nn.Module:
    fused = copy.deepcopy(plain)
    tokenfusion.fuse(fused, strict=True)
    return fused


def everything(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Every output, and the gradients of the inputs and parameters, with the same random numbers each time."""
    torch.manual_seed(1)
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    sum(out.square().mean() for out in outputs).backward()
    grads = [tensor.grad for tensor in (*inputs, *model.parameters())]
    model.zero_grad()
    return [*(out * 1 for out in outputs), *grads]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_outputs_parameters_and_back(memory_format):
    model = unet().eval().to(memory_format=memory_format)
    images = IMAGES.to(memory_format=memory_format)
    expected, classes = model(images), {name: type(m) for name, m in model.named_modules()}
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    report = tokenfusion.fuse(model, strict=True)
    assert [m.name for m in report.replaced] == ["decoder.up", "ups.0.0"]
    assert list(model.state_dict()) == keys
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert isinstance(model.decoder.up, nn.ConvTranspose2d) and type(model.decoder) is Decoder
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
    assert type(other.decoder.up) is nn.ConvTranspose2d and type(model.decoder.up) is not nn.ConvTranspose2d


@pytest.mark.parametrize("skip_first", [False, True])
def test_order_and_absence_of_the_skip(skip_first):
    plain = Decoder(4, skip_first).eval()
    fused = fused_copy(plain)
    x, skip = torch.randn(1, 8, 3, 5), torch.randn(1, 4, 6, 10)
    with assert_runs(OP):
        torch.testing.assert_close(fused(x, skip), plain(x, skip))
    for wrong in (None, skip[..., 1:]):
        with pytest.raises(RuntimeError) as expected:
            plain(x, wrong)
        with pytest.raises(RuntimeError) as error:
            fused(x, wrong)
        assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("make", [SizedDecoder, SharedDecoder, TrainingDecoder, BranchingDecoder])
def test_every_decoder_that_concatenates_with_one_tensor(make):
    plain = make(4)
    fused = fused_copy(plain)
    x, skip = torch.randn(1, 8, 3, 5), torch.randn(1, 4, 6, 10)
    for training in (True, False):
        with assert_runs(OP, BACKWARD):
            actual = everything(fused.train(training), x, skip)
        torch.testing.assert_close(actual, everything(plain.train(training), x, skip))


@pytest.mark.parametrize("make, sizes", [(TripleDecoder, (6, 10)), (WideDecoder, (7, 10)), (BranchingDecoder, None)])
def test_decoders_that_do_something_else_are_computed(make, sizes):
    plain = make(4)
    fused = fused_copy(plain)
    inputs = torch.randn(1, 8, 3, 5), *([] if sizes is None else [torch.randn(1, 4, *sizes)])
    with assert_runs(BACKWARD):
        actual = everything(fused, *inputs)
    torch.testing.assert_close(actual, everything(plain, *inputs))


def test_generators_are_computed():
    plain = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 4, 2, 1))
    fused = copy.deepcopy(plain)
    report = tokenfusion.fuse(fused)
    assert [m.name for m in report.replaced] == ["0"] and [m.name for m in report.left] == ["2"]
    x = torch.randn(2, 4, 5, 3)
    with assert_runs(BACKWARD):
        actual = everything(fused, x)
    torch.testing.assert_close(actual, everything(plain, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"kernel_size": 4}, r"kernel \(4, 4\) and stride \(2, 2\)"),
        ({"kernel_size": (2, 1), "stride": (2, 1)}, r"kernel \(2, 1\)"),
        ({"kernel_size": 3, "stride": 3}, "expected one of 2, 4, 8, 16, 32"),
        ({"padding": 1, "output_padding": 1}, r"padding \(1, 1\)"),
        ({"output_padding": 1}, r"output_padding \(1, 1\)"),
        ({"groups": 2}, "groups 2"),
        ({"dilation": 2}, "dilation"),
    ],
    ids=str,
)
def test_others_are_left_alone_with_the_reason(changes, part):
    model = nn.Sequential(Decoder(4, **changes))
    report = tokenfusion.fuse(model)
    assert [m.name for m in report.left] == ["0.up"] and type(model[0].up) is nn.ConvTranspose2d
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
    assert not tokenfusion.fuse(decoder).modules and type(decoder.up) is Quantised


def test_other_operators_leave_it_alone():
    assert not tokenfusion.fuse(unet(), ops=["single_query_attention"]).modules


def test_compiled():
    model = unet().eval()
    tokenfusion.fuse(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(IMAGES), model(IMAGES))


def basic_unet() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    return nets.BasicUNet(spatial_dims=2, in_channels=3, out_channels=2, features=(8, 8, 16, 32, 64, 8))


def dyn_unet() -> nn.Module:
    kernels = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    return pytest.importorskip("monai.networks.nets").DynUNet(spatial_dims=2, in_channels=3, out_channels=2, **kernels)


def nnu_net(name: str, deep_supervision: bool = True) -> nn.Module:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    blocks = {"n_blocks_per_stage": 1} if name == "ResidualEncoderUNet" else {"n_conv_per_stage": 1}
    return getattr(unet, name)(
        3,
        3,
        (4, 8, 8),
        nn.Conv2d,
        3,
        (1, 2, 2),
        **blocks,
        num_classes=2,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision,
    )


MODELS = {
    "MONAI's BasicUNet": (basic_unet, 4),
    "MONAI's DynUNet": (dyn_unet, 2),
    "nnU-Net": (partial(nnu_net, "PlainConvUNet"), 2),
    "nnU-Net, residual": (partial(nnu_net, "ResidualEncoderUNet"), 2),
    "nnU-Net, one result": (partial(nnu_net, "PlainConvUNet", deep_supervision=False), 2),
    "padding": (PaddingUNet, 2),
}


@pytest.mark.parametrize("make, number", MODELS.values(), ids=MODELS)
def test_published_unets(make, number):
    torch.manual_seed(0)
    plain, images = make(), torch.randn(1, 3, 64, 48)
    fused = copy.deepcopy(plain)
    assert len(tokenfusion.fuse(fused, strict=True).replaced) == number
    with assert_runs(OP, BACKWARD):
        actual = everything(fused, images)
    torch.testing.assert_close(actual, everything(plain, images), rtol=1e-3, atol=1e-5)
    fused.eval(), plain.eval()
    with torch.no_grad(), assert_runs(OP):
        torch.testing.assert_close(fused(images), plain(images))
    tokenfusion.unfuse(fused)
    with assert_runs():
        torch.testing.assert_close(fused(images), plain(images), rtol=0, atol=0)


@pytest.mark.parametrize("make", [basic_unet, PaddingUNet])
def test_sizes_that_are_padded(make):
    torch.manual_seed(0)
    plain, images = make().eval(), torch.randn(1, 3, 37, 50)
    fused = fused_copy(plain)
    torch.testing.assert_close(everything(fused, images), everything(plain, images), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("part", ["upsample", "upsample.deconv"])
def test_hooks_in_a_decoder_of_monai(part):
    plain, images = basic_unet().eval(), torch.randn(1, 3, 32, 32)
    fused = copy.deepcopy(plain)
    seen = [], []
    for model, outputs in zip((plain, fused), seen, strict=True):
        model.upcat_1.get_submodule(part).register_forward_hook(lambda _m, _i, out, to=outputs: to.append(out * 1))
    report = tokenfusion.fuse(fused)
    assert [m.name for m in report.left] == (["upcat_1.upsample.deconv"] if part == "upsample.deconv" else [])
    torch.testing.assert_close(fused(images), plain(images))
    assert len(seen[1]) == 1
    torch.testing.assert_close(seen[1], seen[0])


def test_unets_of_segmentation_models_pytorch():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("resnet18", encoder_weights=None, decoder_interpolation="nearest")
    assert not tokenfusion.fuse(model).modules  # it up-samples by interpolation
