"""DynaMixer (arXiv:2201.12083); `dynamixer_entrypoints.py` has the registered models."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple, to_ntuple
from timm.models import checkpoint_seq, register_notrace_module
from timm.models._features import feature_take_indices
from torch import nn

from tokenfusion.kernels.checks import symbolic
from tokenfusion.layers import DynaMixerBlock
from tokenfusion.layers.block_inference import add, are_plain, may_run_in_place, run_mlp
from tokenfusion.models.checkpoints import CheckedModel
from tokenfusion.models.common import check_choice, check_lengths, check_output_fmt, init_weights
from tokenfusion.models.dynamixer_reference import plain
from tokenfusion.models.dynamixer_resampling import resampled


class PatchEmbed(nn.Module):
    """Patches to tokens, [B, C, H, W] -> [B, H / p, W / p, D]; pixels beyond the last whole patch are left out."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int, **dd):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class Downsample(PatchEmbed):
    """The same on tokens: [B, H, W, D] -> [B, H / p, W / p, D']."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class MixerLayer(nn.Module):
    """x + block(norm(x)), then x + mlp(norm(x)), for x [B, H, W, D]; Fig. 2 of the paper, middle."""

    def __init__(
        self,
        dim: int,
        block: nn.Module,
        mlp_ratio: float = 3.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        **dd,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.attn = block
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)

    def plain_forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.plain_forward(x)
        if not self._runs_in_place():
            return self.plain_forward(x)
        x = add(self.drop_path(self.attn(self.norm1(x))), x)
        return add(self.drop_path(run_mlp(self.mlp, self.norm2(x))), x)

    def _runs_in_place(self) -> bool:
        return (
            may_run_in_place(self.attn, DynaMixerBlock)
            and type(self.attn.proj) is nn.Linear
            and type(self.mlp) is Mlp
            and are_plain(self.attn.proj, self.mlp, self.drop_path)
        )


class DynaMixer(CheckedModel):
    """DynaMixer, with every ablation of the paper as an argument. The defaults are DynaMixer-S.

    Parameter names are those of the official code. The model is made for one image size; a checkpoint of another one
    is resampled when it is loaded, see `dynamixer_resampling.py`. Arguments of each stage may be one number for all.

    Args:
        layers: mixer layers of each stage.
        img_size: height and width of the images. Rows and columns beyond a whole patch are left out.
        patch_size: of the first embedding.
        embed_dims, num_heads, reduced_dims, mlp_ratios: of each stage: channels D, segments S, numbers d that a token
            is compressed to for each segment, width of the channel MLP over D.
        transitions: for each stage whether 2 x 2 tokens become one after it. Where the channels change without,
            a linear layer of each token changes them. The last entry is not used and may be left out.
        resolutions: tokens of each stage, (H, W) or one number for both, as the official code has them; None for what
            img_size gives.
        generator, row_mixing, column_mixing, channel_mixing, reweighting, shared: as in
            `tokenfusion.layers.DynaMixerBlock` (Tables 6 and 8).
        proj_drop_rate: dropout in the channel MLPs; drop_rate: before the classifier.
        drop_path_rate: of the last layer, rising linearly from 0 at the first.
        global_pool: "avg" over the tokens, or "" for none, which gives a map of logits.
        num_classes: 0 for no classifier.

    Raises:
        ValueError: an argument of another value, or of another length than there are stages.
    """

    def __init__(
        self,
        layers: Sequence[int] = (4, 3, 8, 3),
        img_size: int | Sequence[int] = 224,
        patch_size: int = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: int | Sequence[int] = (192, 384, 384, 384),
        transitions: Sequence[bool] = (True, False, False, False),
        resolutions: Sequence[int | tuple[int, int]] | None = None,
        num_heads: int | Sequence[int] = (8, 16, 16, 16),
        reduced_dims: int | Sequence[int] = 2,
        mlp_ratios: float | Sequence[float] = 3,
        *,
        generator: str = "dynamic",
        row_mixing: bool = True,
        column_mixing: bool = True,
        channel_mixing: bool = True,
        reweighting: bool = True,
        shared: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        global_pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        layers, stages = tuple(layers), len(layers)
        of_each_stage = to_ntuple(stages)
        embed_dims, num_heads, reduced_dims, mlp_ratios = map(
            of_each_stage, (embed_dims, num_heads, reduced_dims, mlp_ratios)
        )
        transitions = tuple(transitions)[: stages - 1]
        check_lengths(stages, "stage", embed_dims=embed_dims, num_heads=num_heads)
        check_lengths(stages, "stage", reduced_dims=reduced_dims, mlp_ratios=mlp_ratios)
        check_lengths(stages - 1, "stage", transitions=transitions)
        self.num_classes, self.in_chans, self.img_size = num_classes, in_chans, to_2tuple(img_size)
        self.global_pool = _checked_pool(global_pool)
        self.embed_dims = embed_dims
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.output_fmt, self.feature_dim = "NHWC", -1
        self.grad_checkpointing = False
        self.resolutions = _resolutions(self.img_size, patch_size, transitions, resolutions)
        options = dict(generator=generator, shared=shared, reweighting=reweighting)
        options |= dict(row_mixing=row_mixing, column_mixing=column_mixing, channel_mixing=channel_mixing)

        def layer(stage: int, drop_path: float) -> MixerLayer:
            dim = embed_dims[stage]
            sizes = self.resolutions[stage], num_heads[stage], reduced_dims[stage]
            block = DynaMixerBlock(dim, *sizes, **options, **dd)
            return MixerLayer(dim, block, mlp_ratios[stage], proj_drop_rate, drop_path, norm_layer, **dd)

        self.patch_embed = PatchEmbed(in_chans, embed_dims[0], patch_size, **dd)
        self.network = nn.ModuleList()
        self.stage_places: list[int] = []  # of each stage in the network
        self.feature_info = []
        reduction = patch_size
        for stage, rates in enumerate(calculate_drop_path_rates(drop_path_rate, layers, stagewise=True)):
            self.network.append(nn.Sequential(*(layer(stage, rate) for rate in rates)))
            self.stage_places.append(len(self.network) - 1)
            module = f"network.{self.stage_places[-1]}"
            self.feature_info.append({"num_chs": embed_dims[stage], "reduction": reduction, "module": module})
            if stage == stages - 1:
                break
            factor = 2 if transitions[stage] else 1
            reduction *= factor
            if factor > 1 or embed_dims[stage] != embed_dims[stage + 1]:
                self.network.append(Downsample(embed_dims[stage], embed_dims[stage + 1], factor, **dd))
        self.norm = norm_layer(embed_dims[-1], **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(**dd)
        self.apply(init_weights)

    def _classifier(self, **dd) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes, **dd) if self.num_classes > 0 else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """No names: what has one dimension is exempt in timm's optimizers anyway."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates, as timm's optimizers ask for them."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^network\.(\d+)", None), (r"^norm", (99999,))]}
        blocks = [(r"^network\.(\d+)\.proj", (0,)), (r"^network\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        self.head = self._classifier(device=weight.device, dtype=weight.dtype).train(self.training)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            _check_images(x, [self.in_chans, *self.img_size])
        return self.patch_embed(x)

    def _run(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """A stage or a Downsample."""
        if self.grad_checkpointing and torch.is_grad_enabled() and isinstance(module, nn.Sequential):
            return checkpoint_seq(module, x, use_reentrant=False)
        return module(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, H, W] -> normalised tokens [B, H', W', D]."""
        x = self._embed(x)
        for module in self.network:
            if torch.jit.is_scripting():
                x = module(x)
            else:
                x = self._run(module, x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens [B, H', W', D] -> logits [B, num_classes] of their mean; or that mean, [B, D], with pre_logits."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        x = self.head_drop(x)
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
        """Tokens after each stage.

        Args:
            x: images, [B, in_chans, H, W].
            indices: of the stages: the last n, or all (None).
            norm: normalise those of the last stage by the model's norm, which is made for them alone.
            stop_early: leave out what comes after the last one asked for, where the final tokens are not asked for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: without the final tokens.

        Returns:
            (final normalised tokens [B, H', W', D], the features), or the features alone.

        Raises:
            ValueError: another output_fmt.
        """
        if not torch.jit.is_scripting():
            check_output_fmt(output_fmt)
        taken, last = feature_take_indices(len(self.stage_places), indices)
        wanted = [self.stage_places[index] for index in taken]
        end = len(self.network) - 1
        needed = self.stage_places[last] if stop_early and intermediates_only else end
        x = self._embed(x)
        features: list[torch.Tensor] = []
        for place, module in enumerate(self.network):
            if place <= needed:
                if torch.jit.is_scripting():
                    x = module(x)
                else:
                    x = self._run(module, x)
                if place in wanted:
                    tokens = self.norm(x) if norm and place == end else x
                    features.append(
                        tokens.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else tokens.flatten(1, 2)
                    )
        if intermediates_only:
            return features
        return self.norm(x), features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what comes after the last of these stages, and the norm and the head; returns the indices.

        The norm and the head are made for the last stage, and go with it whatever the arguments say.
        """
        taken, last = feature_take_indices(len(self.stage_places), indices)
        cut = last < len(self.stage_places) - 1
        self.stage_places = self.stage_places[: last + 1]
        self.network = self.network[: self.stage_places[-1] + 1]
        if cut:
            self.num_features = self.head_hidden_size = self.embed_dims[last]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return taken

    def plain(self) -> nn.Module:
        """A copy with blocks in plain PyTorch, as the paper has them, to compare with; see `dynamixer_reference.py`."""
        return plain(self)

    def checkpoint_filter(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint of this model or of the official code; generators of another resolution are resampled."""
        return resampled(super().checkpoint_filter(state_dict.get("model", state_dict)), self)


def _check_images(x: torch.Tensor, expected: list[int]) -> None:
    if not symbolic(x) and list(x.shape[1:]) != expected:
        raise ValueError(
            f"x: got shape {list(x.shape)}, expected [B, {', '.join(map(str, expected))}]; "
            "create_model(..., img_size=...) makes the model for another size"
        )


def _resolutions(
    img_size: tuple[int, int], patch_size: int, transitions: Sequence[bool], given: Sequence | None
) -> list[tuple[int, int]]:
    """Tokens (H, W) of each stage."""
    grids = [tuple(length // patch_size for length in img_size)]
    for transition in transitions:
        grids.append(tuple(length // 2 for length in grids[-1]) if transition else grids[-1])
    if min(grids[-1]) < 1:
        raise ValueError(f"img_size: got {img_size}, expected a size with at least one token in every stage")
    if given is not None and [to_2tuple(resolution) for resolution in given] != grids:
        raise ValueError(f"resolutions: got {given!r}, expected {grids}, which img_size {img_size} gives")
    return grids


def _checked_pool(global_pool: str) -> str:
    check_choice("global_pool", global_pool, ("avg", ""))
    return global_pool
