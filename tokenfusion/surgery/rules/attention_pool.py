"""Attention pooling in timm: by learned queries, and of feature maps."""

from timm.layers.attention_pool2d import RotAttentionPool2d
from torch import nn

from tokenfusion.layers.attention_pool import AttentionPoolLatent
from tokenfusion.layers.attention_pool2d import AttentionPool2d
from tokenfusion.surgery.rules.rule import DropInRule, Plan


class RotaryRule:
    op = "single_query_attention"

    def plan(self, module: nn.Module) -> Plan | None:
        if type(module) is not RotAttentionPool2d:
            return None
        return Plan(type(module).__name__, "pos_embed is rotary: each key is rotated after its projection")


RULES = (
    DropInRule("single_query_attention", AttentionPoolLatent),
    DropInRule("single_query_attention", AttentionPool2d),
    RotaryRule(),
)
