"""Attention of few queries in the classes of real packages, in small configurations without weights."""

import copy
import importlib

import pytest
import torch
from torch import nn

import tokenfusion
from tests.crossvit import randomize
from tests.drop_in import FORWARD
from tests.parity import assert_runs

DIM, HEADS = 64, 4


def package(name: str):
    pytest.importorskip(name.partition(".")[0])
    return importlib.import_module(name)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def first(out):
    return out[0] if isinstance(out, tuple) else out


def run(model: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    torch.manual_seed(2)
    out = first(model(*args, **kwargs))
    model.zero_grad()
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.fixture(params=[False, True], ids=["evaluated", "trained"])
def check(request):
    """Results and gradients of a model and its fused copy, with the same random numbers."""

    def check(model: nn.Module, kind: str, *args: torch.Tensor, **kwargs) -> None:
        torch.manual_seed(0)
        plain = randomize(model).to(args[0].dtype).train(request.param)
        dropout = any(isinstance(part, nn.Dropout) and part.p > 0 for part in plain.modules()) and request.param
        fused = copy.deepcopy(plain)
        assert {module.kind for module in tokenfusion.fuse(fused, strict=True).modules} == {kind}
        kernels = () if dropout else (FORWARD, f"{FORWARD.removesuffix('_cpu')}_backward_cpu")
        with assert_runs(*kernels):
            got = run(fused, args, kwargs)
        expected = run(plain, args, kwargs)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
        assert not torch.equal(got[0], expected[0])

    return check


X, QUERY = tokens(2, 50, DIM), tokens(2, 1, DIM)


def test_crossvit_of_vit_pytorch(check):
    """The class of its cross-attention is that of its encoders' self-attention, which runs its own forward."""
    crossvit = package("vit_pytorch.cross_vit")
    sizes = {f"{branch}_{name}": value for branch in ("sm", "lg") for name, value in dict(dim=DIM, enc_depth=1).items()}
    model = crossvit.CrossViT(image_size=32, num_classes=5, sm_patch_size=4, lg_patch_size=8, depth=1, **sizes)
    check(model, "Attention", tokens(2, 3, 32, 32))


def test_class_attention_of_vit_pytorch(check):
    for name in ("cait", "xcit"):
        module = package(f"vit_pytorch.{name}").Attention(DIM, HEADS, 16, dropout=0.1)
        check(module, "Attention", QUERY, context=X)


def test_patch_merger_of_vit_pytorch(check):
    check(package("vit_pytorch.vit_with_patch_merger").PatchMerger(DIM, 8), "PatchMerger", X)


def test_attention_pool_of_x_transformers(check):
    """Whose softmax is of float32, so that float64 runs its own forward."""
    model = package("x_transformers").AttentionPool(DIM, 2, heads=HEADS, dim_head=16)
    check(model, "AttentionPool", X.float())
    tokenfusion.fuse(model, strict=True)
    with assert_runs():
        model.double()(X)


@pytest.mark.parametrize(
    "options",
    [
        dict(add_residual=True),
        dict(attn_kwargs=dict(qk_norm=True)),
        dict(attn_kwargs=dict(softclamp_logits=True)),
        dict(attn_kwargs=dict(l2_distance=True)),
    ],
    ids=str,
)
def test_other_attention_pools_of_x_transformers_are_left_alone(options):
    model = package("x_transformers").AttentionPool(DIM, 2, heads=HEADS, dim_head=16, **options)
    (left,) = tokenfusion.fuse(model).left
    assert "does not compute attention of few queries" in left.reason


def test_dropout_inside_x_transformers_runs_its_own_forward_in_training():
    options = dict(heads=HEADS, dim_head=16, attn_kwargs=dict(dropout=0.1))
    model, x = package("x_transformers").AttentionPool(DIM, 2, **options).eval(), X.float()
    fused = copy.deepcopy(model)
    tokenfusion.fuse(fused, strict=True)
    with assert_runs(FORWARD), torch.no_grad():
        fused(x)
    with assert_runs():
        for one, other in zip(run(fused.train(), (x,), {}), run(model.train(), (x,), {}), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("channels", [DIM, 2 * DIM])
def test_attentional_pooler_of_open_clip(check, channels):
    model = package("open_clip.transformer").AttentionalPooler(DIM, channels, HEADS, n_queries=2)
    check(model, "MultiheadAttention", tokens(2, 50, channels))


@pytest.mark.parametrize("att_dim", [32, DIM])
def test_cross_attention_of_torchmil(check, att_dim):
    model = package("torchmil.nn").MultiheadCrossAttention(DIM, att_dim=att_dim)
    check(model, "MultiheadCrossAttention", QUERY, X)


def test_torchmil_drops_in_evaluation_too():
    (left,) = tokenfusion.fuse(package("torchmil.nn").MultiheadCrossAttention(DIM, dropout=0.1)).left
    assert "does not compute attention of few queries" in left.reason


def test_probe_of_stable_pretraining(check):
    model = package("stable_pretraining.backbone.probe").MultiHeadAttentiveProbe(DIM, 5)
    check(model, "MultiHeadAttentiveProbe", X)


def test_aimv2_of_transformers(check):
    aimv2 = package("transformers.models.aimv2.modeling_aimv2")
    config = aimv2.Aimv2VisionConfig(hidden_size=DIM, num_attention_heads=HEADS)
    check(aimv2.Aimv2AttentionPoolingHead(config), "Aimv2AttentionPoolingHead", X)


def vjepa2(implementation: str) -> nn.Module:
    vjepa2 = package("transformers.models.vjepa2.modeling_vjepa2")
    config = vjepa2.VJEPA2Config(hidden_size=DIM, num_attention_heads=HEADS, num_pooler_layers=1)
    config._attn_implementation = implementation
    return vjepa2.VJEPA2AttentivePooler(config)


def test_vjepa2_of_transformers(check):
    check(vjepa2("sdpa"), "VJEPA2PoolerCrossAttention", X)


def test_weights_of_vjepa2():
    """Its eager form returns the weights."""
    (left,) = tokenfusion.fuse(vjepa2("eager")).left
    assert "does not compute attention of few queries" in left.reason
    model = vjepa2("sdpa").double()
    tokenfusion.fuse(model, strict=True)
    model.cross_attention_layer.cross_attn.config._attn_implementation = "eager"
    with assert_runs(), torch.no_grad():
        assert model.cross_attention_layer(QUERY, X)[1] is not None
