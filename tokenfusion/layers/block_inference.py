"""timm's transformer blocks in inference, without the copies and passes that only a backward pass would need.

On a CPU a fresh tensor of some megabytes costs more in page faults than the sum that fills it.
"""

import itertools

import torch
from timm.layers import DropPath, LayerNorm, Mlp
from timm.models.vision_transformer import Attention, Block, LayerScale
from torch import nn

from tokenfusion.kernels import dispatch
from tokenfusion.kernels.attention import attention
from tokenfusion.kernels.linear import linear
from tokenfusion.kernels.mlp import mlp
from tokenfusion.layers.drop_in import remember_forwards, why_not_part
from tokenfusion.layers.functions import why_not_functions

_PARTS = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.GELU, nn.ReLU)
_PARTS += (Attention, Block, DropPath, LayerNorm, LayerScale, Mlp)
_READ = {Attention: ("qkv", "proj"), Mlp: ("fc1", "fc2")}  # linear layers that are not called
remember_forwards(*_PARTS)


def run_blocks(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """blocks(x), up to rounding; where no gradient is recorded, with residual sums in place and fused products."""
    if not may_run_in_place(blocks, nn.Sequential):
        return blocks(x)
    for block in blocks:
        x = _run_block(block, x) if _is_plain(block) else block(x)
    return x


def may_run_in_place(container: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the parts of a module of this class may be run one by one, with no gradient recorded."""
    runs = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and dispatch.transform() is None
    return runs and why_not_functions() is None and why_not_part(container, "", kind) is None


def are_plain(*modules: nn.Module) -> bool:
    """Modules of PyTorch and timm with such parts, untouched: their results are new tensors that nobody else sees."""
    return all(map(_is_plain_part, itertools.chain.from_iterable(module.modules() for module in modules)))


def _is_plain_part(part: nn.Module) -> bool:
    read = (part._modules.get(name) for name in _READ.get(type(part), ()))
    return why_not_part(part, "", *_PARTS) is None and all(type(each) is nn.Linear for each in read)


def _is_plain(block: nn.Module) -> bool:
    return type(block) is Block and type(block.attn) is Attention and type(block.mlp) is Mlp and are_plain(block)


def _run_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    x = add(block.drop_path1(block.ls1(_run_attention(block.attn, block.norm1(x)))), x)
    return add(block.drop_path2(block.ls2(run_mlp(block.mlp, block.norm2(x)))), x)


def _run_attention(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    if not (attn.fused_attn and _is_identity(attn.q_norm, attn.k_norm) and getattr(attn, "gate", None) is None):
        return attn(x)
    qkv = _run_linear(attn.qkv, x).unflatten(-1, (3, attn.num_heads, -1))  # [B, N, 3, heads, d]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    dropout = attn.attn_drop.p if attn.training else 0.0
    x = attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)
    return attn.proj_drop(_run_linear(attn.proj, attn.norm(x)))


def run_mlp(part: Mlp, x: torch.Tensor) -> torch.Tensor:
    """part(x) for one whose parts are untouched, where no gradient is recorded: bias and GELU in one pass with the
    product, or both layers in one."""
    exact_gelu = type(part.act) is nn.GELU and part.act.approximate == "none"
    if exact_gelu and _is_identity(part.norm) and _drops_nothing(part.drop1):
        return part.drop2(mlp(x, part.fc1.weight, part.fc1.bias, part.fc2.weight, part.fc2.bias))
    if exact_gelu:
        hidden = _run_linear(part.fc1, x, "gelu")
    else:
        hidden = part.act(_run_linear(part.fc1, x))
    return part.drop2(_run_linear(part.fc2, part.norm(part.drop1(hidden))))


def _run_linear(layer: nn.Linear, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
    return linear(x, layer.weight, layer.bias, activation)


def _drops_nothing(part: nn.Module) -> bool:
    return _is_identity(part) or (type(part) is nn.Dropout and not (part.training and part.p > 0))


def _is_identity(*modules: nn.Module) -> bool:
    return all(type(module) is nn.Identity for module in modules)


def add(new: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """new + x, where no gradient is recorded and nobody else holds new: into its memory."""
    return new.add_(x) if new.dtype == x.dtype else new + x  # under autocast the sum has the wider dtype
