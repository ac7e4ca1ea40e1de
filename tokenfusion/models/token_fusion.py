"""Token Fusion: tokens of a CNN and of image patches (Choi et al., "Improved Image Classification with Token Fusion").

The paper leaves open widths, taps and kernels; what is settled here is said where it is, and in the arguments.
`token_fusion_methods.py` has the three methods, `token_fusion_entrypoints.py` the registered models.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, calculate_drop_path_rates, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from tokenfusion.kernels.checks import symbolic
from tokenfusion.models import hub
from tokenfusion.models.checkpoints import CheckedModel
from tokenfusion.models.common import check_choice, check_output_fmt, init_weights

_log = logging.getLogger("tokenfusion")
DEEPEST = 32  # pixels of the image to one of the last stage
_init = partial(init_weights, kinds=(nn.Linear, nn.Conv2d))

Grid = tuple[int, int]
Seen = list[tuple[torch.Tensor, Grid]]


class TokenFusion(CheckedModel):
    """What the three models share: the CNN, transformer blocks, positions and the three classification heads.

    There is no class token, but in one setting, and no norm before the head: it would make the mean over channels zero.

    Args:
        img_size: of the images, multiples of 32; with the "channel" head the model takes images of other such sizes,
            for which positions are resized.
        embed_dim, depth, num_heads, mlp_ratio: of the transformer, ViT-B's; depth is that of the whole model.
        global_pool: "channel" (mean over the tokens), "token" (mean over the channels) or "mixing" (both), Figure 5.
        cnn: a model of timm, whose stem and four stages are the CNN's features.
        pretrained_cnn: with timm's weights. None for "if they can be had", which is tried once, and a line in the log
            where they cannot. On the meta device nothing is fetched.
        train_cnn: train the CNN; otherwise it is frozen, and its batch norms are in eval mode.

    Raises:
        ValueError: an argument with another value.
    """

    patch_size = 16
    output_stride = 32

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        global_pool: str | None = None,
        cnn: str = "resnet101",
        pretrained_cnn: bool | None = None,
        train_cnn: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dd = {"device": device, "dtype": dtype}
        self.img_size = to_2tuple(img_size)
        if any(length <= 0 or length % DEEPEST for length in self.img_size):
            raise ValueError(f"img_size: got {img_size!r}, expected multiples of {DEEPEST}")
        self.num_classes, self.in_chans, self.embed_dim, self.depth = num_classes, in_chans, embed_dim, depth
        self.global_pool = _pool(global_pool or "channel")
        self.grad_checkpointing = False
        self.grid = self.img_size[0] // 16, self.img_size[1] // 16  # of the tokens that the head sees
        self.cnn = _make_cnn(cnn, pretrained_cnn, in_chans, self.output_stride, device).to(**self.dd)
        self.cnn_channels = self.cnn.feature_info.channels()
        self.set_cnn_trainable(train_cnn)
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=rate,
                norm_layer=norm_layer or partial(nn.LayerNorm, eps=1e-6),
                **self.dd,
            )
            for rate in rates
        )
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self._reduction(i), "module": f"blocks.{i}"} for i in range(depth)
        ]

    def _finish(self, num_features: int, extra_tokens: int = 0) -> None:
        """The head, and the initial values of all but the CNN."""
        self.num_features = num_features
        self.num_tokens = self.grid[0] * self.grid[1] + extra_tokens
        self._make_head()
        for name, child in self.named_children():
            if name != "cnn":
                child.apply(_init)
        for parameter in self.parameters(recurse=False):
            trunc_normal_(parameter, std=0.02)

    def _make_head(self) -> None:
        widths = {
            "channel": self.num_features,
            "token": self.num_tokens,
            "mixing": self.num_tokens + self.num_features,
        }
        self.head_hidden_size = widths[self.global_pool]
        self.head = (
            nn.Linear(self.head_hidden_size, self.num_classes, **self.dd) if self.num_classes > 0 else nn.Identity()
        )

    def _reduction(self, block: int) -> int:
        return self.patch_size

    def _patch_embed(self, patch_size: int, in_chans: int) -> PatchEmbed:
        return PatchEmbed(
            self.img_size, patch_size, in_chans, self.embed_dim, strict_img_size=False, flatten=True, **self.dd
        )

    def _new_positions(self, tokens: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(1, tokens, self.embed_dim, **self.dd))

    def _add_positions(self, tokens: torch.Tensor, table: torch.Tensor, grid: Grid, own: Grid) -> torch.Tensor:
        return self.pos_drop(tokens + _resized(table, grid, own, table.shape[1] - own[0] * own[1]))

    def set_cnn_trainable(self, trainable: bool = True) -> None:
        """Train the CNN from now on, or freeze it, with its batch norms in eval mode."""
        self.train_cnn = trainable
        self.cnn.requires_grad_(trainable)
        self.train(self.training)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if not self.train_cnn:
            self.cnn.eval()
        return self

    def _cnn_features(self, x: torch.Tensor) -> list[torch.Tensor]:
        if torch.jit.is_scripting():
            maps = self.cnn(x)
            return maps if self.train_cnn else [stage.detach() for stage in maps]
        with torch.set_grad_enabled(self.train_cnn and torch.is_grad_enabled()):
            return self.cnn(x)

    def _run_blocks(self, x: torch.Tensor, first: int, end: int, grid: Grid, seen: Seen | None) -> torch.Tensor:
        """Blocks first to end - 1; what comes out of each is added to `seen`, with its grid."""
        for i, block in enumerate(self.blocks):
            if first <= i and i < end:
                if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
                if seen is not None:
                    seen.append((x, grid))
        return x

    def _features(self, x: torch.Tensor, depth: int, seen: Seen | None = None) -> torch.Tensor:
        """Fused tokens of the model with the first `depth` of its blocks."""
        raise NotImplementedError

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, H, W] -> fused tokens [B, N, num_features].

        Raises:
            ValueError: images of another size than the model's that its head or its CNN cannot take.
        """
        if not torch.jit.is_scripting():
            _check_size(x, self.img_size, self.global_pool)
        return self._features(x, len(self.blocks))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens -> logits [B, num_classes]; or what the classifier reads, with pre_logits."""
        pooled: list[torch.Tensor] = []
        if self.global_pool in ("token", "mixing"):
            pooled.append(x.mean(dim=2))
        if self.global_pool in ("channel", "mixing"):
            pooled.append(x.mean(dim=1))
        x = self.head_drop(torch.cat(pooled, dim=1))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Tokens after each transformer block, as timm's models give them.

        Args:
            x: images, [B, in_chans, H, W].
            indices: of the blocks: the last n, or all (None).
            norm: changes nothing: there is no norm before the head.
            stop_early: leave out the blocks after the last one asked for, where the final tokens are not asked for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: without the final tokens.

        Returns:
            (final tokens [B, N, num_features], the features), or the features alone.

        Raises:
            ValueError: another output_fmt, or images that `forward_features` does not take.
        """
        check_output_fmt(output_fmt)
        taken, last = feature_take_indices(len(self.blocks), indices)
        _check_size(x, self.img_size, self.global_pool)
        seen: Seen = []
        out = self._features(x, last + 1 if stop_early and intermediates_only else len(self.blocks), seen)
        features = []
        for tokens, grid in (seen[i] for i in taken):
            tokens = tokens[:, tokens.shape[1] - grid[0] * grid[1] :]
            features.append(as_map(tokens, grid).contiguous() if output_fmt == "NCHW" else tokens)
        return features if intermediates_only else (out, features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last of these, and the head; returns the indices. There is no norm to remove."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_head:
            self.reset_classifier(0)
        return taken

    def no_weight_decay(self) -> set[str]:
        """Positions and the class token."""
        return {name for name, _ in self.named_parameters(recurse=False)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates, as timm's optimizers ask for them."""
        return {"stem": r"^cnn|^pos_embed|^cls_token|patch_embed|^bridges", "blocks": [(r"^blocks\.(\d+)", None)]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            self.global_pool = _pool(global_pool)
        self.num_classes = num_classes
        table = next(self.blocks.parameters())
        self.dd = {"device": table.device, "dtype": table.dtype}
        self._make_head()
        self.head.apply(_init).train(self.training)

    def _position_grids(self) -> dict[str, Grid]:
        return {"pos_embed": self.grid}

    def checkpoint_filter(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint of another image size: positions are resized bicubically."""
        state_dict = super().checkpoint_filter(state_dict.get("model", state_dict))
        for name, grid in self._position_grids().items():
            table, own = state_dict.get(name), getattr(self, name)
            if isinstance(table, torch.Tensor) and table.ndim == 3 and table.shape[1] != own.shape[1]:
                prefix = own.shape[1] - grid[0] * grid[1]
                side = round(max(table.shape[1] - prefix, 0) ** 0.5)
                if side * side == table.shape[1] - prefix:
                    state_dict[name] = _resized(table, grid, (side, side), prefix)
        return state_dict


def _check_size(x: torch.Tensor, img_size: Grid, global_pool: str) -> None:
    if symbolic(x) or tuple(x.shape[2:]) == img_size:
        return
    size = tuple(x.shape[2:])
    if any(length % DEEPEST for length in size):
        raise ValueError(f"images: got {size[0]} x {size[1]} pixels, expected multiples of {DEEPEST}")
    if global_pool != "channel":
        raise ValueError(
            f"images: got {size[0]} x {size[1]} pixels, expected {img_size[0]} x {img_size[1]}: "
            f"the {global_pool!r} head has a weight for each token"
        )


def grid_of(x: torch.Tensor, patch: int) -> Grid:
    return x.shape[2] // patch, x.shape[3] // patch


def _make_cnn(
    name: str, pretrained: bool | None, in_chans: int, output_stride: int, device: torch.device | str | None
) -> nn.Module:
    make = partial(timm.create_model, name, features_only=True, in_chans=in_chans, output_stride=output_stride)
    if pretrained is False or hub.on_meta(device):
        return make(pretrained=False)
    try:
        with hub.asked_once(name, timm.get_pretrained_cfg(name)):
            return make(pretrained=True)
    except Exception as error:  # no network, or a hub that is down: timm and its hub client raise many kinds
        if pretrained:
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        _log.warning(
            "pretrained_cnn: no weights of %s: %s; random ones are used, which a frozen CNN keeps: load a checkpoint, "
            "or pass train_cnn=True",
            name,
            reason[0],
        )
        return make(pretrained=False)


def as_map(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[B, H W, C] -> [B, C, H, W], channels_last."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def as_tokens(maps: torch.Tensor) -> torch.Tensor:
    return maps.flatten(2).transpose(1, 2)


@torch.fx.wrap  # the grids are symbols there
def _resized(table: torch.Tensor, grid: Grid, own: Grid, prefix: int) -> torch.Tensor:
    if grid[0] == own[0] and grid[1] == own[1]:
        return table
    return resample_abs_pos_embed(
        table, [grid[0], grid[1]], [own[0], own[1]], num_prefix_tokens=prefix, antialias=False
    )


def _pool(global_pool: str) -> str:
    check_choice("global_pool", global_pool, ("channel", "token", "mixing"))
    return global_pool
