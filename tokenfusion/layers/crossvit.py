"""CrossViT's cross-attention and multi-scale blocks (arXiv:2103.14899) around single_query_attention.

Subclasses of timm's blocks that change the forward pass alone: same parameters, same state_dict, same results up to
rounding.
"""

from collections.abc import Sequence

import torch
from timm.models import crossvit
from torch import nn

from tokenfusion.layers.block_inference import run_blocks
from tokenfusion.layers.drop_in import (
    DropIn,
    remember_forwards,
    why_not_dropout,
    why_not_linear,
    why_not_norm,
    why_not_parameters,
    why_not_part,
    within,
)
from tokenfusion.layers.single_query_attention import absorbed_attention, split_class_token, why_not_scale

remember_forwards(crossvit.CrossAttention)


class CrossAttentionBlock(DropIn, crossvit.CrossAttentionBlock):
    """y = x_0 + drop_path(CA(norm(x))), Eq. 6 and 7 of CrossViT: the first token attends to all tokens.

    Takes and holds what timm's CrossAttentionBlock does. Keys and values are never written; nor, where a kernel runs
    and not the reference, are the normalised tokens and the concatenation of class token and patches. With attention
    dropout in training, where the attention weights of a token do not sum to one, and with a part that was changed,
    timm's forward runs.
    """

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        modules = module._modules
        attn, norm = modules.get("attn"), modules.get("norm1")
        reason = why_not_part(attn, "attn", crossvit.CrossAttention) or why_not_norm(norm, "norm1")
        if reason is not None:
            return reason
        parts, channels = attn._modules, norm.normalized_shape[0]
        return within(
            "attn",
            why_not_linear(parts.get("wk"), "wk", channels, channels)
            or why_not_linear(parts.get("wv"), "wv", channels, channels)
            or why_not_parameters(parts.get("wq"), "wq")
            or why_not_dropout(parts.get("attn_drop"), "attn_drop", attn.training)
            or why_not_scale(attn),
        )

    def forward(self, x: torch.Tensor, patches: torch.Tensor | None = None) -> torch.Tensor:
        """The first token after attending to all of them.

        Args:
            x: [B, 1 + N, C], or the class token alone, [B, 1, C], when patches are given.
            patches: [B, N, C], the other tokens; or None.

        Returns:
            [B, 1, C].
        """
        if torch.jit.is_scripting():
            return self.plain_forward(x if patches is None else torch.cat((x, patches), dim=1))
        if not self.fuses(x, patches, kept=True):
            return super().forward(x if patches is None else torch.cat((x, patches), dim=1))
        if patches is None and x.shape[1] > 1:
            x, patches = split_class_token(x)
        elif patches is not None and patches.shape[1] == 0:
            patches = None
        attn = self.attn
        out = absorbed_attention(
            attn.wq(self.norm1(x)),
            x if patches is None else patches,
            None if patches is None else x.squeeze(1),
            self.norm1,
            attn.wk,
            attn.wv,
            num_heads=attn.num_heads,
            scale=attn.scale,
        )
        return x + self.drop_path(attn.proj_drop(attn.proj(out)))


def exchange_class_tokens(
    class_tokens: Sequence[torch.Tensor],
    patches: Sequence[torch.Tensor],
    projs: nn.ModuleList,
    fusion: nn.ModuleList,
    revert_projs: nn.ModuleList,
) -> list[torch.Tensor]:
    """Eq. 5 to 7 of CrossViT: each class token, projected to the width of the next branch, attends to its patches.

    The parts are called in the order in which timm calls them, for whoever draws random numbers or counts.

    Args:
        class_tokens, patches: of each branch, [B, 1, C_i] and [B, N_i, C_i].
        projs, revert_projs: to the width of the next branch, and back.
        fusion: for each branch one cross-attention block, or an nn.Sequential of them: the first sees the patches, each
            further one only the token that comes out.

    Returns:
        the new class tokens, [B, 1, C_i].
    """
    projected = [proj(class_tokens[i]) for i, proj in enumerate(projs)]
    outs = []
    for i, (token, blocks, revert_proj) in enumerate(zip(projected, fusion, revert_projs)):
        first, *rest = blocks if isinstance(blocks, nn.Sequential) else (blocks,)
        others = patches[(i + 1) % len(patches)]
        if why_not_part(first, "", CrossAttentionBlock) is None:
            token = first(token, others)
        else:
            token = first(torch.cat((token, others), dim=1))
        for block in rest:
            token = block(token)
        outs.append(revert_proj(token))
    return outs


class MultiScaleBlock(DropIn, crossvit.MultiScaleBlock):
    """Transformer blocks of two branches, then the exchange of their class tokens, Eq. 5 to 7 of CrossViT.

    Takes and holds what timm's MultiScaleBlock does, with `CrossAttentionBlock`s of this module in `fusion`. In
    inference the transformer blocks work in place on the tensors that they make.
    """

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """The parts are iterated over; of the first blocks of `fusion` the inputs differ, too."""
        fusion = module._modules.get("fusion")
        for name in ("blocks", "projs", "fusion", "revert_projs"):
            reason = why_not_part(module._modules.get(name), name, nn.ModuleList)
            if reason is not None:
                return reason
        for i, blocks in enumerate(fusion):
            name, first = f"fusion.{i}", blocks
            if isinstance(blocks, nn.Sequential):
                reason = why_not_part(blocks, name, nn.Sequential)
                if reason is not None or not len(blocks):
                    return reason or f"{name} is empty"
                name, first = f"{name}.0", blocks[0]
            reason = why_not_part(first, name, crossvit.CrossAttentionBlock, CrossAttentionBlock)
            reason = reason or within(name, CrossAttentionBlock.why_not_fused(first))
            if reason is not None:
                return reason
        return None

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            x: the tokens of each branch, [B, 1 + N_i, C_i].

        Returns:
            the same shapes.
        """
        if torch.jit.is_scripting():
            return self.plain_forward(x)
        if not self.fuses(*x):
            return super().forward(x)
        branches = [run_blocks(blocks, tokens) for blocks, tokens in zip(self.blocks, x)]
        class_tokens, patches = zip(*map(split_class_token, branches))
        class_tokens = exchange_class_tokens(class_tokens, patches, self.projs, self.fusion, self.revert_projs)
        return [torch.cat(pair, dim=1) for pair in zip(class_tokens, patches)]
