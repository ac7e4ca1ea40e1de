"""How CrossViT makes tokens of an image: a linear patch embedding, three convolutions, or T2T-ViT's transformation."""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, Mlp, to_2tuple
from timm.models.crossvit import PatchEmbed
from torch import nn
from torch.nn import functional as F

from tokenfusion.models.common import check_choice

TOKENIZERS = ("conv", "multi_conv", "t2t")

_KERNELS = {  # patch size -> kernel, stride and padding of each unfolding
    12: ((7, 4, 2), (3, 3, 1), (3, 1, 1)),
    16: ((7, 4, 2), (3, 2, 1), (3, 2, 1)),
}


def make_tokenizer(
    kind: str, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, **dd
) -> nn.Module:
    """[B, in_chans, H, W] -> [B, N, embed_dim], with the attributes img_size, patch_size and num_patches.

    Raises:
        ValueError: an unknown kind; for "multi_conv" and "t2t" another patch size than 12 and 16, or images that are no
            multiple of it.
    """
    check_choice("tokenizer", kind, TOKENIZERS)
    if kind != "conv" and patch_size not in _KERNELS:
        raise ValueError(f"patch_size: got {patch_size} with tokenizer {kind!r}, expected 12 or 16")
    if kind != "conv" and any(length % patch_size for length in img_size):
        raise ValueError(
            f"img_size: got {img_size} for patches of {patch_size} with tokenizer {kind!r}, expected a multiple"
        )
    if kind == "t2t":
        return T2T(img_size, patch_size, in_chans, embed_dim, **dd)
    return PatchEmbed(img_size, patch_size, in_chans, embed_dim, multi_conv=kind == "multi_conv", **dd)


class T2T(nn.Module):
    """Tokens-to-token transformation (arXiv:2101.11986) in place of the patch embedding, as in CrossViT-18 + T2T.

    Three unfoldings of overlapping windows; after the first and the second a transformer of one head and 64 channels
    over all positions, and a linear layer in the end. `_KERNELS` has the windows for each size of patches. The position
    table is the learnable one of the other tokenizers.
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        patch_size: int,
        in_chans: int = 3,
        embed_dim: int = 768,
        token_dim: int = 64,
        **dd,
    ):
        super().__init__()
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.num_patches = (self.img_size[0] // patch_size) * (self.img_size[1] // patch_size)
        self.kernels = list(_KERNELS[patch_size])
        first, second, third = (kernel**2 for kernel, _, _ in self.kernels)
        self.attention1 = TokenTransformer(in_chans * first, token_dim, **dd)
        self.attention2 = TokenTransformer(token_dim * second, token_dim, **dd)
        self.project = nn.Linear(token_dim * third, embed_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._as_image(self.attention1(self._windows(x, 0)), x, 0)
        x = self._as_image(self.attention2(self._windows(x, 1)), x, 1)
        return self.project(self._windows(x, 2))

    def _windows(self, x: torch.Tensor, step: int) -> torch.Tensor:
        size, stride, padding = self.kernels[step]
        return F.unfold(x, size, stride=stride, padding=padding).transpose(1, 2)

    def _as_image(self, tokens: torch.Tensor, x: torch.Tensor, step: int) -> torch.Tensor:
        """The tokens of the windows of x."""
        size, stride, padding = self.kernels[step]
        height = (x.shape[2] + 2 * padding - size) // stride + 1
        return tokens.transpose(1, 2).unflatten(2, (height, -1))


class TokenTransformer(nn.Module):
    """One transformer block of T2T-ViT from `dim` to `token_dim` channels.

    v + proj(attention(q, k, v)), since the input has another width than the output; then x + mlp(norm(x)), ratio 1.
    One head; the scale is that of the input's width, and q, k and v have no bias.
    """

    def __init__(self, dim: int, token_dim: int, drop_path: float = 0.0, **dd):
        super().__init__()
        self.scale = dim**-0.5
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.qkv = nn.Linear(dim, 3 * token_dim, bias=False, **dd)
        self.proj = nn.Linear(token_dim, token_dim, **dd)
        self.norm2 = nn.LayerNorm(token_dim, **dd)
        self.mlp = Mlp(token_dim, token_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unsqueeze(1).chunk(3, dim=-1)  # [B, 1, N, token_dim]
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = (v + self.proj(attended)).squeeze(1)
        return x + self.drop_path(self.mlp(self.norm2(x)))
