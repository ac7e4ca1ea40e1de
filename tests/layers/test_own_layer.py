"""Subclasses of the package's layers belong to their authors; SingleQueryAttention calls layers that were changed."""

import pytest
import torch
from torch import nn

import tokenfusion
from tokenfusion import layers
from tokenfusion.layers import CrossAttentionBlock, SingleQueryAttention, TiedFFN

X = torch.randn(3, 9, 32)


BAD = {
    "dim": [lambda: layers.SingleQueryAttention(0, 1), lambda: layers.DynaMixerOp(8.5, 4, 2)],
    "num_latents": [lambda: layers.SingleQueryAttention(8, 2, num_latents=-1)],
    "num_heads": [lambda: layers.TiedAttention(8, 0), lambda: layers.TiedAttention(8, -2)],
    "attn_drop": [lambda: layers.TiedAttention(8, 2, attn_drop=1.5)],
    "hidden_features": [lambda: TiedFFN(8, -1)],
    "drop": [lambda: TiedFFN(8, drop=2.0), lambda: TiedFFN(8, drop=-0.1)],
    "recompute": [lambda: TiedFFN(8, recompute="yes")],
    "in_channels": [lambda: layers.TiedBottleneck(0, 2), lambda: layers.UpConvConcat(0, 3)],
    "dilation": [lambda: layers.TiedBottleneck(8, 2, dilation=0)],
    "kernel_size": [
        *(lambda k=k: layers.UpConvConcat(2, 3, k) for k in (0, -2, 2.5, (2, 3))),
        lambda: layers.UpConvAdd(2, 3, (4, 2)),
        lambda: layers.UpConvConcatProject(2, 3, 2, 2, 0),
    ],
    "skip_channels": [lambda: layers.UpConvConcatProject(2, 3, -1, 2)],
    "scale": [*(lambda k=k: layers.UpCopyConcat(k) for k in (0, -1, 1.5)), lambda: layers.UpCopyAdd(0)],
}


@pytest.mark.parametrize("name, make", [(name, make) for name, makes in BAD.items() for make in makes])
def test_what_no_layer_can_be_made_of(name, make):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        make()


def test_a_kernel_size_for_both_sides():
    assert layers.UpConvConcat(2, 3, (2, 2)).kernel_size == (2, 2)


class Registered:
    names = []

    def __init_subclass__(cls, key: str, **kwargs):
        super().__init_subclass__(**kwargs)
        Registered.names.append(key)


@pytest.mark.parametrize("base, sizes", [(TiedFFN, (32, 64)), (CrossAttentionBlock, (32, 4))])
def test_a_subclass_with_a_mixin_keeps_its_class(base, sizes):
    class Own(base, Registered, key=base.__name__):
        pass

    module = Own(*sizes).eval()
    assert Registered.names[-1] == base.__name__
    expected = module(X)
    tokenfusion.unfuse(nn.Sequential(module))
    assert type(module) is Own
    assert torch.equal(module(X), expected)


@pytest.mark.parametrize("norm_layer", [None, nn.LayerNorm])
@pytest.mark.parametrize("latents", [0, 2])
def test_single_query_attention_calls_what_was_changed(latents, norm_layer):
    layer = SingleQueryAttention(32, 4, num_latents=latents, norm_layer=norm_layer)
    inputs = X, None if latents else torch.randn(3, 2, 32), torch.randn(3, 32)
    fused, seen = layer(*inputs), []
    torch.testing.assert_close(torch.jit.script(layer)(*inputs), fused, rtol=1e-5, atol=1e-5)
    hook = layer.k.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(layer(*inputs), fused, rtol=1e-5, atol=1e-5)
    assert seen == [(3, 10, 32)]
    hook.remove()
    layer.v.forward = torch.zeros_like
    out = layer(*inputs)
    torch.testing.assert_close(out, layer.proj.bias.expand_as(out))
