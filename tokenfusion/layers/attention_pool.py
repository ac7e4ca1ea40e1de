"""Attention pooling by a learned query, as in SigLIP, around single_query_attention.

A subclass of timm's module that changes the forward pass alone: same parameters, same state_dict, same results up to
rounding.
"""

import torch
from timm.layers import attention_pool
from torch import nn

from tokenfusion.layers.drop_in import DropIn, why_not_linear, why_not_parameters, why_not_part
from tokenfusion.layers.single_query_attention import (
    absorbed_attention,
    scale_of,
    split_linear,
    why_not_scale,
)


class AttentionPoolLatent(DropIn, attention_pool.AttentionPoolLatent):
    """Learned queries attend to all tokens; a feed-forward network and pooling of their outputs follow.

    Takes and holds what timm's AttentionPoolLatent does. Keys and values are never written, and the queries are
    projected once for the whole batch. With a mask, or a part that was changed, timm's forward runs.
    """

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        parts, channels = module._modules, module.num_heads * module.head_dim
        k_norm = parts.get("k_norm")
        if type(k_norm) is not nn.Identity:
            return f"k_norm is {type(k_norm).__name__}: each key is normalised after its projection"
        reason = (
            why_not_linear(parts.get("kv"), "kv", 2 * channels, channels)
            or why_not_part(parts.get("q"), "q", nn.Linear, nn.Identity)
            or why_not_part(parts.get("q_norm"), "q_norm", nn.Identity)
            or why_not_part(k_norm, "k_norm", nn.Identity)
            or why_not_parameters(module, "it")
            or why_not_scale(module)
        )
        latent = module._parameters.get("latent")
        if reason is None and latent is not None and (latent.dim() != 3 or latent.shape[1] != module.latent_len):
            reason = f"latent: it has shape {list(latent.shape)}, expected [1, {module.latent_len}, channels]"
        queries = module.num_heads * module.latent_len
        if reason is None and queries >= channels / 2:  # measured in bfloat16, where matrix products are fastest
            reason = (
                f"latent: {queries} queries (heads x latents) of {channels} channels; projecting the tokens costs less"
            )
        return reason

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: [B, N, C].
            attn_mask: as in timm.

        Returns:
            [B, out_features], or [B, latent_len, out_features] where pool is neither "token" nor "avg".
        """
        if torch.jit.is_scripting():
            return self.plain_forward(x, attn_mask)
        if attn_mask is not None or not self.fuses(x, kept=True) or not self._takes(x.shape[1]):
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
            scale=scale_of(self, self.head_dim),
        )
        x = self.proj_drop(self.proj(x))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x

    def _takes(self, count: int) -> bool:
        """Whether so many tokens are some, and as many as there are positions; others timm refuses or broadcasts."""
        return count > 0 and (self.pos_embed is None or count == len(self.pos_embed))
