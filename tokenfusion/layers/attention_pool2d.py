"""CLIP's attention pooling of a feature map (arXiv:2103.00020, Section 2.4) around single_query_attention.

A subclass of timm's module that changes the forward pass alone: same parameters, same state_dict, same results up to
rounding.
"""

import torch
from timm.layers import attention_pool2d, resample_abs_pos_embed
from timm.models import register_notrace_module
from torch import nn

from tokenfusion.layers.drop_in import DropIn, dropout, why_not_linear, why_not_parameters, why_not_part
from tokenfusion.layers.single_query_attention import (
    absorbed_attention,
    scale_of,
    split_class_token,
    split_linear,
    why_not_scale,
)


@register_notrace_module
class AttentionPool2d(DropIn, attention_pool2d.AttentionPool2d):
    """The mean of a feature map, or a class token, attends to itself and to every position.

    Takes and holds what timm's AttentionPool2d does. Queries and outputs of the positions, which pooling drops, are
    never computed, keys and values never written. Where all of them are asked for (pool_type ""), with dropout in
    training, and with a part that was changed, timm's forward runs.
    """

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Every part but the class token is given fewer tokens than before."""
        if module.pool_type != "token":
            return f"pool_type is {module.pool_type!r}: every position is a query"
        parts, drop = module._modules, module._modules.get("drop")
        if type(drop) is nn.Dropout and drop.training and drop.p > 0:
            return f"drop: {dropout(drop)} in training draws its random numbers for every position"
        rows, columns = module.num_heads * module.head_dim, module.in_features
        projections = ("q", "k", "v") if parts.get("qkv") is None else ("qkv",)
        for name in projections:
            reason = why_not_linear(parts.get(name), name, 3 * rows // len(projections), columns)
            if reason is not None:
                return reason
        return (
            why_not_part(drop, "drop", nn.Dropout, nn.Identity)
            or why_not_part(parts.get("proj"), "proj", nn.Linear, nn.Identity)
            or why_not_parameters(module, "it")
            or why_not_scale(module)
        )

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """
        Args:
            x: [B, C, H, W], of any memory format; channels_last is read in place.
            pre_logits: leave the output projection out.

        Returns:
            [B, out_features], or [B, embed_dim] with pre_logits.
        """
        if torch.jit.is_scripting():
            return self.plain_forward(x, pre_logits)
        if not self.fuses(x) or x.shape[1] != self.in_features:
            return super().forward(x, pre_logits)
        positions = resample_abs_pos_embed(
            self.pos_embed.unsqueeze(0), x.shape[-2:], old_size=self.feat_size, num_prefix_tokens=1
        )
        first_position, positions = split_class_token(positions)
        tokens = x.flatten(2).transpose(1, 2)
        first = (tokens.mean(1, keepdim=True) if self.cls_token is None else self.cls_token) + first_position
        query, key, value = (self.q, self.k, self.v) if self.qkv is None else split_linear(self.qkv, 3)
        out = absorbed_attention(
            query(first),
            _sum(tokens, positions),
            first.squeeze(1).expand(x.shape[0], -1),
            None,
            key,
            value,
            num_heads=self.num_heads,
            scale=scale_of(self, self.head_dim),
        )
        return (out if pre_logits else self.proj(out)).squeeze(1)


def _sum(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """tokens + positions with a contiguous innermost dimension."""
    if tokens.is_contiguous() or tokens.dtype != positions.dtype:
        return tokens.contiguous() + positions
    return tokens.contiguous().add_(positions)  # another fresh tensor would cost more than the sum
