"""The fused class attention of CaiT, XCiT and VOLO against timm's."""

import re
from functools import partial

import pytest
import torch
from timm.models import cait, volo
from torch import nn

from tests.crossvit import fused_copy, randomize
from tests.drop_in import BACKWARD, FORWARD, check_parity
from tests.parity import assert_runs

_NORM = partial(nn.LayerNorm, eps=1e-6)
KINDS = {
    "ClassAttn": cait.ClassAttn,
    "LayerScaleBlockClassAttn": partial(cait.LayerScaleBlockClassAttn, init_values=0.5, norm_layer=_NORM),
    "ClassAttention": volo.ClassAttention,
    "ClassAttention, heads of 16": partial(volo.ClassAttention, head_dim=16),
    "ClassBlock": partial(volo.ClassBlock, norm_layer=_NORM),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, channels=48, **options):
    torch.manual_seed(0)
    return randomize(KINDS[kind](channels, 6, **({"qkv_bias": True} | options)))


def inputs(kind, tokens=50, batch=3, dtype=torch.float32):
    x = torch.randn(batch, tokens, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    return (x[:, 1:], x[:, :1]) if kind.startswith("LayerScale") else (x,)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 50, 197])
@pytest.mark.parametrize("bias", [True, False])
def test_parity(kind, tokens, bias, dtype):
    plain = make(kind, qkv_bias=bias).to(dtype)
    check_parity(fused_copy(plain), plain, *inputs(kind, tokens, dtype=dtype))


@every_kind
def test_a_class_token_alone(kind):
    plain = make(kind)
    torch.testing.assert_close(fused_copy(plain)(*inputs(kind, 1)), plain(*inputs(kind, 1)))


@every_kind
def test_an_empty_batch(kind):
    plain = make(kind)
    assert fused_copy(plain)(*inputs(kind, batch=0)).shape == plain(*inputs(kind, batch=0)).shape


@pytest.mark.parametrize("shape", [(3, 2, 48), (3, 0, 48), (1, 1, 48), (3, 48), (3, 1, 24)], ids=str)
def test_other_class_tokens_than_one_for_each_image(shape):
    """timm adds the result for the first one to all of them, or refuses."""
    plain, (x, _) = make("LayerScaleBlockClassAttn"), inputs("LayerScaleBlockClassAttn")
    x_cls = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    try:
        expected = plain(x, x_cls)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            fused_copy(plain)(x, x_cls)
    else:
        assert torch.equal(fused_copy(plain)(x, x_cls), expected)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_a_class_token_of_another_dtype(dtypes):
    plain = make("LayerScaleBlockClassAttn")
    tokens = [x.to(dtype) for x, dtype in zip(inputs("LayerScaleBlockClassAttn"), dtypes, strict=True)]
    assert torch.equal(fused_copy(plain)(*tokens), plain(*tokens))


@pytest.mark.parametrize("kind", ["ClassAttn", "LayerScaleBlockClassAttn", "ClassBlock"])
def test_tokens_whose_channels_lie_apart(kind):
    """As CaiT's patch embedding leaves them."""
    plain = make(kind)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(kind)]
    assert apart[0].stride(2) != 1
    check_parity(fused_copy(plain), plain, *apart)


@every_kind
def test_the_key_bias_has_a_gradient_and_it_is_zero(kind):
    fused = fused_copy(make(kind))
    fused(*inputs(kind)).sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())
    attn = getattr(fused, "attn", fused)
    gradient = attn.k.bias.grad if hasattr(attn, "k") else attn.kv.bias.grad.chunk(2)[0]
    assert torch.equal(gradient, torch.zeros_like(gradient))


@every_kind
def test_attention_dropout_in_training_takes_timms_path(kind):
    plain = make(kind, attn_drop=0.5).eval()
    fused = fused_copy(plain)
    outs = []
    for module in (plain, fused):
        torch.manual_seed(0)
        with assert_runs():
            outs.append(module.train()(*inputs(kind)))
    assert torch.equal(*outs)
    with assert_runs(FORWARD):
        fused.eval()(*inputs(kind))


@pytest.mark.parametrize("kind", ["LayerScaleBlockClassAttn", "ClassBlock"])
def test_drop_path_and_other_dropout_draw_the_same_numbers(kind):
    plain = make(kind, drop_path=0.4, **({"proj_drop": 0.3} if kind.startswith("Layer") else {"drop": 0.3})).train()
    outs = []
    for module in (plain, fused_copy(plain)):
        torch.manual_seed(5)
        outs.append(module(*inputs(kind)))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


@every_kind
def test_compiles_without_graph_breaks(kind):
    torch.compiler.reset()
    plain = make(kind)
    compiled = torch.compile(fused_copy(plain), fullgraph=True, backend="aot_eager")
    with assert_runs(FORWARD, BACKWARD):
        out = compiled(*inputs(kind))
        out.sum().backward()
    torch.testing.assert_close(out, plain(*inputs(kind)), rtol=1e-4, atol=1e-5)


def test_nothing_of_the_size_of_the_tokens_is_written():
    from tokenfusion.measure import peak_extra_bytes

    plain = make("LayerScaleBlockClassAttn").eval()
    fused, x = fused_copy(plain), inputs("LayerScaleBlockClassAttn", 4097, batch=1)
    with torch.no_grad():
        assert peak_extra_bytes(lambda: fused(*x)) < 0.05 * peak_extra_bytes(lambda: plain(*x))


@every_kind
@pytest.mark.parametrize("frozen", [False, True])
def test_tokens_made_in_inference_mode(kind, frozen):
    """What timm does with them counts: it copies them, projects them by frozen layers, or raises."""
    plain = make(kind).requires_grad_(not frozen)
    getattr(plain, "attn", plain).q.requires_grad_(True)
    with torch.inference_mode():
        tokens = inputs(kind)
    results = []
    for module in (plain, fused_copy(plain)):
        try:
            out = module(*tokens)
            results.append((out, torch.autograd.grad(out.square().sum(), getattr(module, "attn", module).q.weight)))
        except RuntimeError as error:
            results.append(str(error))
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(*results)
