"""CLIP's attention pooling of a feature map (arXiv:2103.00020, Section 2.4) around single_query_attention.

A subclass of timm's module that changes the forward pass alone: same parameters, same state_dict, same results up to
rounding.
"""

import torch
from timm.layers import attention_pool2d, resample_abs_pos_embed
from torch import nn

from tokenfusion.layers.single_query_attention import absorbed_attention, split_class_token, split_linear


def drops_positions(pool: attention_pool2d.AttentionPool2d) -> bool:
    """Does pool.drop drop outputs now? Its random numbers are those of all positions, most of which are not computed."""
    return isinstance(pool.drop, nn.Dropout) and pool.drop.training and pool.drop.p > 0


class AttentionPool2d(attention_pool2d.AttentionPool2d):
    """The mean of a feature map, or a class token, attends to itself and to every position.

    Takes and holds what timm's AttentionPool2d does. Queries and outputs of the positions, which pooling drops, are
    never computed, keys and values never written. Where all of them are asked for (pool_type ""), and with dropout in
    training, timm's forward runs.
    """

    def forward(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """
        Args:
            x: [B, C, H, W], of any memory format; channels_last is read in place.
            pre_logits: leave the output projection out.

        Returns:
            [B, out_features], or [B, embed_dim] with pre_logits.
        """
        if self.pool_type != "token" or drops_positions(self):
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
            scale=self.scale,
        )
        return (out if pre_logits else self.proj(out)).squeeze(1)


def _sum(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """tokens + positions with a contiguous innermost dimension."""
    if tokens.is_contiguous() or tokens.dtype != positions.dtype:
        return tokens.contiguous() + positions
    return tokens.contiguous().add_(positions)  # another fresh tensor would cost more than the sum
