"""Multi-head attention of one or a few query tokens over a sequence, with the key and value projections absorbed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tokenfusion.kernels import dispatch, single_query_attention
from tokenfusion.kernels.checks import check_device, check_floating, check_rank, check_shape, check_sizes, symbolic
from tokenfusion.kernels.single_query_attention.op import check_lengths, is_nested, packed, padded
from tokenfusion.kernels.widened import bmm
from tokenfusion.layers.attention_weights import (
    as_lengths,
    attention_weights,
    beyond,
    left_out,
    normalized,
    scores_of,
    weighted_sum,
)
from tokenfusion.layers.drop_in import PLAIN, why_not_linear, why_not_norm, why_not_parameters
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


def why_not_scale(attn: nn.Module) -> str | None:
    """Why queries that are not split into heads may not be multiplied by attn.scale, as a temperature of each head."""
    scale = getattr(attn, "scale", None)
    if type(scale) in (int, float) or (type(scale) in PLAIN and scale.dim() == 0):
        return None
    return f"scale is {type(scale).__name__}, expected a number"


def absorbed_attention(
    query: torch.Tensor,
    tokens: torch.Tensor,
    extra_token: torch.Tensor | None,
    norm: nn.LayerNorm | None,
    key: nn.Linear | Projection | None,
    value: nn.Linear | Projection | None,
    *,
    num_heads: int,
    scale: float,
    lengths: torch.Tensor | None = None,
    mix_pre_attn: torch.Tensor | None = None,
    mix_post_attn: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v for few queries, without ever forming keys and values.

    Equivalent to, with x = cat(extra_token, tokens) and d = D / num_heads,

        n = norm(x);  k, v = key(n), value(n);  query, k, v each split into heads of d channels
        attention(query, k, v) with its heads concatenated

    in exact arithmetic; see tokenfusion/kernels/single_query_attention/reference.py for the algebra. Talking heads
    (arXiv:2003.02436) mix scores and weights, and both are linear over the heads: head g has the query
    sum_h mix_pre_attn[h, g] W_k,h^T q_h, and the context sum_h mix_post_attn[h, g] context_h.

    Args:
        query: [B, L, D], projected; or [1, L, D], the same for every image.
        tokens: [B, N, C], not normalised, any strides; copied where the innermost dimension is not contiguous, as in
            CaiT, whose patch embedding leaves it so. Or a jagged nested tensor.
        extra_token: [B, C], not normalised, one more key; or None.
        norm: the LayerNorm of the keys, over C; None where there is none.
        key, value: the projections, C -> D. Without a key, query is [B, heads L, C], compared with n itself; without a
            value, the result is [B, heads L, C].
        lengths: [B], how many of an image's tokens there are; None for all.
        mix_pre_attn, mix_post_attn: [heads, heads], by whose column g head g mixes the scores of all heads, and the
            weights that the softmax makes of those; None where heads do not talk.

    Returns:
        [B, L, D], the heads' outputs side by side, before the output projection.
    """
    absorbed = _absorbed(query * scale, norm, key, num_heads, mix_pre_attn).expand(tokens.shape[0], -1, -1)
    context = _attend(absorbed, tokens, extra_token, norm, lengths)
    mass = None  # what the weights of an image without any token add up to
    if is_nested(tokens):
        lengths = tokens.offsets().diff() if tokens.lengths() is None else tokens.lengths()
    if lengths is not None and extra_token is None:
        mass = (lengths > 0).to(context.dtype)[:, None, None, None]
    return _heads_side_by_side(context, norm, value, num_heads, mass, mix_post_attn)


