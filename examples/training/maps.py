"""Where a model looks: attention of one query, such as a class token, and the mixing matrices of a DynaMixer."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import tokenfusion
from tokenfusion.layers import DynaMixerBlock


class _Attention(TorchFunctionMode):
    """Keeps the weights [B, heads, N] of the last query of each number of tokens that attends alone; and of the first
    token where all attend to all."""

    def __init__(self):
        super().__init__()
        self.alone, self.first = {}, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is F.scaled_dot_product_attention:
            query, key = args[:2]
            scale = (kwargs or {}).get("scale") or query.shape[-1] ** -0.5
            self._keep((query[..., :1, :] @ key.transpose(-2, -1) * scale).softmax(dim=-1), query.shape[-2])
        elif function in (torch.softmax, F.softmax, torch.Tensor.softmax) and result.dim() == 4:
            self._keep(result[..., :1, :], result.shape[-2])
        return result

    def _keep(self, weights: torch.Tensor, queries: int) -> None:
        kept = self.alone if queries == 1 else self.first
        kept[weights.shape[-1]] = weights.squeeze(-2)


@torch.no_grad()
def attention(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """[B, h, w] for each grid of patches that a class token or a learned query looks at; the mean over its heads.

    The model is unfused: the operators never form these weights.
    """
    tokenfusion.unfuse(model)
    with _Attention() as seen:
        model(pixels)
    of_class_token = seen.first if getattr(model, "global_pool", None) == "token" else {}
    found = []
    for weights in (seen.alone or of_class_token).values():
        side = math.isqrt(weights.shape[-1])
        patches = weights.mean(dim=1)[:, weights.shape[-1] - side * side :]
        found.append(patches.unflatten(1, (side, side)))
    return found


@torch.no_grad()
def mixing(model: nn.Module, pixels: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By the name of each DynaMixerBlock the matrices of its columns [B, W, H, H] and rows [B, H, W, W], from source to
    target; the mean over the segments."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, DynaMixerBlock)}
    inputs = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, block in blocks.items()
    ]
    try:
        model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, block in blocks.items():
        x, along_columns, along_rows = inputs[name], block.mix_h, block.mix_h if block.shared else block.mix_w
        if along_columns is not None and along_rows is not None:
            lines = x.transpose(1, 2), x
            found[name] = tuple(
                op.matrices(each).mean(dim=-3).expand(*each.shape[:2], -1, -1)
                for op, each in zip((along_columns, along_rows), lines)
            )
    return found
