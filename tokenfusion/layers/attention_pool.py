"""Attention pooling by a learned query, as in SigLIP, around single_query_attention.

A subclass of timm's module that changes the forward pass alone: same parameters, same state_dict, same results up to
rounding.
"""

import torch
from timm.layers import attention_pool

from tokenfusion.layers.single_query_attention import absorbed_attention, split_linear


class AttentionPoolLatent(attention_pool.AttentionPoolLatent):
    """Learned queries attend to all tokens; a feed-forward network and pooling of their outputs follow.

    Takes and holds what timm's AttentionPoolLatent does. Keys and values are never written, and the queries are
    projected once for the whole batch. With a mask timm's forward runs.
    """

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: [B, N, C].
            attn_mask: as in timm.

        Returns:
            [B, out_features], or [B, latent_len, out_features] where pool is neither "token" nor "avg".
        """
        if attn_mask is not None:
            return super().forward(x, attn_mask)
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        key, value = split_linear(self.kv, 2)
        x = absorbed_attention(
            self.q_norm(self.q(self.latent)),
            x,
            None,
            None,
            key,
            value,
            num_heads=self.num_heads,
            scale=self.scale,
        )
        x = self.proj_drop(self.proj(x))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x
