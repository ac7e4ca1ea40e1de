"""torch's own attention, wherever it has few queries and many tokens."""

from tokenfusion.layers.multihead_attention import MultiheadAttention
from tokenfusion.surgery.rules.rule import DropInRule

_NOTE = "decided per call: few queries over one tensor of keys and values"

RULES = (DropInRule("single_query_attention", MultiheadAttention, note=_NOTE),)
