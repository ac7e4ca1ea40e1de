"""Many attentive probes over the same tokens, such as one for each learning rate and weight decay."""

from collections.abc import Iterable

import torch
from torch import nn

from tokenfusion.layers.drop_in import why_not_linear, why_not_part
from tokenfusion.layers.own_layer import OwnLayer
from tokenfusion.layers.single_query_attention import SingleQueryAttention, attend_together


class ProbeGrid(OwnLayer, nn.Module):
    """Attentive probes that read the same tokens, and read them together.

    A probe is a SingleQueryAttention with learned queries, or an nn.Sequential that begins with one:

        grid = ProbeGrid(
            nn.Sequential(SingleQueryAttention(1024, 16, num_latents=1), nn.Flatten(), nn.Linear(1024, 1000))
            for _ in range(30)
        )
        loss = sum(F.cross_entropy(scores, labels) for scores in grid(tokens))

    They are ordinary modules in the list `probes`, each with parameters, a state_dict, hooks and an optimizer of its
    own, and any of them can be taken out and used alone. The results are those of calling one after the other, up to
    rounding. The queries of all go to the kernel together, and what follows the attention is called as it is. Where
    that is not valid, because attention weights are dropped in training, a part of a probe was changed, or the probes
    differ in their dtype or in the norm of their tokens, each is called by itself.

    Args:
        probes: one or more, of any numbers of heads and of queries.

    Raises:
        TypeError: a probe that does not begin with a SingleQueryAttention.
        ValueError: no probe, one without learned queries, or probes of different dim.
    """

    def __init__(self, probes: Iterable[nn.Module]):
        super().__init__()
        self.probes = nn.ModuleList(probes)
        if not self.probes:
            raise ValueError("probes: got none, expected at least one")
        attentions = [_attention(probe) for probe in self.probes]
        for i, attention in enumerate(attentions):
            if not isinstance(attention, SingleQueryAttention):
                expected = "SingleQueryAttention, or an nn.Sequential that begins with one"
                raise TypeError(f"probes: number {i} is {type(self.probes[i]).__name__}, expected {expected}")
            if attention.latent is None:
                raise ValueError(f"probes: number {i} has num_latents = 0, expected learned queries")
        dims = {attention.proj.out_features for attention in attentions}
        if len(dims) > 1:
            raise ValueError(f"probes: got dim {sorted(dims)}, expected the same for all")

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """The probes are not called, but the parts of each."""
        for i, probe in enumerate(module.probes):
            reason = _why_not_probe(probe, _attention(module.probes[0]))
            if reason is not None:
                return f"probes.{i}: {reason}"
        return None

    def plain_forward(self, tokens: torch.Tensor):
        return [probe(tokens) for probe in self.probes]

    def forward(self, tokens: torch.Tensor):
        """
        Args:
            tokens: [B, N, dim], as SingleQueryAttention takes them.

        Returns:
            A list with the result of each probe.

        Raises:
            What the probes raise.
        """
        if torch.jit.is_scripting():
            return self.plain_forward(tokens)
        if not self.fuses(tokens) or tokens.is_nested:
            return self.plain_forward(tokens)
        found = attend_together([_attention(probe) for probe in self.probes], tokens)
        return [_rest(probe, out) for probe, out in zip(self.probes, found, strict=True)]


def _attention(probe: nn.Module) -> nn.Module | None:
    return next(iter(probe), None) if isinstance(probe, nn.Sequential) else probe


def _rest(probe: nn.Module, out: torch.Tensor) -> torch.Tensor:
    """What a probe makes of its attention's result."""
    for part in list(probe)[1:] if isinstance(probe, nn.Sequential) else ():
        out = part(out)
    return out


def _why_not_probe(probe: nn.Module, first: nn.Module | None) -> str | None:
    """Why a probe has to be called; first: the attention of the first one, with which its own is to run."""
    attention = _attention(probe)
    reason = None if probe is attention else why_not_part(probe, "it", nn.Sequential)
    reason = reason or why_not_part(attention, "its attention", SingleQueryAttention)
    if reason is not None:
        return reason
    if attention.dropout > 0 and attention.training:
        return "dropout in training needs the attention weights"
    if attention.latent is None:
        return "its attention has no learned queries"
    if attention.latent.dim() != 3 or len(attention.latent) != 1:
        return f"its learned queries are {list(attention.latent.shape)}, expected [1, L, dim]"
    if type(first) is not SingleQueryAttention or _kind(attention) != _kind(first):
        return "its dtype, or the norm of its tokens, is not that of probes.0"
    dim = attention.latent.shape[-1]
    return why_not_linear(attention._modules.get("q"), "q", dim, dim) or attention.why_not_fused(attention)


def _kind(attention: SingleQueryAttention) -> tuple:
    """What all have in common that share the kernel."""
    dtype = None if attention.latent is None else attention.latent.dtype
    return dtype, None if attention.norm is None else attention.norm.eps
