"""Multi-head attention of one or a few query tokens over a sequence, with the key and value projections absorbed."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tokenfusion.kernels import dispatch, single_query_attention
from tokenfusion.kernels.checks import check_rank, symbolic
from tokenfusion.kernels.single_query_attention.op import MAX_QUERIES
from tokenfusion.layers.drop_in import why_not_linear, why_not_norm
from tokenfusion.layers.own_layer import OwnLayer


class Projection(NamedTuple):
    """Some rows of an nn.Linear, with its names."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def split_linear(linear: nn.Linear, count: int) -> tuple[Projection, ...]:
    """The parts of a linear layer that makes `count` projections of the same size at once.

    In one operation, as in split_class_token.
    """
    weights = linear.weight.chunk(count)
    biases = (None,) * count if linear.bias is None else linear.bias.chunk(count)
    return tuple(Projection(weights[i], biases[i]) for i in range(count))  # torch.fx iterates over nothing


def split_class_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, 1 + N, C] -> views [B, 1, C] and [B, N, C].

    In one operation: two slices would each fill a gradient of the size of x with zeros.
    """
    return x.split((1, x.shape[1] - 1), dim=1)


def scale_of(attn: nn.Module, head_dim: int) -> float:
    """What a module of timm multiplies its scores by: PyTorch's own attention does not ask for attn.scale."""
    return head_dim**-0.5 if attn.fused_attn else attn.scale


def absorbed_attention(
    query: torch.Tensor,
    tokens: torch.Tensor,
    extra_token: torch.Tensor | None,
    norm: nn.LayerNorm | None,
    key: nn.Linear | Projection,
    value: nn.Linear | Projection,
    *,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    """softmax(q k^T * scale) v for few queries, without ever forming keys and values.

    Equivalent to, with x = cat(extra_token, tokens) and d = D / num_heads,

        n = norm(x);  k, v = key(n), value(n);  query, k, v each split into heads of d channels
        attention(query, k, v) with its heads concatenated

    in exact arithmetic; see tokenfusion/kernels/single_query_attention/reference.py for the algebra.

    Args:
        query: [B, L, D], projected; or [1, L, D], the same for every image.
        tokens: [B, N, C], not normalised, any strides; copied where the innermost dimension is not contiguous, as in
            CaiT, whose patch embedding leaves it so.
        extra_token: [B, C], not normalised, one more key; or None.
        norm: the LayerNorm of the keys, over C; None where there is none.
        key, value: the projections, C -> D.

    Returns:
        [B, L, D], the heads' outputs side by side, before the output projection.
    """

    def heads_of(weight: torch.Tensor) -> torch.Tensor:
        return weight.unflatten(0, (num_heads, -1))  # [heads, d, C]

    batch, length = tokens.shape[0], query.shape[1]
    query = query * scale
    if key.bias is not None and torch.is_grad_enabled() and dispatch.transform() is None:
        query = query + 0 * key.bias  # its gradient is zero, and not absent, as optimizers and DDP expect
    query = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, heads, L, d]
    absorbed = _times_each_head(query, heads_of(key.weight)).flatten(1, 2)  # [B, heads L, C]
    if norm is not None and norm.weight is not None:
        absorbed = absorbed * norm.weight
    context = _attend(absorbed.expand(batch, -1, -1), tokens, extra_token, norm)
    if norm is not None and norm.weight is not None:
        context = context * norm.weight
    if norm is not None and norm.bias is not None:
        context = context + norm.bias
    context = context.unflatten(1, (num_heads, length))
    out = _times_each_head(context, heads_of(value.weight).transpose(1, 2))  # [B, heads, L, d]
    out = out.transpose(1, 2).flatten(2)
    return out if value.bias is None else out + value.bias


