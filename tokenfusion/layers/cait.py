"""CaiT's class attention (arXiv:2103.17239) around single_query_attention.

Subclasses of timm's modules that change the forward pass alone: same parameters, same state_dict, same results up to
rounding. XCiT uses the attention too.
"""

import torch
from timm.models import cait
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
    scale_of,
    split_class_token,
    why_not_scale,
)


def class_attention(attn: cait.ClassAttn, query_token: torch.Tensor, tokens, extra_token, norm) -> torch.Tensor:
    """attn's output for query_token [B, 1, C], which is normalised; the rest as in absorbed_attention."""
    out = absorbed_attention(
        attn.q(query_token.squeeze(1)).unsqueeze(1),
        tokens,
        extra_token,
        norm,
        attn.k,
        attn.v,
        num_heads=attn.num_heads,
        scale=scale_of(attn, query_token.shape[2] // attn.num_heads),
    )
    return attn.proj_drop(attn.proj(out))


class ClassAttn(DropIn, cait.ClassAttn):
    """The first token attends to all, Eq. 5 to 7 of CaiT.

    Takes and holds what timm's ClassAttn does. Keys and values are never written. With attention dropout in training,
    or a part that was changed, timm's forward runs.
    """

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        parts, key = module._modules, module._modules.get("k")
        channels = key.in_features if type(key) is nn.Linear else 0
        return (
            why_not_linear(key, "k", channels, channels)
            or why_not_linear(parts.get("v"), "v", channels, channels)
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


class LayerScaleBlockClassAttn(DropIn, cait.LayerScaleBlockClassAttn):
    """Class attention and a feed-forward network on the class token alone, each with LayerScale, Eq. 4 of CaiT.

    Takes and holds what timm's LayerScaleBlockClassAttn does. Keys and values are never written; nor, where a kernel
    runs and not the reference, are the normalised tokens and the concatenation of class token and patches. With
    attention dropout in training, or a part that was changed, timm's forward runs.
    """

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        attn = module._modules.get("attn")
        return (
            why_not_part(attn, "attn", cait.ClassAttn, ClassAttn)
            or why_not_norm(module._modules.get("norm1"), "norm1")
            or within("attn", ClassAttn.why_not_fused(attn))
        )

    def forward(self, x: torch.Tensor, x_cls: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: [B, N, C], the patches.
            x_cls: [B, 1, C], the class token.

        Returns:
            [B, 1, C], the class token.
        """
        if torch.jit.is_scripting():
            return self.plain_forward(x, x_cls)
        if not self.fuses(x, x_cls, kept=True) or not _are_patches_and_one_class_token(x, x_cls):
            return super().forward(x, x_cls)
        attended = class_attention(self.attn, self.norm1(x_cls), x, x_cls.squeeze(1), self.norm1)
        x_cls = x_cls + self.drop_path(self.gamma_1 * attended)
        return x_cls + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x_cls)))


def _are_patches_and_one_class_token(x: torch.Tensor, x_cls: torch.Tensor) -> bool:
    """Of sizes and of a dtype that go together; others timm refuses, or joins in its own way."""
    if x.dim() != 3 or x_cls.dim() != 3 or x.dtype != x_cls.dtype:
        return False
    return x_cls.shape[1] == 1 and x.shape[1] > 0 and x.shape[::2] == x_cls.shape[::2]
