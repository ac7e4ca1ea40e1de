"""timm's CrossViT."""

from timm.models import crossvit
from torch import nn

from tokenfusion.layers.crossvit import CrossAttentionBlock, MultiScaleBlock
from tokenfusion.surgery.rules import checks
from tokenfusion.surgery.rules.rule import Rule


def _why_not_cross_attention(block: nn.Module) -> str | None:
    return (
        checks.why_not_type(block, crossvit.CrossAttention, "attn")
        or checks.why_not_norm(block, "norm1")
        or checks.why_not_type(block, nn.Linear, "attn.wq", "attn.wk", "attn.wv")
        or checks.within("attn", checks.why_not_attention_dropout(block.attn))
        or checks.why_not_bypass(block, "norm1", "attn", "attn.wk", "attn.wv")
    )


def _why_not_multi_scale(block: nn.Module) -> str | None:
    for i, fusion in enumerate(block.fusion):
        first = fusion[0] if isinstance(fusion, nn.Sequential) else fusion
        matches = _CROSS_ATTENTION.matches(first)
        reason = _why_not_cross_attention(first) if matches else "not a CrossAttentionBlock of timm"
        if reason is not None:
            return f"fusion.{i} is left alone: {reason}"
    return checks.why_not_bypass(block, *(f"fusion.{i}" for i in range(len(block.fusion))))


_CROSS_ATTENTION = Rule(
    "single_query_attention", crossvit.CrossAttentionBlock, CrossAttentionBlock, _why_not_cross_attention
)
RULES = (
    _CROSS_ATTENTION,
    Rule("single_query_attention", crossvit.MultiScaleBlock, MultiScaleBlock, _why_not_multi_scale),
)
