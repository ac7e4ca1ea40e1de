"""Every public operator and layer on small inputs, for what all of them have to do."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from tokenfusion import kernels, layers
from tokenfusion.layers.attention_pool import AttentionPoolLatent
from tokenfusion.layers.multihead_attention import MultiheadAttention


class Case(NamedTuple):
    """call(*tensors): all that the call depends on, or, for a layer, what is given to it."""

    call: Callable
    tensors: tuple[torch.Tensor, ...]


def _normal(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for shape in shapes)


def _attend(query, tokens, extra_token):
    return kernels.single_query_attention(query, tokens, extra_token, normalize=True)


def _attend_in_bags(query, tokens, extra_token):
    lengths = torch.tensor([3, 0])
    return kernels.single_query_attention(query, tokens, extra_token, lengths=lengths, normalize=True)


def _mix(x, compress_weight, compress_bias, generate_weight, generate_bias):
    return kernels.dynamic_mixing(x, compress_weight, compress_bias, generate_weight, generate_bias, segments=2, dim=1)


def _sum_of_two(branch, other_branch, weight, other_weight, bias, gates):
    return kernels.gated_sum([branch, other_branch], [weight, other_weight], [bias, None], gates)


def _upconv_concat_project(x, weight, bias, skip, proj_weight, proj_bias):
    return kernels.upconv_concat_project(x, weight, bias, skip, proj_weight, proj_bias, skip_first=True)


_UP = (2, 2, 2, 2), (2, 3, 2, 2), (3,)

OPERATORS = {
    "single_query_attention": Case(_attend, _normal((2, 3, 8), (2, 5, 8), (2, 8))),
    "single_query_attention, lengths": Case(_attend_in_bags, _normal((2, 3, 8), (2, 5, 8), (2, 8))),
    "dynamic_mixing": Case(_mix, _normal((2, 4, 3, 8), (4, 8), (4,), (16, 8), (16,))),
    "tied_ffn": Case(kernels.tied_ffn, _normal((3, 4), (8, 4), (8,), (4,))),
    "upconv_concat": Case(kernels.upconv_concat, _normal(*_UP, (2, 1, 4, 4))),
    "upconv_concat_project": Case(_upconv_concat_project, _normal(*_UP, (2, 2, 4, 4), (2, 5), (2,))),
    "upconv_add": Case(kernels.upconv_add, _normal(*_UP, (2, 3, 4, 4))),
    "gated_sum": Case(_sum_of_two, _normal((2, 5, 6), (2, 5, 6), (4, 6), (4, 6), (4,), (2, 2, 4))),
}


class _MultiScaleBlock(layers.MultiScaleBlock):
    """Takes and gives tensors, and no lists of them."""

    def forward(self, first, second):
        return torch.cat([tokens.flatten(1) for tokens in super().forward([first, second])], dim=1)


class _TiedBottleneck(layers.TiedBottleneck):
    """Holds the weight that comes from its stage otherwise."""

    def __init__(self):
        super().__init__(8, 2)
        self.weight = nn.Parameter(torch.empty(2, 8))

    def forward(self, x):
        return super().forward(x, self.weight)


class _Masked(layers.SingleQueryAttention):
    """Leaves some tokens out."""

    def forward(self, tokens):
        return super().forward(tokens, mask=tokens[..., 0] < 0)


class _Probes(layers.ProbeGrid):
    """Two probes; gives one tensor."""

    def __init__(self):
        attentions = [layers.SingleQueryAttention(8, 2, num_latents=count) for count in (1, 2)]
        super().__init__([nn.Sequential(attentions[0], nn.Linear(8, 3)), attentions[1]])

    def forward(self, tokens):
        return torch.cat([out.flatten(1) for out in super().forward(tokens)], dim=1)


class _FewQueries(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.attn = MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, query, tokens):
        return self.attn(query, tokens, tokens)[0]


_LAYERS = {
    "CrossAttentionBlock": (lambda: layers.CrossAttentionBlock(8, 2, qkv_bias=True), [(2, 4, 8)]),
    "CrossAttentionBlock, patches apart": (lambda: layers.CrossAttentionBlock(8, 2), [(2, 1, 8), (2, 4, 8)]),
    "MultiScaleBlock": (
        lambda: _MultiScaleBlock([4, 8], [2, 2], [1, 1, 1], [2, 2], [1.0, 1.0, 1.0], drop_path=[0.0, 0.0]),
        [(2, 3, 4), (2, 4, 8)],
    ),
    "SingleQueryAttention, learned queries": (lambda: layers.SingleQueryAttention(8, 2, num_latents=2), [(2, 4, 8)]),
    "SingleQueryAttention": (
        lambda: layers.SingleQueryAttention(8, 2, norm_layer=nn.LayerNorm),
        [(2, 4, 8), (2, 1, 8), (2, 8)],
    ),
    "SingleQueryAttention, masked": (lambda: _Masked(8, 2, num_latents=2), [(2, 4, 8)]),
    "ProbeGrid": (_Probes, [(2, 4, 8)]),
    "MultiheadAttention": (lambda: _FewQueries(32, 2), [(2, 1, 32), (2, 4, 32)]),
    "AttentionPoolLatent": (lambda: AttentionPoolLatent(8, num_heads=2), [(2, 4, 8)]),
    "DynaMixerOp": (lambda: layers.DynaMixerOp(8, 4, 2), [(2, 4, 8)]),
    "DynaMixerOp, dense": (lambda: layers.DynaMixerOp(8, 4, 2, generator="dense"), [(2, 4, 8)]),
    "DynaMixerBlock": (lambda: layers.DynaMixerBlock(8, (3, 4), 2), [(2, 3, 4, 8)]),
    "DynaMixerBlock, plain sum": (lambda: layers.DynaMixerBlock(8, 3, 2, reweighting=False), [(2, 3, 3, 8)]),
    "TiedFFN": (lambda: layers.TiedFFN(4, 8), [(2, 3, 4)]),
    "TiedAttention": (lambda: layers.TiedAttention(8, 2), [(2, 3, 8)]),
    "TiedBottleneck": (_TiedBottleneck, [(2, 8, 3, 3)]),
    "UpConvConcat": (lambda: layers.UpConvConcat(2, 3), [(2, 2, 2, 2), (2, 1, 4, 4)]),
    "UpConvAdd": (lambda: layers.UpConvAdd(2, 3), [(2, 2, 2, 2), (2, 3, 4, 4)]),
    "UpConvConcatProject": (lambda: layers.UpConvConcatProject(2, 3, 2, 2), [(2, 2, 2, 2), (2, 2, 4, 4)]),
    "UpCopyConcat": (layers.UpCopyConcat, [(2, 2, 2, 2), (2, 1, 4, 4)]),
    "UpCopyAdd": (layers.UpCopyAdd, [(2, 2, 2, 2), (2, 2, 4, 4)]),
}


def layer(name: str) -> Case:
    """A layer of the kind, with parameters of which none hides another, and its inputs."""
    make, shapes = _LAYERS[name]
    module = make().double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return Case(module, _normal(*shapes))


LAYERS = tuple(_LAYERS)
