"""Functions that original forwards call and fused ones read past: torch's own, or put in their place by somebody."""

import types

import torch
import torch.nn.functional as F

_OWNERS = {"F": F, "torch": torch, "torch.Tensor": torch.Tensor}
_BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


def _in_force() -> tuple:
    """One by one: a loop over names takes six times as long, at every call."""
    return (
        F.linear,
        F.layer_norm,
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        F.softmax,
        F.dropout,
        F.conv_transpose2d,
        F.conv2d,
        F.gelu,
        F.relu,
        F.silu,
        torch.softmax,
        torch.matmul,
        torch.bmm,
        torch.baddbmm,
        torch.layer_norm,
        torch.cat,
        torch.Tensor.softmax,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
    )


def _is_torchs(function) -> bool:
    code = getattr(function, "__code__", None)
    return isinstance(function, _BUILT_IN) if code is None else code.co_filename == F.__file__


_TORCHS = tuple(function if _is_torchs(function) else None for function in _in_force())


def why_not_functions() -> str | None:
    """Why parts that call them may not be read past."""
    now = _in_force()
    if now == _TORCHS:
        return None
    return "a function of torch's was replaced" if torch.compiler.is_compiling() else _why_not(now)


def _why_not(now: tuple) -> str:
    own, function = next(pair for pair in zip(_TORCHS, now) if pair[0] is not pair[1])
    name = getattr(own or function, "__name__", "")
    where = next((each for each, owner in _OWNERS.items() if getattr(owner, name, None) is function), "F")
    return f"{where}.{name} was replaced"
