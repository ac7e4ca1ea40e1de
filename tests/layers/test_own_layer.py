"""Subclasses of the package's layers belong to their authors; SingleQueryAttention calls layers that were changed."""

import pytest
import torch
from torch import nn

import tokenfusion
from tokenfusion.layers import CrossAttentionBlock, SingleQueryAttention, TiedFFN

X = torch.randn(3, 9, 32)


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
