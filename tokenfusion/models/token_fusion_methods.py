"""The three methods of Token Fusion (Choi et al., "Improved Image Classification with Token Fusion")."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tokenfusion.layers.upconv import UpConvAdd, UpConvConcat, UpConvConcatProject, UpCopyAdd, UpCopyConcat
from tokenfusion.models.common import check_choice
from tokenfusion.models.token_fusion import DEEPEST, Grid, Seen, TokenFusion, as_map, as_tokens, grid_of

_STAGES = 5  # the stem before its max-pool, and four stages


class LateTokenFusion(TokenFusion):
    """Method 1: two transformers in parallel, over patches of 32 x 32 pixels and over the pixels of the last stage.

    The CNN has an output stride of 16, so that its last stage has four times as many tokens; the others are up-sampled
    to them. The first half of the blocks is that of the pixels: timm wants features with the finer grid first.

    Args:
        up: "upconv" or "copy" (Figure 6).
        join: "concat" or "add".
        up_kernel: of the transposed convolution with stride 2; 4 has a padding of 1, and its patches overlap.
    """

    output_stride = 16

    def __init__(self, *args, up: str = "upconv", join: str = "concat", up_kernel: int = 2, **kwargs):
        check_choice("up", up, ("upconv", "copy"))
        check_choice("join", join, ("concat", "add"))
        check_choice("up_kernel", up_kernel, (2, 4))
        super().__init__(*args, **kwargs)
        dim = self.embed_dim
        self.patch_embed = self._patch_embed(DEEPEST, self.in_chans)
        self.pos_embed = self._new_positions(self.grid[0] // 2 * (self.grid[1] // 2))
        self.cnn_embed = nn.Linear(self.cnn_channels[-1], dim, **self.dd)
        self.pos_embed_cnn = self._new_positions(self.grid[0] * self.grid[1])
        layers = {
            ("upconv", "concat"): partial(UpConvConcat, dim, dim, **self.dd),
            ("upconv", "add"): partial(UpConvAdd, dim, dim, **self.dd),
            ("copy", "concat"): UpCopyConcat,
            ("copy", "add"): UpCopyAdd,
        }
        if (up, up_kernel) == ("upconv", 4):
            self.fusion = _OverlappingUpConv(dim, join, **self.dd)
        else:
            self.fusion = layers[up, join]()
        self._finish(2 * dim if join == "concat" else dim)

    def _reduction(self, block: int) -> int:
        return 16 if block < self.depth // 2 else DEEPEST

    def _position_grids(self) -> dict[str, Grid]:
        return {"pos_embed": (self.grid[0] // 2, self.grid[1] // 2), "pos_embed_cnn": self.grid}

    def _features(self, x: torch.Tensor, depth: int, seen: Seen | None = None) -> torch.Tensor:
        half = self.depth // 2
        coarse, fine = grid_of(x, 32), grid_of(x, 16)
        pixels = self.cnn_embed(as_tokens(self._cnn_features(x)[-1]))
        pixels = self._add_positions(pixels, self.pos_embed_cnn, fine, self.grid)
        pixels = self._run_blocks(pixels, 0, min(half, depth), fine, seen)
        own = self.grid[0] // 2, self.grid[1] // 2
        patches = self._add_positions(self.patch_embed(x), self.pos_embed, coarse, own)
        patches = self._run_blocks(patches, half, depth, coarse, seen)
        return as_tokens(self.fusion(as_map(patches, coarse), as_map(pixels, fine)))


class EarlyTokenFusion(TokenFusion):
    """Method 2: maps of all CNN stages, brought to the image's size in 3 channels each, are concatenated to the image.

    With five bridges that is the H x W x 18 of the paper. It is cut into patches as by a ViT.

    Args:
        up: "upconv" (and a 1x1 convolution) or "copy" (Figure 7), for which the 1x1 convolution comes first, since it
            commutes with copying.
        bridges: "multi", or "single" for one bridge, from the last stage.
        bridge_width: channels between up-convolution and 1x1 convolution.
    """

    def __init__(self, *args, up: str = "upconv", bridges: str = "multi", bridge_width: int = 4, **kwargs):
        check_choice("up", up, ("upconv", "copy"))
        check_choice("bridges", bridges, ("multi", "single"))
        super().__init__(*args, **kwargs)
        stages = range(_STAGES) if bridges == "multi" else [_STAGES - 1]
        self.bridges = nn.ModuleDict()
        for i in stages:
            channels, scale = self.cnn_channels[i], 2 ** (i + 1)
            self.bridges[str(i)] = (
                UpConvConcatProject(channels, bridge_width, 0, 3, scale, **self.dd)
                if up == "upconv"
                else nn.Sequential(nn.Conv2d(channels, 3, 1, **self.dd), UpCopyConcat(scale))
            )
        self.patch_embed = self._patch_embed(16, self.in_chans + 3 * len(self.bridges))
        self.pos_embed = self._new_positions(self.grid[0] * self.grid[1])
        self._finish(self.embed_dim)

    def _features(self, x: torch.Tensor, depth: int, seen: Seen | None = None) -> torch.Tensor:
        grid, maps = grid_of(x, 16), self._cnn_features(x)
        joined = [x]
        for i, bridge in enumerate(self.bridges.values()):
            joined.append(bridge(maps[i - len(self.bridges)]))
        tokens = self._add_positions(self.patch_embed(torch.cat(joined, dim=1)), self.pos_embed, grid, self.grid)
        return self._run_blocks(tokens, 0, depth, grid, seen)


class LayerwiseTokenFusion(TokenFusion):
    """Method 3: after every sixth of the blocks, the map of one CNN stage is concatenated to the tokens and integrated.

    The map is brought to the grid of the tokens by average pooling, or, for the last stage, by an up-convolution, and a
    linear layer brings the concatenation back to the width of the tokens. It starts as [identity | small].

    Args:
        class_token: with a class token, which takes part in the blocks and not in the integration (Figure 8).
    """

    def __init__(self, *args, class_token: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        dim = self.embed_dim
        if len(self.blocks) < _STAGES + 1:
            raise ValueError(f"depth: got {len(self.blocks)}, expected {_STAGES + 1} or more")
        self.patch_embed = self._patch_embed(16, self.in_chans)
        self.pos_embed = self._new_positions(self.grid[0] * self.grid[1] + class_token)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **self.dd)) if class_token else None
        *pooled, last = self.cnn_channels
        self.integrate = nn.ModuleList(nn.Linear(dim + channels, dim, **self.dd) for channels in pooled)
        self.integrate_last = UpConvConcatProject(last, dim, dim, dim, 2, skip_first=True, **self.dd)
        self._finish(dim, extra_tokens=int(class_token))
        with torch.no_grad():
            for weight in (*(linear.weight for linear in self.integrate), self.integrate_last.proj.weight.flatten(1)):
                weight[:, :dim] = torch.eye(dim, **self.dd)

    def _features(self, x: torch.Tensor, depth: int, seen: Seen | None = None) -> torch.Tensor:
        grid, maps = grid_of(x, 16), self._cnn_features(x)
        last = len(self.integrate)
        each = self.depth // (last + 2)
        tokens, prefix = self.patch_embed(x), 0
        if self.cls_token is not None:
            tokens, prefix = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), tokens), dim=1), 1
        tokens = self._add_positions(tokens, self.pos_embed, grid, self.grid)
        for i, integrate in enumerate(self.integrate):
            tokens = self._run_blocks(tokens, i * each, min((i + 1) * each, depth), grid, seen)
            pooled = F.avg_pool2d(maps[i], maps[i].shape[2] // grid[0])
            patches = integrate(torch.cat((tokens[:, prefix:], as_tokens(pooled)), dim=2))
            tokens = torch.cat((tokens[:, :prefix], patches), dim=1) if prefix > 0 else patches
        tokens = self._run_blocks(tokens, last * each, min((last + 1) * each, depth), grid, seen)
        patches = as_tokens(self.integrate_last(maps[-1], as_map(tokens[:, prefix:], grid)))
        tokens = torch.cat((tokens[:, :prefix], patches), dim=1) if prefix > 0 else patches
        return self._run_blocks(tokens, (last + 1) * each, depth, grid, seen)


class _OverlappingUpConv(nn.ConvTranspose2d):
    """The reading of the late fusion block with a kernel of 4, stride of 2 and padding of 1."""

    def __init__(self, dim: int, join: str, **dd):
        super().__init__(dim, dim, 4, stride=2, padding=1, **dd)
        self.join = join

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        up = F.conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding)
        return torch.cat((up, skip), dim=1) if self.join == "concat" else up + skip
