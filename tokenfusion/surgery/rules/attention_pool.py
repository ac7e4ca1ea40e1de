"""Attention pooling in timm: by learned queries, and of feature maps."""

from timm.layers import attention_pool, attention_pool2d
from torch import nn

from tokenfusion.layers.attention_pool import AttentionPoolLatent
from tokenfusion.layers.attention_pool2d import AttentionPool2d, drops_positions
from tokenfusion.surgery.rules import checks
from tokenfusion.surgery.rules.rule import Rule


def _why_not_latent(pool: nn.Module) -> str | None:
    reason = checks.why_not_type(pool, nn.Linear, "kv") or checks.why_not_bypass(pool, "q", "q_norm", "kv", "k_norm")
    if reason is not None:
        return reason
    if type(pool.k_norm) is not nn.Identity:
        return f"k_norm is {type(pool.k_norm).__name__}: each key is normalised after its projection"
    queries, channels = pool.num_heads * pool.latent_len, pool.kv.in_features
    if queries >= channels / 2:  # measured in bfloat16, where matrix products are fastest
        return f"latent: {queries} queries (heads x latents) of {channels} channels; projecting the tokens costs less"
    return None


def _why_not_2d(pool: nn.Module) -> str | None:
    if pool.pool_type != "token":
        return f"pool_type is {pool.pool_type!r}: every position is a query"
    if drops_positions(pool):
        return f"drop: dropout {pool.drop.p:g} in training draws its random numbers for every position"
    projections = ("q", "k", "v") if pool.qkv is None else ("qkv",)
    return checks.why_not_type(pool, nn.Linear, *projections) or checks.why_not_bypass(
        pool, *projections, "drop", "proj"
    )


def _why_not_rotary(pool: nn.Module) -> str:
    return "pos_embed is rotary: each key is rotated after its projection"


RULES = (
    Rule("single_query_attention", attention_pool.AttentionPoolLatent, AttentionPoolLatent, _why_not_latent),
    Rule("single_query_attention", attention_pool2d.AttentionPool2d, AttentionPool2d, _why_not_2d),
    Rule("single_query_attention", attention_pool2d.RotAttentionPool2d, None, _why_not_rotary),
)
