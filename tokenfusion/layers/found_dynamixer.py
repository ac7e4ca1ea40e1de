"""DynaMixer's block and operation in classes of somebody else's, with the parameters of the official code."""

from collections.abc import Callable
from math import isqrt
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from tokenfusion.layers import dynamixer
from tokenfusion.layers.drop_in import PLAIN, STATE, why_not_linear, why_not_part
from tokenfusion.layers.found import Agreement, Found
from tokenfusion.layers.watched import (
    UsedParts,
    Watched,
    remember,
    watch_all,
    why_not_all_as_before,
    why_not_modes,
)

OPS = ("mix_h", "mix_w")
_BIASED = ("compress", "generate")


class Details(NamedTuple):
    """What a trial showed; in_pieces: that a block's reweighting gives the same for a few images at a time."""

    agreement: Agreement
    in_pieces: bool = False


class Kind(NamedTuple):
    """What is known of all such classes: linears are read past, sizes are of what is taken, after the batch."""

    linears: tuple[str, ...]
    used: UsedParts
    sizes: Callable[[nn.Module], tuple[int, ...]]
    fused: Callable[..., torch.Tensor]  # of the module and what it takes


class State(NamedTuple):
    """A module as it was when it was tried, and its reweighting, if that is known to work in pieces."""

    watched: tuple[Watched, ...]
    reweight: tuple[Watched, ...]


class FoundDynaMixer(Found):
    """A module of such a class. What it and its class hold has to stay as it was in its trial."""

    _kind: ClassVar[Kind]

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for watched in vars(self).get(STATE, ()):
            remember(*watched)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        reason = why_not_parts(module, cls._kind)
        if reason is not None or not isinstance(module, cls):
            return reason
        state, agreement = getattr(module, STATE, None), cls.details.agreement
        if state is None:
            return "it was not tried"
        if module.training and not agreement.in_training:
            return "in training its forward is another one"
        return why_not_modes(module, agreement.modes) or why_not_all_as_before(module, state.watched)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.plain_forward(x)
        cls = type(self)
        return cls._kind.fused(self, x) if self.fuses() and _serves(self, x) else cls.original.forward(self, x)


class FoundOp(FoundDynaMixer):
    _kind = Kind(
        ("compress", "generate", "out"),
        UsedParts((), ("compress", "generate", "out")),
        lambda op: (_tokens(op), op.out.in_features),
        lambda op, x: op.out(dynamixer.mixed(op, x.unsqueeze(1), 2, _segments(op)).squeeze(1)),
    )


class FoundBlock(FoundDynaMixer):
    """Its operations are found ones, too."""

    _kind = Kind(
        ("mlp_c", "proj"),
        UsedParts(("reweight",), ("mlp_c", "proj", *OPS)),
        lambda block: (_tokens(block.mix_h), _tokens(block.mix_w), block.proj.in_features),
        lambda block, x: dynamixer.run_block(_branches(block), x, lambda: _may_reweight_in_pieces(block)),
    )

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        for name in OPS:
            op = module._modules.get(name)
            kind = type(op)
            reason = f"{name} is {kind.__name__}, which was not tried" if not issubclass(kind, FoundOp) else None
            reason = reason or why_not_part(op, name, kind)
            if reason is None and (of_op := kind.why_not_fused(op)) is not None:
                reason = f"{name}: {of_op}"
            if reason is not None:
                return reason
        return super().why_not(module)


def become(module: nn.Module, fused: type[FoundDynaMixer]) -> None:
    """Makes a module one of its fused class, as it is now."""
    if not isinstance(module, fused):
        vars(module)[STATE] = state_of(module, fused._kind, fused.details.in_pieces)
        module.__class__ = fused


def state_of(module: nn.Module, kind: Kind, in_pieces: bool) -> State:
    return State(watch_all(module, (*kind.used.called, *OPS)), watch_all(module.reweight) if in_pieces else ())


def why_not_parts(module: nn.Module, kind: Kind) -> str | None:
    for name in kind.linears:
        part = module._modules.get(name)
        reason = why_not_linear(part, name)
        if reason is None and part.bias is None and name in _BIASED:
            reason = f"{name} has no bias"
        if reason is not None:
            return reason
    return None


def _serves(module: FoundDynaMixer, x: torch.Tensor) -> bool:
    """Whether the class was tried with such tensors; others are its own business."""
    if type(x) not in PLAIN or x.is_nested or x.is_meta or x.numel() == 0:
        return False
    agreement = type(module).details.agreement
    if x.dtype == torch.float64 and not agreement.in_float64:
        return False
    in_autocast = agreement.in_autocast or not torch.is_autocast_enabled(x.device.type)
    return in_autocast and x.shape[1:] == module._kind.sizes(module)


def _tokens(op: nn.Module) -> int:
    return isqrt(op.generate.out_features)


def _segments(op: nn.Module) -> int:
    reduced = op.generate.in_features // _tokens(op)
    return op.compress.out_features // reduced


def _branches(block: nn.Module) -> dynamixer.Branches:
    ops = (block.mix_h, block.mix_w)
    mixings = tuple([dynamixer.Mixing(op, _segments(op), dim) for dim, op in enumerate(ops, 1)])
    return dynamixer.Branches(mixings, block.mlp_c, block.reweight, block.proj)


def _may_reweight_in_pieces(block: nn.Module) -> bool:
    state, reweight = getattr(block, STATE, None), block.reweight
    return (
        state is not None
        and bool(state.reweight)
        and why_not_part(reweight, "reweight", state.reweight[0].kind) is None
        and why_not_all_as_before(reweight, state.reweight) is None
        and not any(part.training for part in reweight.modules())
    )
