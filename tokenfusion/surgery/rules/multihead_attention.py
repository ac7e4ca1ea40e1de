"""torch's own attention, wherever it has few queries and many tokens."""

from tokenfusion.layers.multihead_attention import MultiheadAttention
from tokenfusion.surgery.rules.rule import DECIDED_PER_CALL, DropInRule

RULES = (DropInRule("single_query_attention", MultiheadAttention, note=DECIDED_PER_CALL),)
