"""CrossViT's multi-scale encoders, one for each way to fuse the tokens of two branches (Fig. 3 of arXiv:2103.14899).

All have one interface: blocks of each branch, then a fusion of their tokens. `FUSIONS` has them by name.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from timm.layers import DropPath
from timm.models import register_notrace_module
from timm.models.vision_transformer import Attention, Block
from torch import nn
from torch.nn import functional as F

from tokenfusion.layers import CrossAttentionBlock
from tokenfusion.layers.block_inference import run_blocks
from tokenfusion.layers.crossvit import exchange_class_tokens

Tokens = list[torch.Tensor]


@register_notrace_module
class MultiScaleEncoder(nn.Module):
    """Transformer blocks of two branches without a fusion (row "None" of Table 6); the base of the encoders with one.

    Args:
        dim, num_heads, mlp_ratio: of each branch.
        grids: (height, width) of the patches of each branch.
        depth: (N, M, L): blocks of the small and of the large branch, and fusions; L = 0 stands for one fusion, see
            `CrossAttention`.
        class_token: whether the first token of a branch is its class token.
        drop_path: rate of block i in both branches; the last one is the fusion's.
    """

    class_token: Final[bool]

    def __init__(
        self,
        dim: Sequence[int],
        grids: Sequence[tuple[int, int]],
        depth: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: Sequence[float],
        *,
        class_token: bool,
        drop_path: Sequence[float],
        norm_layer: Callable[..., nn.Module],
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        **dd,
    ):
        super().__init__()
        self.class_token = class_token
        options = dict(qkv_bias=qkv_bias, proj_drop=proj_drop, attn_drop=attn_drop, norm_layer=norm_layer, **dd)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(Block(dim[i], num_heads[i], mlp_ratio[i], drop_path=drop_path[j], **options) for j in range(depth[i]))
            )
            for i in range(len(dim))
        )
        self.add_fusion(dim, grids, depth[-1], num_heads, drop_path[-1], options)

    def add_fusion(
        self,
        dim: Sequence[int],
        grids: Sequence[tuple[int, int]],
        depth: int,
        num_heads: Sequence[int],
        drop_path: float,
        options: dict,
    ) -> None:
        """Make the modules of the fusion; options are those of a Block."""

    def fuse(self, class_tokens: Tokens, patches: Tokens) -> tuple[Tokens, Tokens]:
        """[B, 1, C_i] and [B, N_i, C_i] of each branch -> the same, fused."""
        return class_tokens, patches

    def forward(self, x: Tokens, class_tokens_only: bool = False) -> list[torch.Tensor]:
        """
        Args:
            x: the tokens of each branch, [B, 1 + N_i, C_i], or [B, N_i, C_i] without class tokens.
            class_tokens_only: give only the first token of each branch, [B, 1, C_i]: the last encoder's patches are
                not needed where a class is predicted.

        Returns:
            the same shapes.
        """
        branches: list[torch.Tensor] = []
        for i, blocks in enumerate(self.blocks):
            if torch.jit.is_scripting():
                branches.append(blocks(x[i]))
            else:
                branches.append(run_blocks(blocks, x[i]))
        if not self.class_token:  # the mean of the patches stands for it, and the fused token goes to every patch
            fused, _ = self.fuse([patches.mean(dim=1, keepdim=True) for patches in branches], branches)
            return [patches + fused[i] for i, patches in enumerate(branches)]
        class_tokens, patches = self.fuse(*_split(branches))
        if class_tokens_only:
            return class_tokens
        return [torch.cat((token, patches[i]), dim=1) for i, token in enumerate(class_tokens)]


def _split(branches: Tokens) -> tuple[Tokens, Tokens]:
    """Class token and patches of each branch."""
    class_tokens: list[torch.Tensor] = []
    patches: list[torch.Tensor] = []
    for tokens in branches:
        first, others = tokens.split((1, tokens.shape[1] - 1), dim=1)
        class_tokens.append(first)
        patches.append(others)
    return class_tokens, patches


def _projection(dim: int, out_dim: int, options: dict, *, identity: bool = True) -> nn.Sequential:
    """f and g of the paper: LayerNorm, GELU, Linear; nothing where the widths are equal (Table 7 B)."""
    if identity and dim == out_dim:
        return nn.Sequential(nn.Identity())
    dd = {name: options[name] for name in ("device", "dtype")}
    return nn.Sequential(options["norm_layer"](dim, **dd), nn.GELU(), nn.Linear(dim, out_dim, **dd))


class CrossAttention(MultiScaleEncoder):
    """Fig. 3 d, Eq. 5 to 7: the class token of a branch attends to the patches of the other.

    L > 1 repeats the attention. Each further one sees the token that came out of the one before and no patches, as in
    the official code: a softmax over one key, a linear map of the token. L = 0 and 1 differ in parameter names alone.
    """

    def add_fusion(self, dim, grids, depth, num_heads, drop_path, options) -> None:
        others = [(i + 1) % len(dim) for i in range(len(dim))]

        def block(i: int) -> CrossAttentionBlock:
            return CrossAttentionBlock(dim[i], num_heads[i], drop_path=drop_path, **options)

        self.projs = nn.ModuleList(_projection(dim[i], dim[o], options) for i, o in enumerate(others))
        self.fusion = nn.ModuleList(
            nn.Sequential(*(block(o) for _ in range(depth))) if depth else block(o) for o in others
        )
        self.revert_projs = nn.ModuleList(_projection(dim[o], dim[i], options) for i, o in enumerate(others))

    def fuse(self, class_tokens: Tokens, patches: Tokens) -> tuple[Tokens, Tokens]:
        if torch.jit.is_scripting():
            return self.plain_exchange(class_tokens, patches), patches
        return exchange_class_tokens(class_tokens, patches, self.projs, self.fusion, self.revert_projs), patches

    def plain_exchange(self, class_tokens: Tokens, patches: Tokens) -> Tokens:
        outs: list[torch.Tensor] = []
        for i, (proj, fusion, revert_proj) in enumerate(zip(self.projs, self.fusion, self.revert_projs)):
            others = patches[(i + 1) % len(patches)]
            outs.append(revert_proj(fusion(torch.cat((proj(class_tokens[i]), others), dim=1))))
        return outs


class AllAttention(MultiScaleEncoder):
    """Fig. 3 a, Eq. 2 as printed: self-attention over all tokens of both branches, in the wider one's width.

    y = [f(x_l) || f(x_s)], o = y + MSA(LN(y)), z_i = g(o_i). Both branches are projected, also the one that has the
    width already; no FFN.
    """

    def add_fusion(self, dim, grids, depth, num_heads, drop_path, options) -> None:
        widest = max(range(len(dim)), key=lambda i: dim[i])
        width = dim[widest]
        self.projs = nn.ModuleList(_projection(d, width, options, identity=False) for d in dim)
        norm_layer = options["norm_layer"]
        self.norm = norm_layer(width, device=options["device"], dtype=options["dtype"])
        self.attn = Attention(width, num_heads=num_heads[widest], **options)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.revert_projs = nn.ModuleList(_projection(width, d, options, identity=False) for d in dim)

    def fuse(self, class_tokens: Tokens, patches: Tokens) -> tuple[Tokens, Tokens]:
        branches = [torch.cat((token, patches[i]), dim=1) for i, token in enumerate(class_tokens)]
        y = torch.cat([proj(branches[i]) for i, proj in enumerate(self.projs)], dim=1)
        y = y + self.drop_path(self.attn(self.norm(y)))
        outs = y.split([tokens.shape[1] for tokens in branches], dim=1)
        return _split([revert_proj(outs[i]) for i, revert_proj in enumerate(self.revert_projs)])


class ClassToken(MultiScaleEncoder):
    """Fig. 3 b, Eq. 3: the class tokens of both branches, in the wider one's width, are summed."""

    def add_fusion(self, dim, grids, depth, num_heads, drop_path, options) -> None:
        self.projs = nn.ModuleList(_projection(d, max(dim), options) for d in dim)
        self.revert_projs = nn.ModuleList(_projection(max(dim), d, options) for d in dim)

    def fuse(self, class_tokens: Tokens, patches: Tokens) -> tuple[Tokens, Tokens]:
        return self.fuse_class_tokens(class_tokens), patches

    def fuse_class_tokens(self, class_tokens: Tokens) -> Tokens:
        projected = [proj(class_tokens[i]) for i, proj in enumerate(self.projs)]
        total = projected[0] + projected[1]
        return [revert_proj(total) for revert_proj in self.revert_projs]


