"""Blocks run in place give what they give otherwise, and touch nothing that somebody else holds."""

import copy

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

import tokenfusion
from tests.crossvit import randomize
from tests.parity import assert_parity
from tokenfusion.layers import block_inference

X = torch.randn(2, 9, 16)


def blocks(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return randomize(nn.Sequential(*(Block(16, 2, qkv_bias=True, **options) for _ in range(2)))).eval()


@pytest.fixture
def runs_in_place(monkeypatch):
    """How many blocks went the in-place way."""
    calls = []
    run_block = block_inference._run_block
    monkeypatch.setattr(block_inference, "_run_block", lambda block, x: calls.append(block) or run_block(block, x))
    return calls


@pytest.mark.parametrize("options", [{}, dict(init_values=0.1), dict(drop_path=0.1)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_same_bits_and_untouched_input(options, autocast, runs_in_place):
    model, x = blocks(**options), X.clone()
    autocasts = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
    with torch.no_grad(), autocasts, tokenfusion.backend("reference"):  # whose sums are PyTorch's
        expected = model(x)
        got = block_inference.run_blocks(model, x)
    assert len(runs_in_place) == 2
    assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert torch.equal(x, X)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_mlp_norm": True}, {"act_layer": nn.ReLU}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_products(options, dtype, runs_in_place):
    model, x = blocks(norm_layer=nn.LayerNorm, **options).to(dtype), torch.randn(3, 67, 16).to(dtype)
    with torch.no_grad():
        expected, exact = model(x), copy.deepcopy(model).double()(x.double())
        with torch.autograd.profiler.profile() as profile:
            got = block_inference.run_blocks(model, x)
    assert len(runs_in_place) == 2
    if dtype == torch.float32:
        assert "mkldnn::_linear_pointwise" in {event.name for event in profile.function_events}
    assert_parity(got, expected, exact)


@pytest.mark.parametrize("name", ["0.attn.qkv", "0.attn.q_norm", "1.mlp.fc1", "1.mlp.act"])
def test_a_hook_inside_a_block_runs(name):
    model, seen = blocks(), []
    model.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    with torch.no_grad():
        torch.testing.assert_close(block_inference.run_blocks(model, X), model(X))
    assert len(seen) == 2


def test_training_and_changed_blocks_go_the_usual_way(runs_in_place):
    assert torch.equal(block_inference.run_blocks(blocks(), X), blocks()(X))  # gradients are recorded
    identity = blocks()
    for block in identity:
        block.mlp, block.norm2 = nn.Identity(), nn.Identity()
    with torch.no_grad():
        assert torch.equal(block_inference.run_blocks(identity, X), identity(X))
    assert not runs_in_place


BETWEEN = {  # the linear layers of an MLP
    "dropout that alone is in training": lambda: nn.Dropout(0.5).train(),
    "dropout that alone is in evaluation": lambda: nn.Dropout(0.5).eval(),
    "nothing": nn.Identity,
    "another activation": nn.ReLU,
}


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", BETWEEN.values(), ids=BETWEEN)
def test_what_is_between_both_layers_of_an_mlp(make, training, runs_in_place):
    model, outs = blocks().train(training), []
    for block in model:
        block.mlp.drop1 = make()
    for run in (block_inference.run_blocks, nn.Sequential.__call__):
        torch.manual_seed(0)
        outs.append(run(model, X))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    assert len(runs_in_place) == 2


def test_hooks_run_and_keep_what_they_saw():
    model, seen = blocks(), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        block_inference.run_blocks(model, X)
        assert torch.equal(seen[0], model[0](X))


@torch.no_grad()
@pytest.mark.parametrize("name", ["0.attn.proj", "0.attn", "0.mlp.fc2", "0.mlp.drop2", "0.drop_path1"])
def test_what_a_hook_keeps_does_not_change(name):
    model, kept = blocks(), []
    model.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: kept.append((output, output.clone()))
    )
    block_inference.run_blocks(model, X)
    assert all(torch.equal(output, copy) for output, copy in kept) and kept


@torch.no_grad()
@pytest.mark.parametrize("name", ["attn.proj", "mlp.fc1", "mlp.fc2"])
def test_nothing_in_the_place_of_a_linear_layer(name, runs_in_place):
    model, x = blocks(), X.clone()
    model[0].mlp.fc1, model[0].mlp.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)
    model[0].set_submodule(name, nn.Identity())
    assert torch.equal(block_inference.run_blocks(model, x), model(x)) and torch.equal(x, X)
    assert runs_in_place == [model[1]]
