"""Which modules of other libraries `fuse` can replace, by what, and when not."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Rule:
    """original -> fused, a subclass of it that changes the forward pass alone, so that parameters stay in place.

    why_not tells why a module of the original class is to be left alone; None when it can be replaced.
    """

    op: str
    original: type[nn.Module]
    fused: type[nn.Module]
    why_not: Callable[[nn.Module], str | None]


def _why_not_cross_attention(block: nn.Module) -> str | None:
    from timm.models.crossvit import CrossAttention

    attn = block.attn
    if type(attn) is not CrossAttention:
        return f"attn is {type(attn).__name__}, expected timm's CrossAttention"
    if type(block.norm1) is not nn.LayerNorm or len(block.norm1.normalized_shape) != 1:
        return f"norm1 is {type(block.norm1).__name__}, expected nn.LayerNorm over the channels"
    for name in ("wq", "wk", "wv"):
        if type(getattr(attn, name)) is not nn.Linear:
            return f"attn.{name} is {type(getattr(attn, name)).__name__}, expected nn.Linear"
    if block.training and attn.attn_drop.p > 0:
        return f"attention dropout {attn.attn_drop.p:g} in training needs the attention weights"
    for name, module in (("norm1", block.norm1), ("attn", attn), ("attn.wk", attn.wk), ("attn.wv", attn.wv)):
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"{name} has hooks, which would not run as before"
    return None


def _why_not_multi_scale(block: nn.Module) -> str | None:
    for i, fusion in enumerate(block.fusion):
        first = fusion[0] if isinstance(fusion, nn.Sequential) else fusion
        rule = rule_for(first)
        reason = "not a CrossAttentionBlock of timm" if rule is None else rule.why_not(first)
        if reason is not None:
            return f"fusion.{i} is left alone: {reason}"
        if fusion._forward_hooks or fusion._forward_pre_hooks or fusion._backward_hooks:
            return f"fusion.{i} has hooks, which would not run as before"
    return None


@functools.cache
def rules() -> tuple[Rule, ...]:
    from timm.models import crossvit

    from tokenfusion import layers

    op = "single_query_attention"
    return (
        Rule(op, crossvit.CrossAttentionBlock, layers.CrossAttentionBlock, _why_not_cross_attention),
        Rule(op, crossvit.MultiScaleBlock, layers.MultiScaleBlock, _why_not_multi_scale),
    )


def rule_for(module: nn.Module) -> Rule | None:
    """The rule for a module, by its exact class: a subclass may have changed what its forward means."""
    return next((rule for rule in rules() if type(module) in (rule.original, rule.fused)), None)
