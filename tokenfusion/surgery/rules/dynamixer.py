"""The DynaMixer block and operation of the official code, and of code like it, in whatever module they are defined.

They are recognised by the names and shapes of their parameters. That a module of this structure also computes what the
paper says is tried out before it is replaced.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
from torch import nn

from tokenfusion import layers
from tokenfusion.layers.drop_in import dropout, remember_forwards, restore, why_not_part, why_not_surroundings, within
from tokenfusion.layers.found import fused_class, why_not_names
from tokenfusion.layers.found_dynamixer import (
    OPS,
    Details,
    FoundBlock,
    FoundDynaMixer,
    FoundOp,
    become,
    why_not_parts,
)
from tokenfusion.layers.watched import kinds_of_numbers, watch_all, why_not_all_as_before
from tokenfusion.surgery.rules.rule import Plan, with_forward_on_instance
from tokenfusion.surgery.rules.trial import (
    Draws,
    Trial,
    agree_in_its_place,
    failed,
    found_out,
    same,
    with_drawn_parameters,
    without_a_trace,
)

_OTHER = "its forward does not compute what the official code's does"
_OP_LINEARS = FoundOp._kind.linears
_BLOCK_LINEARS = FoundBlock._kind.linears
_MANY = 67  # images, of which a reweighting gets a few at a time
_tried: dict[tuple, Details | str] = {}


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
    ops = [getattr(module, name, None) for name in OPS]
    return all(isinstance(op, nn.Module) and _is_op(op) for op in ops) and len({op.out.in_features for op in ops}) == 1


@dataclass(frozen=True)
class StructuralRule:
    """As `DropInRule`, for modules of any class with a certain structure.

    found is the fused form of them, parameters are the names of all the parameters that it has, and absorbs the names
    of parts that are to be of such a structure, too.
    """

    found: type[FoundDynaMixer]
    looks_like: Callable[[nn.Module], bool]
    parameters: frozenset[str]
    absorbs: "tuple[tuple[str, StructuralRule], ...]" = ()
    op: str = "dynamic_mixing"

    def plan(self, module: nn.Module) -> Plan | None:
        own = isinstance(module, (layers.DynaMixerOp, layers.DynaMixerBlock, torch.jit.ScriptModule))
        if own or not (isinstance(module, self.found) or self.looks_like(module)):
            return None
        kind, parts = type(module), tuple(module._modules.get(name) for name, _ in self.absorbs)
        if isinstance(module, self.found):
            return Plan(kind.__name__, kind.why_not_fused(module), lambda: None, parts)
        plans = {name: rule.plan(module._modules[name]) for name, rule in self.absorbs}
        found = (
            with_forward_on_instance(module)
            or why_not_names(module, self.found)
            or why_not_surroundings()
            or self._why_not_absorbed(module, plans)
            or why_not_parts(module, self.found._kind)
            or _why_not_dropout(module)
            or self._why_not_state(module)
            or self._details(module)
        )
        if isinstance(found, str):
            return Plan(kind.__name__, found)

        def apply() -> None:
            for plan in plans.values():
                plan.apply()
            become(module, fused_class(self.found, kind, found))

        return Plan(kind.__name__, None, apply, parts)

    def _why_not_absorbed(self, module: nn.Module, plans: dict[str, Plan]) -> str | None:
        for name, rule in self.absorbs:
            part = module._modules[name]
            remember_forwards(type(part))
            reason = why_not_part(part, name, type(part)) or within(name, why_not_parts(part, rule.found._kind))
            if reason is None and plans[name].reason is not None:
                reason = f"{name}: {plans[name].reason}"
            if reason is not None:
                return reason
        return None

    def _why_not_state(self, module: nn.Module) -> str | None:
        names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
        if names != self.parameters:
            return f"it has other parameters than the official code's: {', '.join(sorted(names ^ self.parameters))}"
        return None

    def _details(self, module: nn.Module) -> Details | str:
        """What a trial shows, or why the module is not to be replaced; tried once for what it holds and its sizes."""
        try:
            state = watch_all(module)
            what = (self.found, type(module).forward, state, kinds_of_numbers(state))
            found = _tried.get(what)
            if found is None:
                with without_a_trace():
                    found = self._tried_details(module)
            if why_not_all_as_before(module, state) is None:  # else it would keep alive what the module holds
                _tried[what] = found
            return why_not_all_as_before(module, watch_all(module, self.found._kind.used.names)) or found
        except Exception as error:  # noqa: BLE001  (whatever a module of somebody else's raises, it is left alone)
            return failed(error)

    def _tried_details(self, module: nn.Module) -> Details | str:
        arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
        if arguments != ("x",):
            raise TypeError(f"its forward takes {', '.join(arguments)}, expected x alone")
        kind, drawn = self.found._kind, Draws()
        plain = with_drawn_parameters(module, drawn)
        for name, _ in self.absorbs:
            if isinstance(plain._modules[name], FoundOp):
                restore(plain._modules[name])
        trials = [Trial(plain, (drawn(batch, *kind.sizes(plain)),), kind.used) for batch in (2, 1)]
        agreement = found_out(trials, kind.fused)
        if agreement is None:
            return _OTHER
        in_pieces = self.found is FoundBlock and _works_in_pieces(plain.reweight, drawn(_MANY, plain.proj.in_features))
        details = Details(agreement, in_pieces)
        return details if agree_in_its_place(trials, fused_class(self.found, type(module), details)) else _OTHER


def _works_in_pieces(reweight: nn.Module, x: torch.Tensor) -> bool:
    before = watch_all(reweight)
    with torch.no_grad():
        whole = reweight(x)
        pieces = [torch.cat([reweight(piece) for piece in x.split(images)]) for images in (7, 1)]
    unchanged = why_not_all_as_before(reweight, before) is None
    return unchanged and all(each.shape == whole.shape and same(each, whole) for each in pieces)


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


OP = StructuralRule(FoundOp, _is_op, _names(*_OP_LINEARS))
BLOCK = StructuralRule(
    FoundBlock,
    _is_block,
    _names(*(f"{op}.{name}" for op in OPS for name in _OP_LINEARS), "reweight.fc1", "reweight.fc2", "proj")
    | {"mlp_c.weight"},
    absorbs=tuple((name, OP) for name in OPS),
)
RULES = (BLOCK, OP)
