"""What rules ask of a module's parts. Each check returns None, or a reason, which starts with the part's name."""

from torch import nn

from tokenfusion.layers.single_query_attention import drops_attention


def why_not_type(module: nn.Module, expected: type[nn.Module], *names: str) -> str | None:
    """Parts of exactly this class: a subclass, such as a quantised layer, has another forward."""
    for name in names:
        part = module.get_submodule(name)
        if type(part) is not expected:
            library = expected.__module__.partition(".")[0]
            return f"{name} is {type(part).__name__}, expected {library}'s {expected.__name__}"
    return None


def why_not_norm(module: nn.Module, name: str) -> str | None:
    norm = module.get_submodule(name)
    if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
        return f"{name} is {type(norm).__name__}, expected torch's LayerNorm over the channels"
    return None


def why_not_bypass(module: nn.Module, *names: str) -> str | None:
    """Parts that the fused forward does not call, or not with what they got before."""
    for name in names:
        part = module.get_submodule(name)
        if "forward" in vars(part):
            return f"{name} has its forward set on the instance"
        hooks = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
        if any(hooks):
            return f"{name} has hooks, which would not run as before"
    return None


def why_not_attention_dropout(attn: nn.Module) -> str | None:
    if type(attn.attn_drop) not in (nn.Dropout, nn.Identity):
        return f"attn_drop is {type(attn.attn_drop).__name__}, expected torch's Dropout"
    if drops_attention(attn):
        return f"attn_drop: dropout {attn.attn_drop.p:g} in training needs the attention weights"
    return why_not_bypass(attn, "attn_drop")


def within(name: str, reason: str | None) -> str | None:
    """The reason why a child is left alone, as one of its parent."""
    return reason and f"{name}.{reason}"
