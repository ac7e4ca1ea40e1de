"""DynaMixer's block as the paper and the official code have it: plain PyTorch, one operation after the other.

The package's own layers are compared with it, in results and in time, and `fuse` finds it by its structure. It is
written on its own: `plain_forward` of the package's layers serves their ablations, too. Parameter names are the
official ones.
"""

import copy

import torch
from timm.layers import Mlp
from torch import nn


class PlainOp(nn.Module):
    """Eq. 5 to 7: x [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, seq_len: int, num_head: int, reduced_dim: int = 2, **dd):
        super().__init__()
        self.num_head = num_head
        self.compress = nn.Linear(dim, num_head * reduced_dim, **dd)
        self.generate = nn.Linear(seq_len * reduced_dim, seq_len**2, **dd)
        self.out = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lines, tokens, dim = x.shape
        compressed = self.compress(x).view(lines, tokens, self.num_head, -1).transpose(1, 2)  # [B, S, N, d]
        logits = self.generate(compressed.flatten(2)).view(lines, self.num_head, tokens, tokens)
        matrices = logits.softmax(dim=-2)  # over the sources
        segments = x.view(lines, tokens, self.num_head, -1).permute(0, 2, 3, 1)  # [B, S, D / S, N]
        return self.out((segments @ matrices).permute(0, 3, 1, 2).reshape(lines, tokens, dim))


class PlainBlock(nn.Module):
    """Columns, rows and channels mixed and summed with weights of each channel: x [B, H, W, D] -> [B, H, W, D]."""

    def __init__(self, dim: int, resolution: int | tuple[int, int], num_head: int, reduced_dim: int = 2, **dd):
        super().__init__()
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        self.mix_h = PlainOp(dim, height, num_head, reduced_dim, **dd)
        self.mix_w = PlainOp(dim, width, num_head, reduced_dim, **dd)
        self.mlp_c = nn.Linear(dim, dim, bias=False, **dd)
        self.reweight = Mlp(dim, dim // 4, dim * 3, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, dim = x.shape
        columns = x.transpose(1, 2).reshape(batch * width, height, dim)
        h = self.mix_h(columns).view(batch, width, height, dim).transpose(1, 2)
        w = self.mix_w(x.reshape(batch * height, width, dim)).view(batch, height, width, dim)
        c = self.mlp_c(x)
        shares = self.reweight((h + w + c).mean(dim=(1, 2))).view(batch, dim, 3).permute(2, 0, 1).softmax(dim=0)
        h_share, w_share, c_share = shares[:, :, None, None]  # rows of channels, which multiply faster than every third
        return self.proj(h * h_share + w * w_share + c * c_share)


def plain(model: nn.Module) -> nn.Module:
    """A copy of a DynaMixer with plain blocks, of the same state_dict. With them its layers are plain, too.

    Raises:
        ValueError: a model with another generator, or without one of the parts: the official code has none such.
    """
    model = copy.deepcopy(model)
    for stage in model.network:
        if isinstance(stage, nn.Sequential):
            for layer in stage:
                layer.attn = _plain_block(layer.attn)
    return model


def _plain_block(block: nn.Module) -> PlainBlock:
    op, weight = block.mix_h, block.proj.weight
    if block.shared or None in (op, block.mix_w, block.mlp_c, block.reweight) or op.generator != "dynamic":
        raise ValueError("model: got an ablation, expected rows, columns and channels, mixed and reweighted")
    sizes = block.dim, block.resolution, op.num_head, op.reduced_dim
    plain_block = PlainBlock(*sizes, device="meta", dtype=weight.dtype).train(block.training)
    plain_block.load_state_dict(block.state_dict(keep_vars=True), assign=True)
    return plain_block
