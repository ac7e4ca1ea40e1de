"""Where a model looks: attention of one query, such as a class token, and the mixing matrices of a DynaMixer."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
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
            self._keep_first(*args, **(kwargs or {}))
        elif function in (torch.softmax, F.softmax, torch.Tensor.softmax) and result.dim() == 4:
            self._keep(result[..., :1, :], result.shape[-2])
        return result

    def _keep_first(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> None:
        if is_causal:  # the first query sees itself alone
            return
        scores = query[..., :1, :] @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            mask = attn_mask[..., :1, :]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        self._keep(scores.softmax(dim=-1), query.shape[-2])

    def _keep(self, weights: torch.Tensor, queries: int) -> None:
        kept = self.alone if queries == 1 else self.first
        kept[weights.shape[-1]] = weights.squeeze(-2)


@torch.no_grad()
def attention(model: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """[B, h, w] for each grid of patches that a class token or a learned query looks at; the mean over its heads.
    Grids whose sides are not known are left out.

    The model is unfused: the operators never form these weights.
    """
    tokenfusion.unfuse(model)
    with _Attention() as seen:
        model(pixels)
    of_class_token = seen.first if getattr(model, "global_pool", None) == "token" else {}
    found = []
    for weights in (seen.alone or of_class_token).values():
        tokens, most = weights.shape[-1], max(1, getattr(model, "num_prefix_tokens", 1))
        grids = [grid for grid in _grids(model, pixels, tokens) if 0 <= tokens - math.prod(grid) <= most]
        if grids:
            grid = max(grids, key=math.prod)
            found.append(weights.mean(dim=1)[:, tokens - math.prod(grid) :].unflatten(1, grid))
    return found


def _grids(model: nn.Module, pixels: torch.Tensor, tokens: int) -> Iterator[tuple[int, int]]:
    """Of the model's patches; of square images the largest square of tokens, too."""
    for module in model.modules():
        if isinstance(getattr(module, "grid_size", None), tuple):
            yield module.grid_size
        elif isinstance(getattr(module, "img_size", None), tuple) and hasattr(module, "patch_size"):
            yield tuple(side // patch for side, patch in zip(module.img_size, to_2tuple(module.patch_size)))
    if pixels.shape[-1] == pixels.shape[-2]:
        yield (math.isqrt(tokens),) * 2


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