def attention_with_weights(
    query: torch.Tensor,
    tokens: torch.Tensor,
    extra_token: torch.Tensor | None,
    norm: nn.LayerNorm | None,
    key: nn.Linear | Projection | None,
    value: nn.Linear | Projection | None,
    *,
    num_heads: int,
    scale: float,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    empty_is_zero: bool = True,
    mix_pre_attn: torch.Tensor | None = None,
    mix_post_attn: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `absorbed_attention`, with the attention weights; keys and values are formed no more than there.

    With a mask or dropout the weights need not add up to one, so what is constant in the values, the biases of `value`
    and of `norm`, is multiplied by their sum. Without, the kernel runs beside them, and where nobody uses the weights
    its backward pass alone.

    Args:
        mask: boolean (True leaves a token out) or additive, broadcast to [B, heads, L, N]; the extra token has none.
            It joins the scores after mix_pre_attn.
        dropout: the rate at which weights are dropped, with the random numbers of an unfused attention.
        empty_is_zero: where the mask leaves no token, weights are zero, and not NaN.

    Returns:
        [B, L, D] and the weights [B, heads, L, N], or 1 + N with the extra token first, after dropout and, after that,
        mix_post_attn.
    """
    absorbed = _absorbed(query * scale, norm, key, num_heads, mix_pre_attn).expand(tokens.shape[0], -1, -1)
    n, extra_n = normalized(tokens, norm), normalized(extra_token, norm)
    scores = scores_of(absorbed, n, extra_n).unflatten(1, (num_heads, -1))
    weights = attention_weights(scores, mask, dropout, empty_is_zero)
    if mask is None and dropout == 0:
        context, mass = _attend(absorbed, tokens, extra_token, norm), None
    else:
        context, mass = weighted_sum(weights.flatten(1, 2), n, extra_n), weights.sum(dim=-1, keepdim=True)
    out = _heads_side_by_side(context, norm, value, num_heads, mass, mix_post_attn)
    return out, _mixed(weights, mix_post_attn)


def _absorbed(
    query: torch.Tensor,
    norm: nn.LayerNorm | None,
    key: nn.Linear | Projection | None,
    num_heads: int,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """Projected queries [B, L, D] -> [B, heads L, C], whose products with normalised tokens are the scores."""
    absorbed = query if key is None else _mixed(_times_key(query, key, num_heads), mix).flatten(1, 2)
    return absorbed if norm is None or norm.weight is None else _rounded(absorbed * norm.weight, absorbed)


def _times_key(query: torch.Tensor, key: nn.Linear | Projection, num_heads: int) -> torch.Tensor:
    """[B, L, D] -> [B, heads, L, C]."""
    if key.bias is not None and dispatch.transform() is None:
        # its gradient is zero, and not absent, as optimizers and DDP expect; NaN and infinities in it give NaN
        query = query.add(key.bias, alpha=0)
    query = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, heads, L, d]
    return _times_each_head(query, _heads_of(key.weight, num_heads))


def _heads_side_by_side(
    context: torch.Tensor,
    norm: nn.LayerNorm | None,
    value: nn.Linear | Projection | None,
    num_heads: int,
    mass: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, heads L, C], sums of normalised tokens, mixed over the heads -> [B, L, D].

    mass: what the weights of each sum add up to, broadcast to [B, heads, L, 1]; None where that is one.
    """
    unmixed = context.unflatten(1, (num_heads, -1))
    context = _mixed(unmixed, mix)
    if mix is not None:
        mass = _mixed(mix.new_ones(1, num_heads, 1, 1) if mass is None else mass.expand(-1, num_heads, -1, -1), mix)
    sums = context
    if norm is not None and norm.weight is not None:
        context = context * norm.weight
    if norm is not None and norm.bias is not None:
        context = context + (norm.bias if mass is None else mass * norm.bias)
    context = _rounded(context, sums)
    if value is None:
        return (context.clone() if context is unmixed else context).flatten(1, 2)  # whose memory autograd keeps
    out = _times_each_head(context, _heads_of(value.weight, num_heads).transpose(1, 2))  # [B, heads, L, d]
    if value.bias is not None:
        bias = value.bias.unflatten(0, (num_heads, 1, -1))
        out = out + (bias if mass is None else mass * bias).to(out.dtype)  # of nn.Linear's under autocast
    return out.transpose(1, 2).flatten(2)


def _rounded(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """In the dtype of `like`, as torch's LayerNorm gives it, which takes float32 parameters of its own in a model of
    lower precision; autocast chooses by itself."""
    device = like.device.type  # on which there may be no autocast, as on "meta"
    if x.dtype == like.dtype or (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return x
    return x.to(like.dtype)


def _mixed(x: torch.Tensor, mix: torch.Tensor | None) -> torch.Tensor:
    """[B, heads, L, .], of whose heads each column of mix makes a new one."""
    return x if mix is None else torch.einsum("bhlc,hg->bglc", x, mix)


def _heads_of(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    return weight.unflatten(0, (num_heads, -1))  # [heads, d, C]


def _times_each_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, heads, L, .] times [heads, ., .]: for each head one product of all images; x @ weight has one of each."""
    if dispatch.transform() is not None:  # where B = heads, ONNX's optimizer takes images for heads in what is below
        return x @ weight
    by_head = x.transpose(0, 1)
    return bmm(by_head.flatten(1, 2), weight).unflatten(1, by_head.shape[1:3]).transpose(0, 1)


def _attend(
    query: torch.Tensor,
    tokens: torch.Tensor,
    extra_token: torch.Tensor | None,
    norm: nn.LayerNorm | None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    options = dict(lengths=lengths, **(dict(normalize=False) if norm is None else dict(normalize=True, eps=norm.eps)))
    if dispatch.transform() is None and not is_nested(tokens) and tokens.stride(-1) != 1:
        tokens = tokens.contiguous()
    return single_query_attention(query, tokens, extra_token, **options)


class SingleQueryAttention(OwnLayer, nn.Module):
    """Multi-head attention of one token, or a few, over a sequence: class attention and attention pooling.

    With n the LayerNorm where there is one, and d = dim / num_heads channels a head,

        out = proj(softmax(q(n(query)) k(n(x))^T / sqrt(d)) v(n(x))),   x = cat(extra_token, tokens)

    which is the class attention of CaiT (arXiv:2103.17239, Eq. 5 to 7) with the class token as query and extra token,
    and the pooling by multi-head attention of the Set Transformer (arXiv:1810.00825, Eq. 11) with learned queries,
    which are not normalised. Keys and values are never written, nor, where a kernel runs, are n(x) and x: one pass
    reads the tokens. It pays while heads times queries stay well below dim. A call with a mask, with dropout in
    training or for the weights forms these, [B, heads, L, N], in plain PyTorch, and still neither keys nor values; on a
    CPU a mask that leaves out the last tokens of each image, and does nothing else, is taken for their number.

    Args:
        dim: channels of the tokens and of the output.
        num_heads: heads, among which the channels are divided.
        num_latents: how many learned queries there are; 0 where the queries come with each call.
        qkv_bias: whether q, k and v have a bias.
        dropout: rate at which attention weights are dropped in training, as in nn.MultiheadAttention and with the
            same random numbers.
        norm_layer: makes the LayerNorm of all tokens, called as nn.LayerNorm is; None for tokens that need none.

    Raises:
        ValueError: a size below 1 or a num_latents below 0, num_heads does not divide dim, or dropout is not in [0, 1).
        TypeError: norm_layer makes something other than a LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        num_latents: int = 0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        norm_layer: type[nn.LayerNorm] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(dim=dim, num_heads=num_heads)
        check_sizes(least=0, num_latents=num_latents)
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of dim = {dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}, expected a rate in [0, 1)")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.dropout = dropout
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
        return (
            why_not_linear(key, "k", dim, dim)
            or why_not_linear(parts.get("v"), "v", dim, dim)
            or why_not_parameters(parts.get("q"), "q")
            or why_not_parameters(module, "it")
            or why_not_scale(module)
            or (None if norm is None else why_not_norm(norm, "norm"))
        )

    def plain_forward(
        self,
        tokens: torch.Tensor,
        query: torch.Tensor | None = None,
        extra_token: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        lengths: torch.Tensor | None = None,
    ):
        if lengths is not None:
            absent = beyond(lengths, tokens)
            tokens, mask = tokens.masked_fill(absent.unsqueeze(2), 0.0), left_out(absent, mask)
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
        mask = None if mask is None else mask[:, None, None]
        weights = attention_weights(scores, mask, self.dropout if self.training else 0.0)
        out = self.proj((weights @ v).transpose(1, 2).flatten(2))
        if torch.jit.is_scripting():
            assert not need_weights, "in TorchScript the result is of one type"
            return out
        return self._result(out, weights, average_attn_weights) if need_weights else out

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, dim] -> [B, heads, N, d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(
        self,
        tokens: torch.Tensor,
        query: torch.Tensor | None = None,
        extra_token: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        need_weights: bool = False,
        average_attn_weights: bool = True,
        lengths: torch.Tensor | None = None,
    ):
        """
        Args:
            tokens: [B, N, dim], N >= 1, any strides; read in place where the innermost dimension is contiguous. Or
                bags in a jagged nested tensor, as of `single_query_attention`, padded where no kernel runs.
            query: [B, L, dim], the tokens that attend, or [1, L, dim] for all images; None for the learned ones.
            extra_token: [B, dim], one more token that is attended to, such as a class token kept apart; or None.
            mask: [B, N], as the key_padding_mask of nn.MultiheadAttention: boolean, in which True leaves a token out,
                or floating point, added to the scores. The extra token is always attended to. Where no token is left,
                all weights are zero. By keyword, as what follows, though TorchScript knows no way to ask for that.
                Tokens that are left out as by lengths need not be numbers: where the kernel runs, they are not read.
            need_weights: whether the attention weights are returned, too; not in TorchScript.
            average_attn_weights: whether they are the mean over the heads, [B, L, N], or [B, heads, L, N].
            lengths: [B], int32 or int64, how many tokens of each image there are, as of `single_query_attention`: a
                batch of bags of different sizes. Those beyond are left out as by a mask, and not read where the kernel
                runs.

        Returns:
            [B, L, dim]; with need_weights a tuple of that and the weights, after dropout. With an extra token they are
            1 + N, of which its is the first.

        Raises:
            ValueError: no query where none is learned, or one where they are; a mask or lengths of another shape or
                on another device; or what single_query_attention raises.
            TypeError: a mask that is neither boolean nor floating point, lengths that are no integers.
        """
        if torch.jit.is_scripting():
            return self.plain_forward(tokens, query, extra_token, mask, need_weights, average_attn_weights, lengths)
        fuses = self.fuses(None if is_nested(tokens) else tokens, query, extra_token, mask, lengths)
        if is_nested(tokens) and not (fuses and self._by_kernel(mask, need_weights)):
            tokens, lengths = padded(*packed(tokens, lengths))
        self._check(tokens, query, mask, lengths)
        if not fuses:
            return self.plain_forward(tokens, query, extra_token, mask, need_weights, average_attn_weights, lengths)
        return self._fused(tokens, query, extra_token, mask, need_weights, average_attn_weights, lengths)

    def _fused(
        self,
        tokens: torch.Tensor,
        query: torch.Tensor | None,
        extra_token: torch.Tensor | None,
        mask: torch.Tensor | None,
        need_weights: bool,
        average_attn_weights: bool,
        lengths: torch.Tensor | None,
    ):
        dropout = self.dropout if self.training else 0.0
        kept = as_lengths(mask) if mask is not None and self._by_kernel(None, need_weights) else None
        if kept is not None:
            mask, lengths = None, kept if lengths is None else kept.minimum(lengths)
        by_kernel = self._by_kernel(mask, need_weights)
        if lengths is not None and not by_kernel:
            absent = beyond(lengths, tokens)
            tokens, mask = tokens.masked_fill(absent.unsqueeze(2), 0.0), left_out(absent, mask)
        if query is None:
            query = self.latent
        elif self.norm is not None:
            query = self.norm(query)
        operands = (self.q(query), tokens, extra_token, self.norm, self.k, self.v)
        heads = {"num_heads": self.num_heads, "scale": self.scale}
        if by_kernel:
            return self.proj(absorbed_attention(*operands, **heads, lengths=lengths))
        mask = None if mask is None else mask[:, None, None]
        out, weights = attention_with_weights(*operands, **heads, mask=mask, dropout=dropout)
        out = self.proj(out)
        return self._result(out, weights, average_attn_weights) if need_weights else out

    def _by_kernel(self, mask: torch.Tensor | None, need_weights: bool) -> bool:
        return mask is None and not need_weights and not (self.training and self.dropout > 0)

    def _check(
        self,
        tokens: torch.Tensor,
        query: torch.Tensor | None,
        mask: torch.Tensor | None,
        lengths: torch.Tensor | None,
    ) -> None:
        if (query is None) == (self.latent is None):
            expected = "a tensor [B, L, dim]" if self.latent is None else "None, because the queries are learned"
            raise ValueError(f"query: got {'None' if query is None else 'a tensor'}, expected {expected}")
        if query is not None and not symbolic(query):
            check_rank("query", query, "[B, L, dim]")
        if mask is not None and not symbolic(mask, tokens):
            if mask.dtype != torch.bool:
                check_floating("mask", mask)
            check_shape("mask", mask, list(tokens.shape[:2]), "of the tokens")
            check_device("mask", mask, "tokens", tokens)
        if lengths is not None and not is_nested(tokens) and not symbolic(lengths, tokens):
            check_lengths(lengths, tokens)

    @torch.jit.unused
    def _result(self, out: torch.Tensor, weights: torch.Tensor, average: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return out, weights.mean(dim=1) if average else weights


def attend_together(layers: Sequence[SingleQueryAttention], tokens: torch.Tensor) -> list[torch.Tensor]:
    """layer(tokens) for each of some layers with learned queries, which go to the kernel together.

    They are as `ProbeGrid.why_not` asks.
    """
    queries = [_absorbed(each.q(each.latent) * each.scale, each.norm, each.k, each.num_heads) for each in layers]
    stacked = torch.cat(queries, dim=1).expand(tokens.shape[0], -1, -1)
    contexts = _attend(stacked, tokens, None, layers[0].norm).split([query.shape[1] for query in queries], dim=1)
    return [
        each.proj(_heads_side_by_side(context, each.norm, each.v, each.num_heads))
        for each, context in zip(layers, contexts, strict=True)
    ]
