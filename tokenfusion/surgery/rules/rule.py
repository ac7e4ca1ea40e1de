"""What a rule is: it says in one answer whether a module is its own, and what is to become of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from tokenfusion.layers.drop_in import DropIn

DECIDED_PER_CALL = "decided per call: few queries over one tensor of keys and values"


@dataclass(frozen=True)
class Plan:
    """What a rule means to do with a module of a kind that it knows.

    apply does it; None where the module is left alone, for the reason given. absorbs are the children whose work is
    then done by the module itself, so that they need no replacement of their own. note goes into the report.
    """

    kind: str
    reason: str | None
    apply: Callable[[], Any] | None = None
    absorbs: tuple[nn.Module, ...] = ()
    note: str = ""


class Rule(Protocol):
    op: str

    def plan(self, module: nn.Module) -> Plan | None:
        """None where the module is of no kind that the rule knows."""


def first_plan(rules: tuple[Rule, ...], module: nn.Module) -> tuple[Rule, Plan] | None:
    """The rule whose module it is, and what it plans."""
    for rule in rules:
        plan = rule.plan(module)
        if plan is not None:
            reason = plan.reason or _why_not_prepared(module)
            return rule, plan if reason is None else Plan(plan.kind, reason)
    return None


def _why_not_prepared(module: nn.Module) -> str | None:
    """torch.ao.quantization writes into each module what it means to do with it, and then goes by the exact class."""
    prepared = any(getattr(part, "qconfig", None) is not None for part in module.modules())
    return "it is prepared for quantisation, which would not find a fused module" if prepared else None


def with_forward_on_instance(module: nn.Module) -> str | None:
    return "its forward was set on the instance" if "forward" in vars(module) else None


@dataclass(frozen=True)
class DropInRule:
    """Modules of exactly the class that `fused` stands in for: a subclass may have changed what its forward means.

    absorbs names children, and both it and note are as in `Plan`.
    """

    op: str
    fused: type[DropIn]
    absorbs: tuple[str, ...] = ()
    note: str = ""

    def plan(self, module: nn.Module) -> Plan | None:
        if type(module) not in (self.fused.original, self.fused):
            return None
        reason = with_forward_on_instance(module) or self.fused.why_not_fused(module)
        if reason is not None:
            return Plan(type(module).__name__, reason)
        absorbs = tuple(module.get_submodule(name) for name in self.absorbs)
        return Plan(type(module).__name__, None, lambda: setattr(module, "__class__", self.fused), absorbs, self.note)
