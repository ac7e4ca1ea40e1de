"""VOLO's class attention (arXiv:2106.13112) around single_query_attention.

Subclasses of timm's modules that change the forward pass alone: same parameters, same state_dict, same results up to
rounding.
"""

import torch
from timm.models import volo
from torch import nn

from tokenfusion.layers.drop_in import (
    DropIn,
    why_not_dropout,
    why_not_linear,
    why_not_norm,
    why_not_parameters,
    why_not_part,
    within,
)
from tokenfusion.layers.single_query_attention import (
    absorbed_attention,
    split_class_token,
    split_linear,
    why_not_scale,
)


def class_attention(attn: volo.ClassAttention, query_token: torch.Tensor, tokens, extra_token, norm) -> torch.Tensor:
    """attn's output for query_token [B, 1, C], which is normalised; the rest as in absorbed_attention."""
    key, value = split_linear(attn.kv, 2)
    out = absorbed_attention(
        attn.q(query_token),
        tokens,
        extra_token,
        norm,
        key,
        value,
        num_heads=attn.num_heads,
        scale=attn.scale,
    )
    return attn.proj_drop(attn.proj(out))


class ClassAttention(DropIn, volo.ClassAttention):
    """The first token attends to all.

    Takes and holds what timm's ClassAttention does. Keys and values are never written. With attention dropout in
    training, or a part that was changed, timm's forward runs.
    """

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        parts, kv = module._modules, module._modules.get("kv")
        channels = kv.in_features if type(kv) is nn.Linear else 0
        return (
            why_not_linear(kv, "kv", 2 * module.num_heads * module.head_dim, channels)
            or why_not_parameters(parts.get("q"), "q")
            or why_not_dropout(parts.get("attn_drop"), "attn_drop", module.training)
            or why_not_scale(module)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: [B, 1 + N, C], normalised.

        Returns:
            [B, 1, C].
        """
        if torch.jit.is_scripting():
            return self.plain_forward(x)
        if not self.fuses(x, kept=True) or x.shape[1] == 1:
            return super().forward(x)
        class_token, patches = split_class_token(x)
        return class_attention(self, class_token, patches, class_token.squeeze(1), norm=None)


class ClassBlock(DropIn, volo.ClassBlock):
    """Class attention and a feed-forward network on the class token alone; the other tokens pass by.

    Takes and holds what timm's ClassBlock does. Keys and values are never written; nor, where a kernel runs and not
    the reference, are the normalised tokens. With attention dropout in training, or a part that was changed, timm's
    forward runs.
    """

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        attn = module._modules.get("attn")
        return (
            why_not_part(attn, "attn", volo.ClassAttention, ClassAttention)
            or why_not_norm(module._modules.get("norm1"), "norm1")
            or within("attn", ClassAttention.why_not_fused(attn))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: [B, 1 + N, C].

        Returns:
            the same shape, with a new first token.
        """
        if torch.jit.is_scripting():
            return self.plain_forward(x)
        if not self.fuses(x, kept=True) or x.shape[1] == 1:
            return super().forward(x)
        class_token, patches = split_class_token(x)
        attended = class_attention(self.attn, self.norm1(class_token), patches, class_token.squeeze(1), self.norm1)
        class_token = class_token + self.drop_path1(attended)
        class_token = class_token + self.drop_path2(self.mlp(self.norm2(class_token)))
        return torch.cat((class_token, patches), dim=1)
