"""Class attention in timm's CaiT, XCiT and VOLO: by itself, and in the blocks that normalise its tokens."""

from tokenfusion.layers.cait import ClassAttn, LayerScaleBlockClassAttn
from tokenfusion.layers.volo import ClassAttention, ClassBlock
from tokenfusion.surgery.rules.rule import DropInRule

RULES = (
    DropInRule("single_query_attention", ClassAttn),  # XCiT's, too
    DropInRule("single_query_attention", LayerScaleBlockClassAttn, absorbs=("attn",)),
    DropInRule("single_query_attention", ClassAttention),
    DropInRule("single_query_attention", ClassBlock, absorbs=("attn",)),
)
