"""Classes of nobody's that attend with few queries, with the parts and the names that known code has."""

import torch
import torch.nn.functional as F
from torch import nn


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[B, N, D] -> [B, heads, N, d]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


class Cross(nn.Module):
    """As V-JEPA's CrossAttention: one linear layer of keys and values, queries with the call."""

    def __init__(self, dim: int, num_heads: int, proj: bool = True):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim) if proj else None

    def forward(self, q, x):
        key, value = (_heads(each, self.num_heads) for each in self.kv(x).chunk(2, dim=-1))
        out = _joined(F.scaled_dot_product_attention(_heads(self.q(q), self.num_heads), key, value))
        return out if self.proj is None else self.proj(out)


class Triple(nn.Module):
    """As transformers' VJEPA2PoolerCrossAttention: keys and values apart, and None or weights beside the result."""

    class Config:
        _attn_implementation = "sdpa"

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.config, self.num_heads = self.Config(), num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, queries, keys, values, attention_mask=None):
        projected = zip((self.q_proj, self.k_proj, self.v_proj), (queries, keys, values))
        query, key, value = (_heads(linear(x), self.num_heads) for linear, x in projected)
        if self.config._attn_implementation == "sdpa":
            return _joined(F.scaled_dot_product_attention(query, key, value, attention_mask)), None
        weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
        return _joined(weights @ value), weights


class Pool(nn.Module):
    """As AIM's AttentionPoolingClassifier: the mean of learned queries over tokens after a BatchNorm."""

    def __init__(self, dim: int, num_heads: int, num_queries: int = 2, classes: int = 5, norm=True, bias=False):
        super().__init__()
        self.num_heads = num_heads
        self.k, self.v = (nn.Linear(dim, dim, bias=bias) for _ in range(2))
        self.cls_token = nn.Parameter(torch.randn(1, num_queries, dim))
        self.linear = nn.Linear(dim, classes)
        self.bn = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if norm else nn.Identity()

    def forward(self, x):
        x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        query, key, value = (_heads(each, self.num_heads) for each in (self.cls_token, self.k(x), self.v(x)))
        out = F.scaled_dot_product_attention(query.expand(len(x), -1, -1, -1), key, value)
        return self.linear(_joined(out).mean(dim=1))


class Token(nn.Module):
    """As CAPI's AttnPoolClassifier: one learned query, heads of 4 channels."""

    def __init__(self, dim: int, classes: int = 5):
        super().__init__()
        self.query_token, self.num_heads = nn.Parameter(torch.randn(dim)), dim // 4
        self.kv, self.linear = nn.Linear(dim, 2 * dim), nn.Linear(dim, classes)

    def forward(self, tokens):
        key, value = (_heads(each, self.num_heads) for each in self.kv(tokens).chunk(2, dim=-1))
        query = _heads(self.query_token.expand(len(tokens), 1, -1), self.num_heads)
        return self.linear(_joined(F.scaled_dot_product_attention(query, key, value)).flatten(1))


class Slices(nn.Module):
    """As EfficientProbing: no key, and each query reads its own slice of the value."""

    def __init__(self, dim: int, num_queries: int = 4):
        super().__init__()
        self.scale, self.num_queries = dim**-0.5, num_queries
        self.v, self.cls_token = nn.Linear(dim, dim, bias=False), nn.Parameter(torch.randn(1, num_queries, dim))

    def forward(self, x, cls=None, **_):
        query = self.cls_token if cls is None else cls
        weights = (query * self.scale @ x.transpose(1, 2)).softmax(-1)
        return (weights.unsqueeze(2) @ _heads(self.v(x), self.num_queries)).flatten(1)


class Merger(nn.Module):
    """As vit-pytorch's PatchMerger: no key and no value, what is mixed are the normalised tokens."""

    def __init__(self, dim: int, num_queries: int = 4):
        super().__init__()
        self.scale, self.norm = dim**-0.5, nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(num_queries, dim))

    def forward(self, x):
        x = self.norm(x)
        return (self.queries @ x.transpose(1, 2) * self.scale).softmax(-1) @ x


class Vectors(nn.Module):
    """As stable-pretraining's MultiHeadAttentiveProbe: unscaled, and the queries' results side by side."""

    def __init__(self, dim: int, num_queries: int = 2, classes: int = 5):
        super().__init__()
        self.ln, self.fc = nn.LayerNorm(dim), nn.Linear(num_queries * dim, classes)
        self.attn_vectors = nn.Parameter(torch.randn(num_queries, dim))

    def forward(self, x):
        x = self.ln(x)
        return self.fc(((self.attn_vectors @ x.transpose(1, 2)).softmax(-1) @ x).flatten(1))


class First(nn.Module):
    """As CrossAttention of IBM's CrossViT: the first token attends to all, with dropout of the weights."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.1):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.wq, self.wk, self.wv = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.attn_drop, self.proj = nn.Dropout(attn_drop), nn.Linear(dim, dim)

    def forward(self, x):
        projected = (self.wq(x[:, :1]), self.wk(x), self.wv(x))
        query, key, value = (_heads(each, self.num_heads) for each in projected)
        weights = self.attn_drop((query @ key.transpose(2, 3) * self.scale).softmax(-1))
        return self.proj(_joined(weights @ value))


class Context(nn.Module):
    """As vit-pytorch's Attention, of CrossViT: of a normalised query over itself, or a context, or both."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float = 0.1, bias: bool = False):
        super().__init__()
        inner = heads * dim_head
        self.heads, self.scale, self.norm = heads, dim_head**-0.5, nn.LayerNorm(dim)
        self.attend, self.dropout = nn.Softmax(dim=-1), nn.Dropout(dropout)
        self.to_q, self.to_kv = nn.Linear(dim, inner, bias=bias), nn.Linear(dim, 2 * inner, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))

    def forward(self, x, context=None, kv_include_self=False):
        x = self.norm(x)
        context = x if context is None else context
        if kv_include_self:
            context = torch.cat((x, context), dim=1)
        projected = (self.to_q(x), *self.to_kv(context).chunk(2, dim=-1))
        query, key, value = (_heads(each, self.heads) for each in projected)
        weights = self.dropout(self.attend(query @ key.transpose(2, 3) * self.scale))
        return self.to_out(_joined(weights @ value))


class Talking(Context):
    """As vit-pytorch's Attention, of CaiT: heads that talk, and a query that is always a token, too."""

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__(dim, heads, dim_head)
        self.mix_heads_pre_attn, self.mix_heads_post_attn = (nn.Parameter(torch.randn(heads, heads)) for _ in range(2))

    def forward(self, x, context=None):
        x = self.norm(x)
        context = x if context is None else torch.cat((x, context), dim=1)
        projected = (self.to_q(x), *self.to_kv(context).chunk(2, dim=-1))
        query, key, value = (_heads(each, self.heads) for each in projected)
        scores = torch.einsum("bhij,hg->bgij", query @ key.transpose(2, 3) * self.scale, self.mix_heads_pre_attn)
        weights = self.dropout(self.attend(scores))
        return self.to_out(_joined(torch.einsum("bhij,hg->bgij", weights, self.mix_heads_post_attn) @ value))