def _times_each_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, heads, L, .] times [heads, ., .]: for each head one product of all images; x @ weight has one of each."""
    if dispatch.transform() is not None:  # where B = heads, ONNX's optimizer takes images for heads in what is below
        return x @ weight
    by_head = x.transpose(0, 1)
    return torch.bmm(by_head.flatten(1, 2), weight).unflatten(1, by_head.shape[1:3]).transpose(0, 1)


def _attend(
    query: torch.Tensor, tokens: torch.Tensor, extra_token: torch.Tensor | None, norm: nn.LayerNorm | None
) -> torch.Tensor:
    """The operator, in as many calls as its kernels need for the queries."""
    options = dict(normalize=False) if norm is None else dict(normalize=True, eps=norm.eps)
    if dispatch.transform() is not None:
        return single_query_attention(query, tokens, extra_token, **options)
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    parts = [single_query_attention(part, tokens, extra_token, **options) for part in query.split(MAX_QUERIES, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class SingleQueryAttention(OwnLayer, nn.Module):
    """Multi-head attention of one token, or a few, over a sequence: class attention and attention pooling.

    With n the LayerNorm where there is one, and d = dim / num_heads channels a head,

        out = proj(softmax(q(n(query)) k(n(x))^T / sqrt(d)) v(n(x))),   x = cat(extra_token, tokens)

    which is the class attention of CaiT (arXiv:2103.17239, Eq. 5 to 7) with the class token as query and extra token,
    and the pooling by multi-head attention of the Set Transformer (arXiv:1810.00825, Eq. 11) with learned queries,
    which are not normalised. Keys and values are never written, nor, where a kernel runs, are n(x) and x: one pass
    reads the tokens. It pays while heads times queries stay well below dim. Attention weights have no dropout.

    Args:
        dim: channels of the tokens and of the output.
        num_heads: heads, among which the channels are divided.
        num_latents: how many learned queries there are; 0 where the queries come with each call.
        qkv_bias: whether q, k and v have a bias.
        norm_layer: makes the LayerNorm of all tokens, called as nn.LayerNorm is; None for tokens that need none.

    Raises:
        ValueError: num_heads does not divide dim.
        TypeError: norm_layer makes something other than a LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_latents: int = 0,
        qkv_bias: bool = True,
        norm_layer: type[nn.LayerNorm] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of dim = {dim}")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.latent = nn.Parameter(torch.empty(1, num_latents, dim, **dd)) if num_latents else None
        self.norm = None if norm_layer is None else norm_layer(dim, **dd)
        if self.norm is not None and not isinstance(self.norm, nn.LayerNorm):
            raise TypeError(f"norm_layer: it made {type(self.norm).__name__}, expected nn.LayerNorm")
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias, **dd) for _ in range(3))
        self.proj = nn.Linear(dim, dim, **dd)
        if self.latent is not None:
            nn.init.trunc_normal_(self.latent, std=dim**-0.5)

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """The keys' and values' parts are not called, nor the norm on all tokens."""
        parts, key, norm = module._modules, module._modules.get("k"), module._modules.get("norm")
        dim = key.in_features if type(key) is nn.Linear else 0
        reason = why_not_linear(key, "k", dim, dim) or why_not_linear(parts.get("v"), "v", dim, dim)
        return reason if norm is None else reason or why_not_norm(norm, "norm")

    def plain_forward(
        self, tokens: torch.Tensor, query: torch.Tensor | None = None, extra_token: torch.Tensor | None = None
    ) -> torch.Tensor:
        if query is None:
            assert self.latent is not None
            query = self.latent
        elif self.norm is not None:
            query = self.norm(query)
        if extra_token is not None:
            tokens = torch.cat((extra_token.unsqueeze(1), tokens), dim=1)
        if self.norm is not None:
            tokens = self.norm(tokens)
        q, k, v = self._split(self.q(query)), self._split(self.k(tokens)), self._split(self.v(tokens))
        scores = (q * self.scale) @ k.transpose(-2, -1)
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, dim] -> [B, heads, N, d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(
        self, tokens: torch.Tensor, query: torch.Tensor | None = None, extra_token: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            tokens: [B, N, dim], N >= 1, any strides; read in place where the innermost dimension is contiguous.
            query: [B, L, dim], the tokens that attend, or [1, L, dim] for all images; None for the learned ones.
            extra_token: [B, dim], one more token that is attended to, such as a class token kept apart; or None.

        Returns:
            [B, L, dim].

        Raises:
            ValueError: no query where none is learned, or one where they are; or what single_query_attention raises.
        """
        if torch.jit.is_scripting():
            return self.plain_forward(tokens, query, extra_token)
        if (query is None) == (self.latent is None):
            expected = "a tensor [B, L, dim]" if self.latent is None else "None, because the queries are learned"
            raise ValueError(f"query: got {'None' if query is None else 'a tensor'}, expected {expected}")
        if query is not None and not symbolic(query):
            check_rank("query", query, "[B, L, dim]")
        if not self.fuses():
            return self.plain_forward(tokens, query, extra_token)
        if query is None:
            query = self.latent
        elif self.norm is not None:
            query = self.norm(query)
        out = absorbed_attention(
            self.q(query),
            tokens,
            extra_token,
            self.norm,
            self.k,
            self.v,
            num_heads=self.num_heads,
            scale=self.scale,
        )
        return self.proj(out)
