"""Class attention in timm's CaiT, XCiT and VOLO: by itself, and in the blocks that normalise its tokens."""

from functools import partial

from timm.models import cait, volo
from torch import nn

from tokenfusion.layers.cait import ClassAttn, LayerScaleBlockClassAttn
from tokenfusion.layers.volo import ClassAttention, ClassBlock
from tokenfusion.surgery.rules import checks
from tokenfusion.surgery.rules.rule import Rule


def _why_not_attention(attn: nn.Module, projections: tuple[str, ...]) -> str | None:
    return (
        checks.why_not_type(attn, nn.Linear, *projections)
        or checks.why_not_attention_dropout(attn)
        or checks.why_not_bypass(attn, *projections)
    )


def _why_not_block(block: nn.Module, attention: Rule) -> str | None:
    if not attention.matches(block.attn):
        return checks.why_not_type(block, attention.original, "attn")
    return (
        checks.why_not_norm(block, "norm1")
        or checks.within("attn", attention.why_not(block.attn))
        or checks.why_not_bypass(block, "norm1", "attn")
    )


def _pair(attention: tuple[type, type], block: tuple[type, type], projections: tuple[str, ...]) -> tuple[Rule, Rule]:
    op = "single_query_attention"
    alone = Rule(op, *attention, partial(_why_not_attention, projections=projections))
    return alone, Rule(op, *block, partial(_why_not_block, attention=alone), absorbs=("attn",))


RULES = (
    *_pair(
        (cait.ClassAttn, ClassAttn),  # XCiT's, too
        (cait.LayerScaleBlockClassAttn, LayerScaleBlockClassAttn),
        projections=("q", "k", "v"),
    ),
    *_pair((volo.ClassAttention, ClassAttention), (volo.ClassBlock, ClassBlock), projections=("q", "kv")),
)
