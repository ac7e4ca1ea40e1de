"""timm's transformer blocks in inference, without the copies that only a backward pass would need.

On a CPU a fresh tensor of some megabytes costs more in page faults than the sum that fills it.
"""

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import nn


def run_blocks(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """blocks(x), bit for bit; where no gradient is recorded, with residual sums and GELU in place."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _has_hooks(blocks):
        return blocks(x)
    for block in blocks:
        x = _run_block(block, x) if _is_plain(block) else block(x)
    return x


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_plain(block: nn.Module) -> bool:
    """A Block of timm with parts of timm, whose results are new tensors."""
    return (
        type(block) is Block
        and type(block.attn) is Attention
        and type(block.mlp) is Mlp
        and type(block.mlp.fc1) is nn.Linear
        and type(block.mlp.act) is nn.GELU
        and not any(map(_has_hooks, (block, block.mlp, block.mlp.fc1, block.mlp.act)))
    )


def _run_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    x = _add(block.drop_path1(block.ls1(block.attn(block.norm1(x)))), x)
    return _add(block.drop_path2(block.ls2(_run_mlp(block.mlp, block.norm2(x)))), x)


def _run_mlp(mlp: Mlp, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.ops.aten.gelu_(mlp.fc1(x), approximate=mlp.act.approximate)
    return mlp.drop2(mlp.fc2(mlp.norm(mlp.drop1(hidden))))


def _add(new: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return new.add_(x) if new.dtype == x.dtype else new + x  # under autocast the sum has the wider dtype
