"""Which modules of other libraries `fuse` can replace, by what, and when not. A file a family."""

import functools

from torch import nn

from tokenfusion.surgery.rules.rule import Rule


@functools.cache
def rules() -> tuple[Rule, ...]:
    from tokenfusion.surgery.rules import attention_pool, class_attention, crossvit  # timm takes seconds to import

    return (*crossvit.RULES, *class_attention.RULES, *attention_pool.RULES)


def rule_for(module: nn.Module) -> Rule | None:
    return next((rule for rule in rules() if rule.matches(module)), None)
