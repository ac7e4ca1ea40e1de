"""Which modules of other libraries `fuse` can replace, by what, and when not. A file a family."""

import functools

from tokenfusion.surgery.rules.rule import Rule


@functools.cache
def rules() -> tuple[Rule, ...]:
    # timm takes seconds to import
    from tokenfusion.surgery.rules import (
        attention_pool,
        class_attention,
        crossvit,
        dynamixer,
        few_queries,
        multihead_attention,
        upconv,
    )

    families = (crossvit, class_attention, attention_pool, multihead_attention, dynamixer, upconv, few_queries)
    return tuple(rule for family in families for rule in family.RULES)
