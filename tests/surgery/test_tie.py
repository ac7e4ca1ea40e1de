"""tie_weights on networks of timm: what is tied, how well, and what is left alone."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn.utils import parametrizations

import tokenfusion
from tests.crossvit import randomize
from tokenfusion.layers import TiedAttention, TiedFFN, TiedStage

SMALL = {"img_size": 32, "depth": 2, "num_classes": 5}


def vit(name: str = "vit_small_patch16_224", **options) -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model(name, **(SMALL | options))).eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model("resnet50", num_classes=5, zero_init_last=False)).eval()


def _matrices(module: nn.Module) -> int:
    """Elements of the matrices in the blocks."""
    return sum(p.numel() for name, p in module.named_parameters() if p.dim() == 2 and "blocks" in name)


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "deit_tiny_patch16_224"])
def test_transformers_keep_half_of_their_matrices(name):
    model = vit(name)
    before = _matrices(model)
    biases = {n: p for n, p in model.named_parameters() if "norm" in n}
    report = tokenfusion.tie_weights(model)
    assert 2 * _matrices(model) == before
    assert [type(m) for m in model.modules() if isinstance(m, (Attention, Mlp))] == []
    assert len(report.matrices) == 2 * 6 and report.left == ()
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) < report.parameters_before
    assert all(dict(model.named_parameters())[n] is p for n, p in biases.items())
    images = torch.randn(2, 3, 32, 32)
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert "blocks.0.attn.proj" in str(report) and "relative error" in str(report)


def test_resnet_keeps_one_matrix_a_stage():
    model = resnet()
    report = tokenfusion.tie_weights(model)
    assert [type(getattr(model, f"layer{i}")) for i in range(1, 5)] == [TiedStage] * 4
    assert not any("downsample" in name for name, _ in model.named_parameters())
    assert len(report.matrices) == 2 * 16
    # that of architectures without a norm on the shortcut: 12,764,736 and a classifier of five classes
    assert report.parameters_after == 12_764_736 + 2048 * 5 + 5
    logits = model(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 5) and torch.isfinite(logits).all()


def _tied_mlp(activation: type[nn.Module] = nn.GELU) -> Mlp:
    """An Mlp that is a tied one already."""
    mlp = Mlp(6, 10, act_layer=activation)
    with torch.no_grad():
        mlp.fc2.weight.copy_(mlp.fc1.weight.t())
    return mlp


@pytest.mark.parametrize("init", ["mean", "first"])
def test_what_is_tied_already_computes_the_same(init):
    attn = Attention(8, 2, qkv_bias=True)
    with torch.no_grad():
        q, k, v = attn.qkv.weight.chunk(3)
        v.copy_(k.t())
        attn.proj.weight.copy_(q.t())
    for module, channels in ((_tied_mlp(), 6), (attn, 8)):
        model, x = nn.Sequential(module), torch.randn(2, 3, channels)
        want = model(x)
        report = tokenfusion.tie_weights(model, init=init)
        torch.testing.assert_close(model(x), want)
        assert all(matrix.error < 1e-6 for matrix in report.matrices)


def test_mean_is_the_least_squares_solution():
    mlp = Mlp(6, 10)
    first, second = mlp.fc1.weight.detach().clone(), mlp.fc2.weight.detach().t().clone()
    model = nn.Sequential(mlp)
    report = tokenfusion.tie_weights(model)
    torch.testing.assert_close(model[0].weight.detach(), (first + second) / 2)
    for matrix, original in zip(report.matrices, (first, second), strict=True):
        error = (model[0].weight - original).norm() / original.norm()
        assert matrix.error == pytest.approx(error.item(), rel=1e-5)


def test_mean_of_a_stage_is_the_least_squares_solution():
    stage = copy.deepcopy(resnet().layer1[:2]).double()
    wanted = [(c, 1 if i else 4) for i, b in enumerate(stage) for c in (b.conv1.weight, None) if c is not None]
    expand = [b.conv3.weight[:, :, 0, 0].t() for b in stage]
    model = nn.Sequential()
    model.add_module("layer", stage)
    tokenfusion.tie_weights(model)
    weight = model.layer.weight
    loss = sum((weight.unflatten(1, (r, -1)).sum(1) - c[:, :, 0, 0]).square().sum() for c, r in wanted)
    loss = loss + sum((weight - e).square().sum() for e in expand)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-10


def test_scales_are_balanced_where_that_changes_nothing():
    """W1 and W2^T equal but for a factor for each hidden unit, which relu lets pass."""
    mlp = _tied_mlp(nn.ReLU)
    scale = torch.linspace(0.2, 5, 10)
    with torch.no_grad():
        mlp.fc1.weight.mul_(scale[:, None]), mlp.fc1.bias.mul_(scale)
    model, x = nn.Sequential(mlp), torch.randn(4, 6)
    want = model(x)
    report = tokenfusion.tie_weights(model)
    torch.testing.assert_close(model(x), want)
    assert max(matrix.error for matrix in report.matrices) < 1e-6

    attn = Attention(8, 2, qkv_bias=True)
    with torch.no_grad():
        q, k, v = attn.qkv.weight.chunk(3)
        v.copy_(k.t())
        attn.proj.weight.copy_(q.t())
        q.mul_(3), k.div_(3), attn.qkv.bias[:8].mul_(3), attn.qkv.bias[8:16].div_(3)
    model, x = nn.Sequential(attn), torch.randn(2, 3, 8)
    want = model(x)
    assert max(matrix.error for matrix in tokenfusion.tie_weights(model).matrices) < 1e-6
    torch.testing.assert_close(model(x), want)


def test_fresh_weights_are_random_and_biases_stay():
    mlp = Mlp(6, 10)
    bias = mlp.fc1.bias
    model = nn.Sequential(mlp)
    report = tokenfusion.tie_weights(model, init="fresh")
    assert model[0].bias_in is bias
    assert all(matrix.error > 0.5 for matrix in report.matrices)


def test_pattern_selects_by_name():
    model = vit()
    report = tokenfusion.tie_weights(model, pattern="blocks.1.mlp")
    assert [matrix.name for matrix in report.matrices] == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    assert isinstance(model.blocks[1].mlp, TiedFFN) and isinstance(model.blocks[0].mlp, Mlp)
    assert not any(isinstance(m, TiedAttention) for m in model.modules())


def test_nothing_to_tie_is_said():
    model = timm.create_model("resnet18", num_classes=2)
    before = list(model.parameters())
    report = tokenfusion.tie_weights(model)
    assert report.matrices == () and "no module" in str(report) and "unchanged" in str(report)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "module, part",
    [
        (Mlp(6, 10, 8), "8 channels, expected 6"),
        (Mlp(6, 10, act_layer=nn.Tanh), "Tanh"),
        (Mlp(6, 10, norm_layer=nn.LayerNorm), "LayerNorm"),
        (Mlp(6, 10, bias=(True, False)), "bias"),
        (Mlp(6, 10, drop=(0.1, 0.2)), "0.1 and 0.2"),
        (Mlp(6, 10, use_conv=True), "fc1 is Conv2d"),
        (Attention(8, 2, qk_norm=True, norm_layer=nn.LayerNorm), "q_norm is LayerNorm"),
        (Attention(8, 2, attn_head_dim=8), "not square"),
    ],
)
def test_what_cannot_be_tied_is_left_alone_and_reported(module, part):
    model = nn.Sequential(module)
    report = tokenfusion.tie_weights(model)
    assert model[0] is module and report.matrices == ()
    assert len(report.left) == 1 and part in report.left[0].reason and part in str(report)


def test_other_bottlenecks_are_left_alone():
    for name in ("seresnet50", "resnext50_32x4d"):
        report = tokenfusion.tie_weights(timm.create_model(name, num_classes=2))
        assert report.matrices == () and len(report.left) == 4


def test_saved_once_and_loaded(tmp_path):
    model = vit()
    bytes_before = sum(t.nbytes for t in model.state_dict().values())
    tokenfusion.tie_weights(model)
    save_file(model.state_dict(), tmp_path / "tied.safetensors")
    assert (tmp_path / "tied.safetensors").stat().st_size < 0.6 * bytes_before
    other = vit()
    tokenfusion.tie_weights(other, init="fresh")
    other.load_state_dict(load_file(tmp_path / "tied.safetensors"), strict=True)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(other(images), model(images))


def test_bad_arguments():
    with pytest.raises(TypeError, match="model: got Tensor"):
        tokenfusion.tie_weights(torch.ones(1))
    with pytest.raises(ValueError, match="init: got 'best', expected one of 'mean', 'first', 'fresh'"):
        tokenfusion.tie_weights(nn.Sequential(), init="best")


def small_vit(depth: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=depth, embed_dim=32, num_heads=2, num_classes=3)


def test_a_shared_module_is_tied_once_and_shared_still():
    model = small_vit(depth=3)
    model.blocks[1].mlp = model.blocks[2].mlp = model.blocks[0].mlp
    model.blocks[2].attn = model.blocks[0].attn
    report = tokenfusion.tie_weights(model)
    names = {matrix.name.rpartition(".")[0] for matrix in report.matrices}
    assert names == {"blocks.0.mlp", "blocks.0.attn", "blocks.1.attn"}
    assert type(model.blocks[0].mlp) is TiedFFN
    assert model.blocks[0].mlp is model.blocks[1].mlp is model.blocks[2].mlp
    assert model.blocks[0].attn is model.blocks[2].attn is not model.blocks[1].attn
    assert report.parameters_after == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "make", [small_vit, lambda: timm.create_model("resnet50", num_classes=3)], ids=["vit", "resnet"]
)
def test_what_was_frozen_is_frozen(make):
    model = make().to(torch.bfloat16).eval().requires_grad_(False)
    assert tokenfusion.tie_weights(model).matrices
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())


def left_alone(change) -> dict[str, str]:
    """Name -> reason, for a vision transformer of one block that was changed."""
    model = small_vit()
    change(model.blocks[0])
    before = [type(module) for module in model.blocks[0].mlp.modules()]
    report = tokenfusion.tie_weights(model, pattern="*.mlp")
    assert not report.matrices and [type(module) for module in model.blocks[0].mlp.modules()] == before
    return {module.name: module.reason for module in report.left}


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda block: block.mlp.register_forward_hook(lambda *_: None), "it has hooks"),
        (lambda block: block.mlp.fc2.register_full_backward_hook(lambda *_: None), "fc2 has hooks"),
        (lambda block: setattr(block.mlp.fc1, "forward", lambda x: x), "fc1 has its forward set on the instance"),
        (lambda block: setattr(block.mlp, "forward", lambda x: x), "its forward was set on the instance"),
        (lambda block: parametrizations.weight_norm(block.mlp.fc1), "fc1 is parametrized"),
        (lambda block: block.mlp.fc2.weight.requires_grad_(False), "some of its matrices are frozen"),
        (lambda block: setattr(block.norm1, "bias", block.mlp.fc2.bias), "shares a parameter with blocks.0.norm1.bias"),
    ],
)
def test_what_tying_would_lose_is_left_alone(change, part):
    reasons = left_alone(change)
    assert set(reasons) == {"blocks.0.mlp"} and part in reasons["blocks.0.mlp"]
