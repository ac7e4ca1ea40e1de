"""The DynaMixer block and operation of the official code, and of code like it, in whatever module they are defined.

They are recognised by the names and shapes of their parameters. That a module of this structure also computes what the
paper says is tried out before it is replaced.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
from torch import nn

from tokenfusion import layers
from tokenfusion.kernels import dispatch
from tokenfusion.layers.drop_in import (
    dropout,
    remember_forwards,
    why_not_linear,
    why_not_part,
    why_not_watched,
    within,
)
from tokenfusion.layers.found import Found, fused_class
from tokenfusion.surgery.rules.rule import Plan, with_forward_on_instance
from tokenfusion.surgery.rules.trial import Draws, failed, same, with_drawn_parameters

_OP_LINEARS = ("compress", "generate", "out")
_BLOCK_LINEARS = ("mlp_c", "proj")
_BIASED = ("compress", "generate")


class _Found(Found):
    """A module with the parameters of a layer of this package, and not its attributes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.plain_forward(x)
        return self.layer._fused(self, x) if self.fuses() else self.original.forward(self, x)


class _FoundOp(_Found, layers.DynaMixerOp):
    layer, generator = layers.DynaMixerOp, "dynamic"
    dim = property(lambda op: op.out.in_features)
    seq_len = property(lambda op: isqrt(op.generate.out_features))
    reduced_dim = property(lambda op: op.generate.in_features // op.seq_len)
    num_head = property(lambda op: op.compress.out_features // op.reduced_dim)
    sizes = property(lambda op: (op.seq_len, op.dim))  # of what it takes, after the batch

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        return _why_not_linears(module, _OP_LINEARS) or _why_not_dropout(module)


class _FoundBlock(_Found, layers.DynaMixerBlock):
    layer, shared = layers.DynaMixerBlock, False
    dim = property(lambda block: block.proj.in_features)
    resolution = property(lambda block: (block.mix_h.seq_len, block.mix_w.seq_len))
    sizes = property(lambda block: (*block.resolution, block.dim))

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        for name in ("mix_h", "mix_w"):
            op = module._modules.get(name)
            reason = why_not_part(op, name, type(op)) or within(name, _why_not_op(op))
            if reason is not None:
                return reason
        return _why_not_linears(module, _BLOCK_LINEARS) or _why_not_dropout(module)


def _why_not_op(op: nn.Module) -> str | None:
    return op.why_not_fused(op) if isinstance(op, _FoundOp) else _FoundOp.why_not(op)


def _why_not_linears(module: nn.Module, names: tuple[str, ...]) -> str | None:
    for name in names:
        part = module._modules.get(name)
        reason = why_not_linear(part, name)
        if reason is None and part.bias is None and name in _BIASED:
            reason = f"{name} has no bias"
        if reason is not None:
            return reason
    return None


def _is_op(module: nn.Module) -> bool:
    """Whether the linear layers of an operation are there, in sizes that fit together."""
    linears = [getattr(module, name, None) for name in _OP_LINEARS]
    if not all(hasattr(linear, "in_features") for linear in linears):
        return False
    compress, generate, out = linears
    tokens = max(isqrt(generate.out_features), 1)
    reduced, rest = divmod(generate.in_features, tokens)
    return (
        tokens**2 == generate.out_features
        and rest == 0 < reduced
        and compress.out_features % reduced == 0
        and compress.in_features == out.in_features == out.out_features
        and out.in_features % (compress.out_features // reduced) == 0
    )


def _is_block(module: nn.Module) -> bool:
    linears = [getattr(module, name, None) for name in _BLOCK_LINEARS]
    reweight = getattr(module, "reweight", None)
    if not all(hasattr(linear, "in_features") for linear in linears) or not isinstance(reweight, nn.Module):
        return False
    ops = [getattr(module, name, None) for name in ("mix_h", "mix_w")]
    return all(isinstance(op, nn.Module) and _is_op(op) for op in ops) and len({op.out.in_features for op in ops}) == 1


@dataclass(frozen=True)
class StructuralRule:
    """As `DropInRule`, for modules of any class with a certain structure.

    found is the package's layer for them, and parameters are the names of all the parameters that it has.
    """

    found: type[_Found]
    looks_like: Callable[[nn.Module], bool]
    parameters: frozenset[str]
    absorbs: tuple[str, ...] = ()
    op: str = "dynamic_mixing"

    def plan(self, module: nn.Module) -> Plan | None:
        kind = type(module).__name__
        if isinstance(module, self.found):
            return Plan(kind, self.found.why_not_fused(module), lambda: None, self._absorbed(module))
        own = isinstance(module, (layers.DynaMixerOp, layers.DynaMixerBlock, torch.jit.ScriptModule))
        if own or not self.looks_like(module):
            return None
        remember_forwards(*(type(part) for part in self._absorbed(module)))
        reason = (
            with_forward_on_instance(module)
            or why_not_watched()
            or self.found.why_not(module)
            or self._why_not_state(module)
            or self._why_not_results(module)
        )
        return Plan(kind, reason, lambda: self._replace(module), self._absorbed(module))

    def _absorbed(self, module: nn.Module) -> tuple[nn.Module, ...]:
        return tuple(module.get_submodule(name) for name in self.absorbs)

    def _replace(self, module: nn.Module) -> None:
        for part in self._absorbed(module):
            OP._replace(part)
        if not isinstance(module, self.found):
            module.__class__ = fused_class(self.found, type(module), None)

    def _why_not_state(self, module: nn.Module) -> str | None:
        names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
        if names != self.parameters:
            return f"it has other parameters than the official code's: {', '.join(sorted(names ^ self.parameters))}"
        return None

    def _why_not_results(self, module: nn.Module) -> str | None:
        """Compares both forward passes in float64, for parameters and tokens drawn at random."""
        drawn = Draws()
        try:
            plain = with_drawn_parameters(module, drawn)
            fused = copy.deepcopy(plain)
            self._replace(fused)
            x = drawn(2, *fused.sizes)
            with torch.no_grad(), dispatch.backend("reference"):
                expected, got = type(plain).forward(plain, x), self.found.layer._fused(fused, x)
        except Exception as error:  # noqa: BLE001  (whatever a module of somebody else's raises, it is left alone)
            return failed(error)
        return None if same(got, expected) else "its forward does not compute what the official code's does"


def _why_not_dropout(module: nn.Module, path: str = "") -> str | None:
    for name, part in module._modules.items():  # named_modules() takes three times as long
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            return f"{path}{name}: {dropout(part)}, which the fused form does not have"
        reason = _why_not_dropout(part, f"{path}{name}.") if part is not None and part._modules else None
        if reason is not None:
            return reason
    return None


def _names(*linears: str) -> frozenset[str]:
    return frozenset(f"{name}.{kind}" for name in linears for kind in ("weight", "bias"))


_OPS = tuple(f"{op}.{name}" for op in ("mix_h", "mix_w") for name in _OP_LINEARS)
OP = StructuralRule(_FoundOp, _is_op, _names(*_OP_LINEARS))
BLOCK = StructuralRule(
    _FoundBlock,
    _is_block,
    _names(*_OPS, "reweight.fc1", "reweight.fc2", "proj") | {"mlp_c.weight"},
    absorbs=("mix_h", "mix_w"),
)
RULES = (BLOCK, OP)
