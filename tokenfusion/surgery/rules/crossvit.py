"""timm's CrossViT."""

from tokenfusion.layers.crossvit import CrossAttentionBlock, MultiScaleBlock
from tokenfusion.surgery.rules.rule import DropInRule

RULES = (
    DropInRule("single_query_attention", CrossAttentionBlock),
    DropInRule("single_query_attention", MultiScaleBlock),
)
