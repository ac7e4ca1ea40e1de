"""timm's Mlp and vision transformer Attention in their tied forms."""

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn

from tokenfusion.layers.tied_transformer import TiedAttention, TiedFFN, activation_name
from tokenfusion.surgery.tying.matrices import chosen, relative_error
from tokenfusion.surgery.tying.rule import TyingRule

_SCALE_FREE = ("relu", "identity")  # act(s u) = s act(u) for s > 0


def _factory(parameter: torch.Tensor) -> dict:
    return {"device": parameter.device, "dtype": parameter.dtype}


def _why_not_linear(module: nn.Module, *names: str) -> str | None:
    for name in names:
        if type(getattr(module, name)) is not nn.Linear:
            return f"{name} is {type(getattr(module, name)).__name__}, expected nn.Linear"
    return None


def _why_not_mlp(mlp: Mlp) -> str | None:
    reason = _why_not_linear(mlp, "fc1", "fc2")
    if reason is not None:
        return reason
    if mlp.fc2.out_features != mlp.fc1.in_features:
        return f"fc2 leads to {mlp.fc2.out_features} channels, expected {mlp.fc1.in_features}, those that fc1 takes"
    if activation_name(mlp.act) is None:
        return f"act is {type(mlp.act).__name__}, which tied_ffn does not have"
    if not isinstance(mlp.norm, nn.Identity):
        return f"norm is {type(mlp.norm).__name__}, expected none inside the hidden layer"
    if (mlp.fc1.bias is None) != (mlp.fc2.bias is None):
        return "one of fc1 and fc2 has a bias and the other has none"
    if mlp.drop1.p != mlp.drop2.p:
        return f"dropout rates differ: {mlp.drop1.p:g} and {mlp.drop2.p:g}"
    return None


def _tie_mlp(mlp: Mlp, init: str):
    first, second = mlp.fc1.weight, mlp.fc2.weight.t()
    tied = TiedFFN(
        first.shape[1],
        first.shape[0],
        act_layer=lambda: mlp.act,
        bias=mlp.fc1.bias is not None,
        drop=mlp.drop1.p,
        **_factory(first),
    )
    tied.bias_in, tied.bias_out = mlp.fc1.bias, mlp.fc2.bias
    if init == "mean" and tied.activation in _SCALE_FREE:
        norms = first.norm(dim=1, keepdim=True), second.norm(dim=1, keepdim=True)
        scale = torch.where((norms[0] > 0) & (norms[1] > 0), (norms[1] / norms[0]).sqrt(), 1.0)
        first, second = first * scale, second / scale
        if tied.bias_in is not None:
            tied.bias_in.mul_(scale[:, 0])
    tied.weight.copy_(chosen([first, second], init, tied.weight))
    tied.weight.requires_grad_(mlp.fc1.weight.requires_grad)
    return tied, [("fc1", relative_error(tied.weight, first)), ("fc2", relative_error(tied.weight, second))]


def _why_not_attention(attn: Attention) -> str | None:
    reason = _why_not_linear(attn, "qkv", "proj")
    if reason is not None:
        return reason
    dim = attn.qkv.in_features
    if attn.qkv.out_features != 3 * dim or attn.proj.weight.shape != (dim, dim):
        return f"qkv {list(attn.qkv.weight.shape)} and proj {list(attn.proj.weight.shape)} are not square"
    for name in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(attn, name), nn.Identity):
            return f"{name} is {type(getattr(attn, name)).__name__}, which the tied form does not have"
    if attn.gate is not None:
        return "it has a gate, which the tied form does not have"
    return None


def _tie_attention(attn: Attention, init: str):
    q, k, v = attn.qkv.weight.chunk(3)
    out = attn.proj.weight
    tied = TiedAttention(
        len(q),
        attn.num_heads,
        qkv_bias=attn.qkv.bias is not None,
        proj_bias=attn.proj.bias is not None,
        attn_drop=attn.attn_drop.p,
        proj_drop=attn.proj_drop.p,
        **_factory(q),
    )
    scale = 1.0
    if init == "mean":  # only q . k counts, so that q may be larger and k smaller
        ratio = float(out.norm() * k.norm() / (q.norm() * v.norm()))
        scale = ratio**0.5 if 0 < ratio < float("inf") else 1.0
    q, k = q * scale, k / scale
    if attn.qkv.bias is not None:
        bias_q, bias_k, bias_v = attn.qkv.bias.chunk(3)
        for bias, value in ((tied.bias_q, bias_q * scale), (tied.bias_k, bias_k / scale), (tied.bias_v, bias_v)):
            bias.copy_(value)
            bias.requires_grad_(attn.qkv.bias.requires_grad)
    tied.bias_out = attn.proj.bias
    tied.weight_q.copy_(chosen([q, out.t()], init, tied.weight_q))
    tied.weight_kv.copy_(chosen([k, v.t()], init, tied.weight_kv))
    for weight in (tied.weight_q, tied.weight_kv):
        weight.requires_grad_(attn.qkv.weight.requires_grad)
    pairs = {
        "q": (tied.weight_q, q),
        "k": (tied.weight_kv, k),
        "v": (tied.weight_kv.t(), v),
        "proj": (tied.weight_q.t(), out),
    }
    return tied, [(name, relative_error(*pair)) for name, pair in pairs.items()]


def _mlp_matrices(mlp: Mlp) -> list[nn.Parameter]:
    return [mlp.fc1.weight, mlp.fc2.weight]


def _attention_matrices(attn: Attention) -> list[nn.Parameter]:
    return [attn.qkv.weight, attn.proj.weight]


RULES = (
    TyingRule("Mlp", lambda module: type(module) is Mlp, _why_not_mlp, _mlp_matrices, _tie_mlp),
    TyingRule(
        "Attention", lambda module: type(module) is Attention, _why_not_attention, _attention_matrices, _tie_attention
    ),
)
