"""The fused CrossViT layers against timm's."""

import copy

import pytest
import torch
from timm.models import crossvit

import tokenfusion
from tests.crossvit import fused_copy, randomize, small_crossvit
from tests.parity import assert_parity, assert_runs
from tokenfusion import layers
from tokenfusion.kernels import extension

FORWARD, BACKWARD = "single_query_attention_cpu", "single_query_attention_backward_cpu"
OF_BLOCKS = ("attention_cpu", "mlp_cpu") if extension.amx_allowed() else ()  # in inference in bfloat16


def block_of(kind, channels=48, heads=6, **options):
    torch.manual_seed(0)
    return randomize(kind(channels, heads, **({"qkv_bias": True} | options)))


def outputs_and_gradients(module, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    module.zero_grad()
    out = module(*inputs)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    parameters = {name: p.grad for name, p in module.named_parameters() if not name.endswith("wk.bias")}
    return {"out": out} | {f"input {i}": x.grad for i, x in enumerate(inputs)} | parameters


def check_parity(module, plain, *inputs):
    """module against timm's plain one, both against timm's in float64."""
    with assert_runs(FORWARD, BACKWARD):
        actual = outputs_and_gradients(module, *inputs)
    unfused = outputs_and_gradients(plain, *inputs)
    exact = outputs_and_gradients(copy.deepcopy(plain).double(), *(x.double() for x in inputs))
    for name in exact:
        assert_parity(actual[name], unfused[name], exact[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 50, 197])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_block(tokens, bias, dtype):
    plain = block_of(crossvit.CrossAttentionBlock, qkv_bias=bias).to(dtype)
    fused = block_of(layers.CrossAttentionBlock, qkv_bias=bias).to(dtype)
    check_parity(fused, plain, torch.randn(3, tokens, 48).to(dtype))


def test_class_token_apart_from_the_patches():
    block = block_of(layers.CrossAttentionBlock)
    x = torch.randn(3, 21, 48)
    torch.testing.assert_close(block(x[:, :1], x[:, 1:]), block(x))
    torch.testing.assert_close(block(x[:, :1], x[:, 1:1]), block(x[:, :1]))


def test_the_key_bias_has_a_gradient_and_it_is_zero():
    block = block_of(layers.CrossAttentionBlock)
    block(torch.randn(3, 21, 48)).sum().backward()
    assert torch.equal(block.attn.wk.bias.grad, torch.zeros(48))
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_attention_dropout_in_training_takes_timms_path():
    fused = block_of(layers.CrossAttentionBlock, attn_drop=0.5)
    plain = block_of(crossvit.CrossAttentionBlock, attn_drop=0.5)
    x = torch.randn(3, 21, 48)
    for arguments in ((x,), (x[:, :1], x[:, 1:])):
        torch.manual_seed(0)
        expected = plain(x)
        torch.manual_seed(0)
        with assert_runs():
            assert torch.equal(fused(*arguments), expected)
    with assert_runs(FORWARD):
        torch.testing.assert_close(fused.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("frozen", ["weights", "input", "attention"])
def test_frozen_parts(frozen):
    plain, fused = block_of(crossvit.CrossAttentionBlock), block_of(layers.CrossAttentionBlock)
    x = torch.randn(3, 21, 48)
    gradients = []
    for block in (plain, fused):
        block.requires_grad_(frozen != "weights")
        if frozen == "attention":
            block.attn.requires_grad_(False)
        tokens = x.clone().requires_grad_(frozen != "input")
        block(tokens).square().sum().backward()
        gradients.append([tokens.grad, *(p.grad for n, p in block.named_parameters() if not n.endswith("wk.bias"))])
    for expected, got in zip(*gradients):
        assert (expected is None) == (got is None)
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_multi_scale_block_with_drop_path_and_dropout():
    model = randomize(small_crossvit(drop_path_rate=0.5, proj_drop_rate=0.3)).train()
    fused = fused_copy(model)
    images = torch.randn(4, 3, 48, 48)
    outs = []
    for candidate in (model, fused):
        torch.manual_seed(5)
        outs.append(candidate(images))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)


def test_dropout_in_the_projections_draws_the_same_numbers():
    model = small_crossvit()
    for block in model.blocks:
        for proj in (*block.projs, *block.revert_projs):
            proj.append(torch.nn.Dropout(0.3))
    model, outs = randomize(model).train(), []
    for candidate in (model, fused_copy(model)):
        torch.manual_seed(5)
        outs.append(candidate(torch.ones(4, 3, 48, 48)))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)


def test_autocast():
    plain = randomize(small_crossvit()).eval()
    fused = fused_copy(plain)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(images.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            unfused = plain(images)
            with assert_runs(FORWARD, *OF_BLOCKS[:1]):
                actual = fused(images)
    assert_parity(actual, unfused, exact)


def test_bfloat16():
    plain = randomize(small_crossvit()).eval().bfloat16()
    fused, images = fused_copy(plain), torch.randn(2, 3, 48, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(images.double())
        with assert_runs(FORWARD, *OF_BLOCKS):
            actual = fused(images)
        assert_parity(actual, plain(images), exact)


@pytest.mark.parametrize("training", [False, True])
def test_block_compiles_without_graph_breaks(training):
    torch.compiler.reset()
    plain, fused = block_of(crossvit.CrossAttentionBlock), block_of(layers.CrossAttentionBlock)
    compiled = torch.compile(fused, fullgraph=True)
    x = torch.randn(3, 21, 48)
    with torch.set_grad_enabled(training), assert_runs(*((FORWARD, BACKWARD) if training else (FORWARD,))):
        out = compiled(x)
        if training:
            out.square().sum().backward()
    torch.testing.assert_close(out, plain(x), rtol=1e-4, atol=1e-5)
    if training:
        plain(x).square().sum().backward()
        for (name, expected), got in zip(plain.named_parameters(), fused.parameters()):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_model_is_one_graph(training):
    torch.compiler.reset()
    plain = randomize(small_crossvit()).train(training)
    compiled = torch.compile(fused_copy(plain), fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 48, 48)
    # with gradients, the backward is traced beforehand
    with torch.set_grad_enabled(training), assert_runs(*((FORWARD, BACKWARD) if training else (FORWARD,))):
        torch.testing.assert_close(compiled(images), plain(images), rtol=1e-4, atol=1e-5)


def test_nothing_of_the_size_of_the_tokens_is_written():
    from tokenfusion.measure import peak_extra_bytes

    x = torch.randn(1, 4097, 48)
    fused, plain = block_of(layers.CrossAttentionBlock).eval(), block_of(crossvit.CrossAttentionBlock).eval()
    with torch.no_grad():
        assert peak_extra_bytes(lambda: fused(x)) < 0.05 * peak_extra_bytes(lambda: plain(x))


def test_reference_backend_serves_where_no_kernel_runs():
    plain, fused = block_of(crossvit.CrossAttentionBlock), block_of(layers.CrossAttentionBlock)
    x = torch.randn(2, 9, 48)
    with tokenfusion.backend("reference"), assert_runs():
        torch.testing.assert_close(fused(x), plain(x))
