"""A transformer's layers with a matrix and its transpose in place of two matrices.

Koyun and Töreyin, "Do deep neural networks utilize the weight space efficiently?", 2024, Eq. 1, 2 and 4.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, trunc_normal_
from timm.models import register_notrace_module
from torch import nn

from tokenfusion.kernels import tied_ffn
from tokenfusion.kernels.checks import check_rate, check_sizes
from tokenfusion.kernels.tied_ffn.op import check_recompute
from tokenfusion.kernels.tied_ffn.reference import ACTIVATIONS
from tokenfusion.layers.drop_in import remember_forwards, why_not_part
from tokenfusion.layers.own_layer import OwnLayer

_ACTIVATIONS = {GELUTanh: "gelu_tanh", nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity", nn.GELU: "gelu"}
remember_forwards(*_ACTIVATIONS)


def activation_name(module: nn.Module) -> str | None:
    """What tied_ffn calls an activation module; None where it has no such activation."""
    if type(module) is nn.GELU and module.approximate == "tanh":
        return "gelu_tanh"
    return _ACTIVATIONS.get(type(module))


def _bias(size: int, wanted: bool, **factory) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(size, **factory)) if wanted else None


@register_notrace_module
class TiedFFN(OwnLayer, nn.Module):
    """y = W^T act(W x + b_in) + b_out, Eq. 4 of the paper: the feed-forward network of a transformer with one matrix.

    Takes the arguments of timm's Mlp, so that it can be the `mlp_layer` of a timm model. Holds weight
    [hidden_features, in_features], bias_in and bias_out.

    Args:
        in_features: channels of x and y.
        hidden_features: in_features where None.
        out_features: in_features, or None; anything else is an error, since W^T leads back.
        act_layer: a class of activation modules among GELU, GELU("tanh"), ReLU, SiLU and Identity.
        norm_layer: None; a norm inside the hidden layer is not part of the tied form.
        bias: whether there are bias_in and bias_out.
        drop: dropout after the activation and after the output. In training it needs the hidden layer, so that plain
            PyTorch code runs.
        recompute: as in `tokenfusion.kernels.tied_ffn`.

    Raises:
        ValueError: other out_features than in_features, a norm_layer, an act_layer that tied_ffn does not have, a size
            below 1, a drop outside [0, 1], or another recompute.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        *,
        recompute: bool | str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        hidden_features = hidden_features or in_features
        check_sizes(in_features=in_features, hidden_features=hidden_features)
        check_rate("drop", drop)
        check_recompute(recompute)
        if out_features not in (None, in_features):
            raise ValueError(f"out_features: got {out_features}, expected {in_features}, the in_features, or None")
        if norm_layer is not None:
            raise ValueError(f"norm_layer: got {norm_layer!r}, expected None: there is no norm in the hidden layer")
        act = act_layer()
        activation = activation_name(act)
        if activation is None:
            expected = ", ".join(ACTIVATIONS)
            raise ValueError(f"act_layer: got {type(act).__name__}, expected a module for one of {expected}")
        factory = {"device": device, "dtype": dtype}
        self.act = act
        self.activation = activation
        self.drop = drop
        self.recompute = recompute
        self.weight = nn.Parameter(torch.empty(hidden_features, in_features, **factory))
        self.bias_in = _bias(hidden_features, bias, **factory)
        self.bias_out = _bias(in_features, bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        trunc_normal_(self.weight, std=0.02)
        for bias in (self.bias_in, self.bias_out):
            if bias is not None:
                nn.init.zeros_(bias)

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        reason = why_not_part(module.act, "act", *_ACTIVATIONS)
        if reason is None and activation_name(module.act) != module.activation:
            return f"act is another activation than {module.activation}"
        return reason

    def plain_forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(self.act(F.linear(x, self.weight, self.bias_in)), self.drop, self.training)
        return F.dropout(F.linear(hidden, self.weight.t(), self.bias_out), self.drop, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> [..., C]."""
        if torch.jit.is_scripting():
            return self.plain_forward(x)
        if (self.training and self.drop > 0) or not self.fuses(x):
            return self.plain_forward(x)
        return tied_ffn(
            x, self.weight, self.bias_in, self.bias_out, activation=self.activation, recompute=self.recompute
        )

    def extra_repr(self) -> str:
        hidden, channels = self.weight.shape
        return f"{channels}, {hidden}, activation={self.activation}"


class TiedAttention(nn.Module):
    """Self-attention with two matrices in place of four, Eq. 1 and 2 of the paper.

    Q = W_q x + b_q, K = W_kv x + b_k, V = W_kv^T x + b_v, y = W_q^T attention(Q, K, V) + b_out. Whole matrices are
    transposed: heads of K are blocks of rows of W_kv, heads of V blocks of its columns. Takes the arguments of timm's
    Attention, so that it can be the `attn_layer` of a timm model. Holds weight_q and weight_kv [dim, dim], bias_q,
    bias_k, bias_v and bias_out.

    Args:
        dim: channels, a multiple of num_heads.
        qkv_bias, proj_bias: whether there are bias_q, bias_k and bias_v, and bias_out.
        qk_norm, scale_norm: False.
        attn_drop, proj_drop: dropout of the attention weights and of the output.
        norm_layer: not used.

    Raises:
        ValueError: num_heads does not divide dim; qk_norm or scale_norm; a size below 1, or a rate outside [0, 1].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(dim=dim, num_heads=num_heads)
        check_rate("attn_drop", attn_drop)
        if dim % num_heads:
            raise ValueError(f"dim: got {dim}, expected a multiple of num_heads, {num_heads}")
        for name, value in (("qk_norm", qk_norm), ("scale_norm", scale_norm)):
            if value:
                raise ValueError(f"{name}: got {value}, expected False: it is not part of the tied form")
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        self.weight_q = nn.Parameter(torch.empty(dim, dim, **factory))
        self.weight_kv = nn.Parameter(torch.empty(dim, dim, **factory))
        self.bias_q, self.bias_k, self.bias_v = (_bias(dim, qkv_bias, **factory) for _ in range(3))
        self.bias_out = _bias(dim, proj_bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.weight_q, self.weight_kv):
            trunc_normal_(weight, std=0.02)
        for bias in (self.bias_q, self.bias_k, self.bias_v, self.bias_out):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """[B, N, dim] -> [B, N, dim]; attn_mask and is_causal as in scaled_dot_product_attention."""
        stacked = torch.cat((self.weight_q, self.weight_kv, self.weight_kv.t()))
        bias = None if self.bias_q is None else torch.cat((self.bias_q, self.bias_k, self.bias_v))
        qkv = F.linear(x, stacked, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p=self.attn_drop if self.training else 0.0, is_causal=is_causal
        )
        return self.proj_drop(F.linear(out.transpose(1, 2).flatten(2), self.weight_q.t(), self.bias_out))

    def extra_repr(self) -> str:
        return f"{self.weight_q.shape[0]}, num_heads={self.num_heads}"
