"""The conventional way: keys and values of every token by matrix products, then scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from timm.models import crossvit


def projections_and_sdpa(query, tokens, key, value, *, heads: int) -> torch.Tensor:
    """Attention of query [B, C] over tokens [B, N, C]; key and value are functions from tokens to [B, N, C]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query.unsqueeze(1), key(tokens), value(tokens)))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)


class ProjectedBlock(crossvit.CrossAttentionBlock):
    """timm's CrossAttentionBlock with scaled_dot_product_attention in place of its explicit softmax."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attn, tokens = self.attn, self.norm1(x)
        out = projections_and_sdpa(attn.wq(tokens[:, 0]), tokens, attn.wk, attn.wv, heads=attn.num_heads)
        return x[:, :1] + attn.proj(out).unsqueeze(1)
