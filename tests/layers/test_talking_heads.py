"""Talking heads: few queries whose scores and weights are mixed over the heads, as in vit-pytorch's CaiT."""

import pytest
import torch
from torch import nn

from tests.drop_in import BACKWARD, FORWARD, check_parity
from tokenfusion.layers.single_query_attention import absorbed_attention, attention_with_weights

HEADS, C, D = 4, 48, 32
MIXES = {"both": (True, True), "scores": (True, False), "weights": (False, True)}
KERNELS = FORWARD, BACKWARD


class Plain(nn.Module):
    """The heads of vit-pytorch's CaiT, with a norm of all tokens, biases, masks and weights, which that has not."""

    def __init__(self, bias=False, mixes=(True, True), dropout=0.0, **call):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(C)
        self.q, self.k, self.v = (nn.Linear(C, D, bias=bias) for _ in range(3))
        self.pre, self.post = (nn.Parameter(torch.randn(HEADS, HEADS)) if given else None for given in mixes)
        self.dropout, self.result, self.call = nn.Dropout(dropout), 0, call
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, tokens, x):
        torch.manual_seed(3)
        query, extra = self.q(self.norm(x)), x[:, 0] if self.call.get("extra") else None
        mask = self.call.get("mask")
        mask = None if mask is None else mask[:, None, None]
        return self.attend(query, tokens, extra, mask)[self.result]

    def attend(self, query, tokens, extra, mask):
        context = self.norm(tokens if extra is None else torch.cat((extra[:, None], tokens), dim=1))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, self.k(context), self.v(context)))
        dots = torch.einsum("bhid,bhjd->bhij", q, k) * (D // HEADS) ** -0.5
        if self.pre is not None:
            dots = torch.einsum("bhij,hg->bgij", dots, self.pre)
        if mask is not None:
            dots = dots.masked_fill(nn.functional.pad(mask, (dots.shape[-1] - mask.shape[-1], 0)), -torch.inf)
        attn = self.dropout(dots.softmax(dim=-1))
        if self.post is not None:
            attn = torch.einsum("bhij,hg->bgij", attn, self.post)
        return torch.einsum("bhij,bhjd->bhid", attn, v).transpose(1, 2).flatten(2), attn


class Fused(Plain):
    def attend(self, query, tokens, extra, mask):
        operands = query, tokens, extra, self.norm, self.k, self.v
        options = {"num_heads": HEADS, "scale": (D // HEADS) ** -0.5}
        options |= {"mix_pre_attn": self.pre, "mix_post_attn": self.post}
        if "lengths" in self.call:
            return (absorbed_attention(*operands, **options, lengths=self.call["lengths"]),)
        if not self.result and not self.dropout.p and mask is None:
            return (absorbed_attention(*operands, **options),)
        return attention_with_weights(*operands, **options, mask=mask, dropout=self.dropout.p)


def check(runs, result=0, dtype=torch.float32, **options):
    plain, fused = (kind(**options).to(dtype) for kind in (Plain, Fused))
    plain.result = fused.result = result
    generator = torch.Generator().manual_seed(1)
    tensors = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 40, C), (3, 2, C)))
    check_parity(fused, plain, *tensors, runs=runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mixes", MIXES.values(), ids=MIXES)
def test_by_the_kernel(mixes, bias, extra, dtype):
    check(KERNELS, bias=bias, mixes=mixes, extra=extra, dtype=dtype)


@pytest.mark.parametrize("result", [0, 1], ids=["output", "weights"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mixes", MIXES.values(), ids=MIXES)
def test_masks_dropout_and_weights(mixes, dropout, masked, result):
    """Dropout before the second mix, by the same random numbers; the weights are those that multiply the values."""
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(2)) < 0.4 if masked else None
    runs = () if masked or dropout else KERNELS[: 2 - result]
    check(runs, result, bias=True, mixes=mixes, dropout=dropout, extra=True, mask=mask)


@pytest.mark.parametrize("extra", [False, True])
def test_lengths(extra):
    """Of a bag of nothing no bias is left, however the heads are mixed."""
    fused, plain = Fused(bias=True, extra=extra).double(), Plain(bias=True, extra=extra).double()
    tokens, x = torch.randn(3, 40, C, dtype=torch.float64), torch.randn(3, 2, C, dtype=torch.float64)
    fused.call["lengths"] = torch.tensor([40, 7, 0])
    out = fused(tokens, x)
    for image, length in enumerate(fused.call["lengths"].tolist()):
        one = slice(image, image + 1)
        expected = plain(tokens[one, :length], x[one]) if length or extra else torch.zeros(1, 2, D, dtype=out.dtype)
        torch.testing.assert_close(out[one], expected)
