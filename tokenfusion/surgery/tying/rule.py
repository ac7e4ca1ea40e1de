"""What a rule of `tie_weights` is: which modules it ties, when not, and how."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from tokenfusion.layers.drop_in import remember_forwards, why_not_part
from tokenfusion.surgery.rules.rule import Plan, with_forward_on_instance


@dataclass(frozen=True)
class TyingRule:
    """Modules of one kind, named by op, with the reasons that are theirs alone. matrices are the parameters to be tied.

    tie makes the tied module, and gives each original matrix's name and relative error.
    """

    op: str
    matches: Callable[[nn.Module], bool]
    why_not: Callable[[nn.Module], str | None]
    matrices: Callable[[nn.Module], list[nn.Parameter]]
    tie: Callable[[nn.Module, str], tuple[nn.Module, list[tuple[str, float]]]]

    def plan(self, module: nn.Module) -> Plan | None:
        if not self.matches(module):
            return None
        reason = (
            with_forward_on_instance(module)
            or _why_not_untouched(module)
            or self.why_not(module)
            or _why_not_frozen(self.matrices(module))
        )
        return Plan(self.op, reason, lambda init: self.tie(module, init))


def _why_not_untouched(module: nn.Module) -> str | None:
    """Hooks and parametrizations, of it or of a part, would be lost."""
    for name, part in module.named_modules():
        remember_forwards(type(part))
        reason = why_not_part(part, name or "it", type(part))
        if reason is None and parametrize.is_parametrized(part):
            reason = f"{name or 'it'} is parametrized"
        if reason is not None:
            return reason
    return None


def _why_not_frozen(matrices: list[nn.Parameter]) -> str | None:
    if len({matrix.requires_grad for matrix in matrices}) > 1:
        return "some of its matrices are frozen and others are not"
    return None
