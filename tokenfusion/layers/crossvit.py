"""CrossViT's cross-attention and multi-scale blocks (arXiv:2103.14899) around single_query_attention.

Subclasses of timm's blocks that change the forward pass alone: same parameters, same state_dict, same results up to
rounding.
"""

import torch
from timm.models import crossvit

from tokenfusion.layers.in_place import run_blocks
from tokenfusion.layers.single_query_attention import absorbed_attention, drops_attention, split_class_token


class CrossAttentionBlock(crossvit.CrossAttentionBlock):
    """y = x_0 + drop_path(CA(norm(x))), Eq. 6 and 7 of CrossViT: the first token attends to all tokens.

    Takes and holds what timm's CrossAttentionBlock does. Keys and values are never written; nor, where a kernel runs and
    not the reference, are the normalised tokens and the concatenation of class token and patches. Attention dropout in
    training makes the attention weights of a token not sum to one; timm's forward runs then.
    """

    def forward(self, x: torch.Tensor, patches: torch.Tensor | None = None) -> torch.Tensor:
        """The first token after attending to all of them.

        Args:
            x: [B, 1 + N, C], or the class token alone, [B, 1, C], when patches are given.
            patches: [B, N, C], the other tokens; or None.

        Returns:
            [B, 1, C].
        """
        if drops_attention(self.attn):
            return super().forward(x if patches is None else torch.cat((x, patches), dim=1))
        if patches is None and x.shape[1] > 1:
            x, patches = split_class_token(x)
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


class MultiScaleBlock(crossvit.MultiScaleBlock):
    """Transformer blocks of two branches, then the exchange of their class tokens, Eq. 5 to 7 of CrossViT.

    Takes and holds what timm's MultiScaleBlock does, with `CrossAttentionBlock`s of this module in `fusion`. In
    inference the transformer blocks work in place on the tensors that they make.
    """

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            x: the tokens of each branch, [B, 1 + N_i, C_i].

        Returns:
            the same shapes.
        """
        branches = [run_blocks(blocks, tokens) for blocks, tokens in zip(self.blocks, x)]
        split = [split_class_token(tokens) for tokens in branches]
        outs = []
        for i, (proj, fusion, revert_proj) in enumerate(zip(self.projs, self.fusion, self.revert_projs)):
            cls_token, patches = split[i]
            _, other_patches = split[(i + 1) % self.num_branches]
            first, *rest = fusion if isinstance(fusion, torch.nn.Sequential) else (fusion,)
            exchanged = first(proj(cls_token), other_patches)
            for block in rest:
                exchanged = block(exchanged)
            outs.append(torch.cat((revert_proj(exchanged), patches), dim=1))
        return outs
