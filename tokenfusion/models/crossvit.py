"""CrossViT (arXiv:2103.14899); `crossvit_entrypoints.py` has the registered models."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final

import torch
from timm.layers import calculate_drop_path_rates, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models.crossvit import scale_image
from torch import nn

from tokenfusion.models.checkpoints import CheckedModel
from tokenfusion.models.common import check_choice, check_lengths, check_output_fmt, init_weights
from tokenfusion.models.crossvit_fusions import FUSIONS
from tokenfusion.models.crossvit_tokenizers import make_tokenizer


class CrossViT(CheckedModel):
    """CrossViT, with every ablation of the paper as an argument.

    Parameter names are those of timm's CrossVit; those of the official release are accepted on load. Images of any size
    are resized to that of each branch.

    Args:
        img_size: height and width of the images; img_scale times that, rounded down, is what each branch sees.
        patch_size, embed_dim, num_heads, mlp_ratio: of each branch, the small one first. Further entries of mlp_ratio,
            which the official configurations have, are not used.
        depth: (N, M, L) of each encoder: blocks of the small and of the large branch, fusions (0 stands for one).
        fusion: "cross_attention", "all_attention", "class_token", "pairwise" or "none", see `crossvit_fusions.py`.
        tokenizer: "conv", "multi_conv" (the dagger models) or "t2t", see `crossvit_tokenizers.py`.
        class_token: False leaves class tokens out: the mean of a branch's patch tokens is the query of its
            cross-attention, whose result is added to each of them (the paper does not say where it goes).
        norm_layer: called with the channels, device and dtype; None for LayerNorm with an eps of 1e-6.
        crop_scale: crop to a branch's size where that is smaller, instead of resizing.
        global_pool: "token", or "avg" over the patch tokens, as always without class tokens.
        num_classes: 0 for no classifier: the pooled tokens of the branches side by side come out.

    Raises:
        ValueError: an argument with another value, or of another length than there are branches.
    """

    class_token: Final[bool]

    def __init__(
        self,
        img_size: int | Sequence[int] = 240,
        img_scale: Sequence[float] = (1.0, 224 / 240),
        patch_size: Sequence[int] = (12, 16),
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (192, 384),
        depth: Sequence[Sequence[int]] = ((1, 4, 0), (1, 4, 0), (1, 4, 0)),
        num_heads: Sequence[int] = (6, 6),
        mlp_ratio: Sequence[float] = (4.0, 4.0),
        fusion: str = "cross_attention",
        tokenizer: str = "conv",
        class_token: bool = True,
        crop_scale: bool = False,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        global_pool: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        sizes = dict(img_scale=img_scale, patch_size=patch_size, embed_dim=embed_dim, num_heads=num_heads)
        check_lengths(2, "branch", **sizes)
        if not depth or any(len(triple) != 3 for triple in depth):
            raise ValueError(f"depth: got {depth!r}, expected (N, M, L) for each encoder")
        check_choice("fusion", fusion, FUSIONS)
        if not class_token and fusion != "cross_attention":
            raise ValueError(f"class_token: got False with fusion {fusion!r}, expected 'cross_attention'")
        norm_layer = norm_layer or partial(nn.LayerNorm, eps=1e-6)
        self.class_token = class_token
        self.global_pool = self._pool(global_pool or ("token" if class_token else "avg"))
        self.num_classes, self.in_chans = num_classes, in_chans
        self.img_size, self.crop_scale = to_2tuple(img_size), crop_scale
        self.img_size_scaled = [tuple(int(length * scale) for length in self.img_size) for scale in img_scale]
        self.grids = [tuple(length // p for length in size) for size, p in zip(self.img_size_scaled, patch_size)]
        self.embed_dim = tuple(embed_dim)
        self.num_features = self.head_hidden_size = sum(embed_dim)
        self.num_branches, self.num_encoders = len(embed_dim), len(depth)
        self.grad_checkpointing = False

        self.patch_embed = nn.ModuleList()
        for i, dim in enumerate(embed_dim):
            self.patch_embed.append(
                make_tokenizer(tokenizer, self.img_size_scaled[i], patch_size[i], in_chans, dim, **dd)
            )
            positions = self.grids[i][0] * self.grids[i][1] + class_token
            setattr(self, f"pos_embed_{i}", nn.Parameter(torch.empty(1, positions, dim, **dd)))
            if class_token:
                setattr(self, f"cls_token_{i}", nn.Parameter(torch.empty(1, 1, dim, **dd)))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        lengths = [max(n, m) + fusions for n, m, fusions in depth]
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(lengths)))
        self.blocks = nn.ModuleList(
            FUSIONS[fusion](
                embed_dim,
                self.grids,
                triple,
                num_heads,
                mlp_ratio,
                class_token=class_token,
                drop_path=list(islice(rates, length)),
                norm_layer=norm_layer,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                **dd,
            )
            for triple, length in zip(depth, lengths)
        )
        self.feature_info = [
            {"num_chs": embed_dim[i], "reduction": round(patch_size[i] / img_scale[i]), "module": f"blocks.{k}"}
            for i in range(self.num_branches)
            for k in range(self.num_encoders)
        ]
        self.norm = nn.ModuleList(norm_layer(dim, **dd) for dim in embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(**dd)
        self.apply(init_weights)
        for parameter in self.parameters(recurse=False):
            trunc_normal_(parameter, std=0.02)

    def _pool(self, global_pool: str) -> str:
        check_choice("global_pool", global_pool, ("token", "avg") if self.class_token else ("avg",))
        return global_pool

    def _classifier(self, **dd) -> nn.ModuleList:
        return nn.ModuleList(
            nn.Linear(dim, self.num_classes, **dd) if self.num_classes > 0 else nn.Identity() for dim in self.embed_dim
        )

    def no_weight_decay(self) -> set[str]:
        """Class tokens and positions."""
        return {name for name, _ in self.named_parameters(recurse=False)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates, as timm's optimizers ask for them."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.ModuleList:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            self.global_pool = self._pool(global_pool)
        self.num_classes = num_classes
        positions = self.pos_embed_0
        self.head = self._classifier(device=positions.device, dtype=positions.dtype).train(self.training)

    def _embed(self, x: torch.Tensor) -> list[torch.Tensor]:
        branches: list[torch.Tensor] = []
        for i, patch_embed in enumerate(self.patch_embed):
            tokens = patch_embed(scale_image(x, self.img_size_scaled[i], self.crop_scale))
            positions = self.pos_embed_0 if i == 0 else self.pos_embed_1  # TorchScript has no getattr of a name made up
            if self.class_token:
                class_token = self.cls_token_0 if i == 0 else self.cls_token_1
                tokens = torch.cat((class_token.expand(x.shape[0], -1, -1), tokens), dim=1).add_(positions)
            else:
                tokens = tokens + positions
            branches.append(self.pos_drop(tokens))
        return branches

    def _encode(self, x: torch.Tensor, class_tokens_only: bool = False) -> list[torch.Tensor]:
        branches = self._embed(x)
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
            encoders = [*self.blocks[:-1], partial(self.blocks[-1], class_tokens_only=class_tokens_only)]
            branches = checkpoint_seq(encoders, branches, use_reentrant=False)
        else:
            last = len(self.blocks) - 1
            for k, encoder in enumerate(self.blocks):
                branches = encoder(branches, class_tokens_only and k == last)
        return [norm(branches[i]) for i, norm in enumerate(self.norm)]

    def forward_features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images [B, in_chans, H, W] -> the normalised tokens of each branch, [B, 1 + N_i, C_i]."""
        return self._encode(x)

    def forward_head(self, x: list[torch.Tensor], pre_logits: bool = False) -> torch.Tensor:
        """Tokens of each branch -> logits [B, num_classes], the mean of the branches'; or the pooled tokens of the
        branches side by side, [B, num_features], with pre_logits or without a classifier."""
        if self.global_pool == "avg":
            pooled = [tokens[:, int(self.class_token) :].mean(dim=1) for tokens in x]
        else:
            pooled = [tokens[:, 0] for tokens in x]
        pooled = [self.head_drop(token) for token in pooled]
        if pre_logits or self.num_classes == 0:
            return torch.cat(pooled, dim=1)
        return torch.stack([head(pooled[i]) for i, head in enumerate(self.head)]).mean(dim=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """forward_head(forward_features(x)), without the patch tokens that no class is read from."""
        return self.forward_head(self._encode(x, class_tokens_only=self.global_pool == "token"))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Patch tokens after each encoder, as timm's CrossVit gives them.

        Args:
            x: images, [B, in_chans, H, W].
            indices: of the features: i * K + k is branch i after encoder k of K. The last n, or all (None).
            norm: normalise them by the norm of their branch.
            stop_early: leave out the encoders after the last one asked for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: without the final tokens.

        Returns:
            (final normalised tokens of each branch, the features), or the features alone.
        """
        check_output_fmt(output_fmt)
        taken, _ = feature_take_indices(self.num_branches * self.num_encoders, indices)
        last = max(index % self.num_encoders for index in taken)
        branches, features = self._embed(x), {}
        for k, encoder in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            branches = encoder(branches)
            for i, tokens in enumerate(branches):
                index = i * self.num_encoders + k
                if index in taken:
                    tokens = (self.norm[i](tokens) if norm else tokens)[:, int(self.class_token) :]
                    if output_fmt == "NCHW":
                        tokens = tokens.transpose(1, 2).unflatten(2, self.grids[i]).contiguous()
                    features[index] = tokens
        intermediates = [features[index] for index in sorted(features)]
        if intermediates_only:
            return intermediates
        return [norm(tokens) for norm, tokens in zip(self.norm, branches)], intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the encoders after the last of these features, and the norms and the head; returns the indices."""
        taken, _ = feature_take_indices(self.num_branches * self.num_encoders, indices)
        self.blocks = self.blocks[: max(index % self.num_encoders for index in taken) + 1]
        if prune_norm:
            self.norm = nn.ModuleList(nn.Identity() for _ in self.norm)
        if prune_head:
            self.reset_classifier(0)
        return taken

    def current_name(self, name: str) -> str:
        """The official release has lists, `pos_embed.0` and `cls_token.0`."""
        return re.sub(r"^(pos_embed|cls_token)\.(\d+)$", r"\1_\2", name)

    def checkpoint_filter(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint of timm or of the official release; positions of another resolution are resized bicubically."""
        state_dict = super().checkpoint_filter(state_dict.get("model", state_dict))
        for i, grid in enumerate(self.grids):
            table = state_dict.get(f"pos_embed_{i}")
            if isinstance(table, torch.Tensor) and table.ndim == 3:
                state_dict[f"pos_embed_{i}"] = _resized(table, grid, prefix=int(self.class_token))
        return state_dict


def _resized(table: torch.Tensor, grid: tuple[int, int], prefix: int) -> torch.Tensor:
    """[1, prefix + N, C] of a square grid -> that of another, as the paper's fine-tuning at higher resolution does."""
    side = round(max(table.shape[1] - prefix, 0) ** 0.5)
    if side * side != table.shape[1] - prefix:
        return table  # of no square image: load_state_dict says what does not fit
    return resample_abs_pos_embed(table, grid, num_prefix_tokens=prefix, antialias=False, align_corners=False)