class Pairwise(ClassToken):
    """Fig. 3 c, Eq. 4: patches at one place of the image are summed, class tokens as in `ClassToken`, by the same maps.

    A branch's patches are projected on their own grid and brought to the other's by bilinear interpolation.
    """

    def add_fusion(self, dim, grids, depth, num_heads, drop_path, options) -> None:
        super().add_fusion(dim, grids, depth, num_heads, drop_path, options)
        self.grids = list(grids)

    def fuse(self, class_tokens: Tokens, patches: Tokens) -> tuple[Tokens, Tokens]:
        projected = [proj(patches[i]) for i, proj in enumerate(self.projs)]
        fused: list[torch.Tensor] = []
        for i, revert_proj in enumerate(self.revert_projs):
            grid, other = self.grids[i], self.grids[1 - i]
            fused.append(revert_proj(projected[i] + _resized(projected[1 - i], other, grid)))
        return self.fuse_class_tokens(class_tokens), fused


def _resized(tokens: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    if grid[0] == new_grid[0] and grid[1] == new_grid[1]:
        return tokens
    image = tokens.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(image, size=[new_grid[0], new_grid[1]], mode="bilinear").flatten(2).transpose(1, 2)


FUSIONS: dict[str, type[MultiScaleEncoder]] = {
    "cross_attention": CrossAttention,
    "all_attention": AllAttention,
    "class_token": ClassToken,
    "pairwise": Pairwise,
    "none": MultiScaleEncoder,
}
