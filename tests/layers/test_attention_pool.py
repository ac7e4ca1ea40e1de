"""The fused attention pooling against timm's."""

from functools import partial

import pytest
import torch
from timm.layers import AttentionPool2d, AttentionPoolLatent
from timm.models import get_graph_node_names
from torch import nn

from tests.crossvit import fused_copy, randomize
from tests.drop_in import BACKWARD, FORWARD, check_parity
from tests.parity import assert_runs

LATENT = {
    "one": {},
    "SigLIP's": {"norm_layer": partial(nn.LayerNorm, eps=1e-6)},
    "three, averaged": {"latent_len": 3, "pool_type": "avg"},
    "three, all of them": {"latent_len": 3, "pool_type": ""},
    "no bias": {"qkv_bias": False},
    "no query projection": {"q_proj": False},
    "narrow": {"latent_dim": 24},
    "positions": {"pos_embed": "abs", "feat_size": 30},
    "no output projection": {"out_features": 0},
    "other size": {"out_features": 10},
}
MAPS = {
    "fused projections": {},
    "separate projections": {"qkv_separate": True},
    "class token": {"class_token": True},
    "other embedding": {"embed_dim": 64},
    "no output projection": {"out_features": 0},
    "classifier": {"out_features": 10},
}


def latent_pool(**options):
    torch.manual_seed(0)
    return randomize(AttentionPoolLatent(48, num_heads=4, **options))


def map_pool(feat_size=(4, 6), **options):
    torch.manual_seed(0)
    return randomize(AttentionPool2d(48, feat_size=feat_size, num_heads=4, **options))


def tokens(batch=3, dtype=torch.float32):
    return torch.randn(batch, 30, 48, generator=torch.Generator().manual_seed(3)).to(dtype)


def feature_map(batch=3, size=(4, 6), dtype=torch.float32):
    return torch.randn(batch, 48, *size, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_latents_without_tokens():
    plain = latent_pool()
    torch.testing.assert_close(fused_copy(plain)(tokens()[:, :0]), plain(tokens()[:, :0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", LATENT)
def test_latents(options, dtype):
    plain = latent_pool(**LATENT[options]).to(dtype)
    check_parity(fused_copy(plain), plain, tokens(dtype=dtype))


def test_other_latents_than_it_was_made_for():
    plain = latent_pool()
    fused = fused_copy(plain)
    for model in (plain, fused):
        model.latent = nn.Parameter(torch.linspace(0, 1, 48)[None])
    torch.testing.assert_close(fused(tokens()), plain(tokens()))
    for model in (plain, fused):
        model.latent = nn.Parameter(torch.ones(1, 2, 48))
        with pytest.raises(RuntimeError, match="shape"):
            model(tokens())


def test_other_tokens_than_there_are_positions():
    plain = latent_pool(**LATENT["positions"])
    for pool in (plain, fused_copy(plain)):
        with pytest.raises(RuntimeError, match="shape"):
            pool(tokens()[:, :1])


@pytest.mark.parametrize("options", ["one", "positions"])
def test_torch_fx_sees_timms_nodes(options):
    plain = nn.Sequential(latent_pool(**LATENT[options]))
    assert get_graph_node_names(fused_copy(plain)) == get_graph_node_names(plain)


def test_more_queries_than_a_kernel_takes():
    plain = randomize(AttentionPoolLatent(192, num_heads=12, latent_len=7, pool_type=""))
    check_parity(fused_copy(plain), plain, torch.randn(2, 20, 192))


@pytest.mark.parametrize("shape", [(3, 1, 1, 30), (30, 30)])
def test_a_mask_takes_timms_path(shape):
    plain = latent_pool()
    mask = torch.ones(shape, dtype=torch.bool).tril(20)[..., :1, :]
    with assert_runs():
        assert torch.equal(fused_copy(plain)(tokens(), attn_mask=mask), plain(tokens(), attn_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", MAPS)
def test_feature_maps(options, memory_format, dtype):
    plain = map_pool(**MAPS[options]).to(dtype)
    check_parity(fused_copy(plain), plain, feature_map(dtype=dtype).contiguous(memory_format=memory_format))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 7)])
def test_positions_are_resampled(size):
    plain = map_pool()
    check_parity(fused_copy(plain), plain, feature_map(size=size))


def test_a_map_of_one_channel_is_for_all():
    plain, x = map_pool(), feature_map()[:, :1]
    torch.testing.assert_close(fused_copy(plain)(x), plain(x))


def test_the_input_is_not_changed():
    fused = fused_copy(map_pool()).eval()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = feature_map().contiguous(memory_format=memory_format)
        with torch.no_grad():
            fused(x)
        assert torch.equal(x, feature_map())


def test_before_the_classifier():
    plain = map_pool(out_features=10)
    fused, x = fused_copy(plain), feature_map()
    with assert_runs(FORWARD), torch.no_grad():
        torch.testing.assert_close(fused(x, pre_logits=True), plain(x, pre_logits=True), rtol=1e-4, atol=1e-5)


def test_all_positions_and_dropout_take_timms_path():
    plain = map_pool(drop_rate=0.5).eval()
    fused, x = fused_copy(plain), feature_map()
    outs = []
    for pool in (plain, fused):
        torch.manual_seed(0)
        with assert_runs():
            outs.append(pool.train()(x))
        pool.eval().reset(pool_type="")
        with assert_runs():
            outs.append(pool(x))
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])


def test_an_empty_batch():
    assert fused_copy(latent_pool())(tokens(batch=0)).shape == (0, 48)
    for options in MAPS.values():
        assert len(fused_copy(map_pool(**options))(feature_map(batch=0))) == 0


@pytest.mark.parametrize("separate", [False, True])
def test_the_key_bias_has_a_gradient_and_it_is_zero(separate):
    for fused, x, parts in (
        (fused_copy(map_pool(qkv_separate=separate)), feature_map(), 3),
        (fused_copy(latent_pool()), tokens(), 2),
    ):
        fused(x).sum().backward()
        assert all(parameter.grad is not None for parameter in fused.parameters())
        bias = dict(fused.named_parameters()).get("k.bias")
        if bias is None:
            fused_bias = fused.qkv.bias if parts == 3 else fused.kv.bias
            gradient = fused_bias.grad.chunk(parts)[-2]
        else:
            gradient = bias.grad
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("pool, x", [(latent_pool, tokens), (map_pool, feature_map)])
def test_compiles_without_graph_breaks(pool, x):
    torch.compiler.reset()
    plain = pool()
    compiled = torch.compile(fused_copy(plain), fullgraph=True, backend="aot_eager")
    with assert_runs(FORWARD, BACKWARD):
        out = compiled(x())
        out.sum().backward()
    torch.testing.assert_close(out, plain(x()), rtol=1e-4, atol=1e-5)
