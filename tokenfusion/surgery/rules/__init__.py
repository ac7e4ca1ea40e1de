"""Which modules of other libraries `fuse` can replace, by what, and when not. A file a family."""

import functools

from torch import nn

from tokenfusion.surgery.rules.rule import AnyRule


@functools.cache
def rules() -> tuple[AnyRule, ...]:
    # timm takes seconds to import
    from tokenfusion.surgery.rules import attention_pool, class_attention, crossvit, dynamixer, upconv

    families = (crossvit, class_attention, attention_pool, dynamixer, upconv)
    return tuple(rule for family in families for rule in family.RULES)


def rule_for(module: nn.Module) -> AnyRule | None:
    return next((rule for rule in rules() if rule.matches(module)), None)
