"""Attention of few queries in a class of somebody else's, described by the names of its parts."""

import functools
import inspect
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn

from tokenfusion.layers import multihead_attention
from tokenfusion.layers.drop_in import (
    PLAIN,
    STATE,
    remember_forwards,
    renamed,
    why_not_linear,
    why_not_norm,
    why_not_parameters,
    why_not_part,
)
from tokenfusion.layers.found import Found
from tokenfusion.layers.single_query_attention import (
    Projection,
    absorbed_attention,
    attention_with_weights,
    split_class_token,
    split_linear,
)
from tokenfusion.layers.watched import (
    UsedParts,
    Watched,
    attribute,
    remember,
    watch_all,
    why_not_all_as_before,
    why_not_modes,
)

FEWEST = 5  # tokens that a class is tried with; with fewer, it may do something else, such as return the only one


@dataclass(frozen=True)
class Parts:
    """What the parts of an attention are called in a class; a name may be a path, such as "pooler.to_k".

    key and value are linear layers; of the same name, they are one whose rows are the keys' and then the values'.
    Without a key, queries are compared with the tokens themselves, and each has a head of the value.
    """

    heads: str | int = 1
    key: str | None = None
    value: str | None = None
    query: str | None = None
    latent: str | None = None
    out: str | None = None
    norm: str | None = None
    dropout: str | None = None
    mix_pre_attn: str | None = None  # parameters [heads, heads] of talking heads
    mix_post_attn: str | None = None
    tokens: str | None = None  # the argument, where it is an optional one
    flag: str | None = None  # the optional argument that says whether the query is a token, too
    depends_on: tuple[str, ...] = ()  # attributes of what is neither a module nor a number


class Form(NamedTuple):
    """What was found out about a class with such parts."""

    scale: str | None  # "scale", the attribute; "heads", one over the square root of their channels; or none
    normed: str  # "tokens", "query" or "both"
    pooled: str | None  # "mean" of the queries, or "flat", side by side
    pair: bool  # whether None follows, in the place of weights
    extra: bool  # whether the query is a token, too, where no argument says so
    in_training: bool  # whether all of it holds in training, too
    in_float64: bool  # and to the rounding of float64
    in_autocast: bool  # and under autocast
    modes: tuple[str, ...]  # the parts for which it counts whether they are in training


class Arguments(NamedTuple):
    """What a forward takes: the names of its tensors, the name of a flag, and the defaults of the rest."""

    tensors: tuple[str, ...]
    flag: str | None
    defaults: dict[str, object]


class Call(NamedTuple):
    """query: [B, L, D] or None where queries are learned; extra: whether it is a token besides [B, N, C]."""

    query: torch.Tensor | None
    tokens: torch.Tensor
    extra: bool


class FewQueries(Found):
    """A module of such a class. What is no call of few queries over many tokens runs the class's own forward.

    details are its Parts and Form. Each call looks at the parts that are read past and at all that the module holds,
    which must be what it was when the module was tried.
    """

    arguments: ClassVar[Arguments]

    @classmethod
    def stand_in_for(cls, original: type[nn.Module]) -> None:
        cls.forward = functools.update_wrapper(renamed(FewQueries.forward, "forward"), original.forward)
        super().stand_in_for(original)  # with a forward that has the original's signature, at which exporters look
        cls.arguments = arguments_of(original, cls.details[0])

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if STATE in vars(self):
            remember(*self._fused_state)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        parts, form = cls.details
        if module.training and not form.in_training:
            return "in training its forward is another one"
        reason = why_not_parts(module, parts) or why_not_modes(module, form.modes)
        if reason is not None or not isinstance(module, cls):
            return reason
        state = getattr(module, STATE, None)
        return "it was not tried" if state is None else why_not_all_as_before(module, state)

    def __prepare_scriptable__(self):
        kind = type(self).__name__
        raise RuntimeError(f"TorchScript cannot compile {kind} while it is fused; call tokenfusion.unfuse(model) first")

    def forward(self, *args, **kwargs):
        cls = type(self)
        parts, form = cls.details
        call = call_of(cls.arguments, parts, form.extra, args, kwargs)
        if call is None or not self.fuses(call.tokens, kept=True) or not _serves(self, parts, form, call):
            return cls.original.forward(self, *args, **kwargs)
        return finished(self, parts, form, attended(self, parts, form, call))


def become(module: nn.Module, fused: type[FewQueries]) -> None:
    """Makes a module one of its fused class, as it is now."""
    if isinstance(module, fused):
        return
    vars(module)[STATE] = state_of(module, fused.details[0])
    module.__class__ = fused


def part(module: nn.Module, path: str | None):
    """None where there is no such part."""
    return None if path is None else attribute(module, path)


def arguments_of(kind: type[nn.Module], parts: Parts) -> Arguments:
    """
    Raises:
        ValueError: what its forward takes does not tell which tensor is which.
    """
    _, *parameters = inspect.signature(kind.forward).parameters.values()
    named = {each.name: each.default for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}
    tensors = [name for name, default in named.items() if default is inspect.Parameter.empty or name == parts.tokens]
    expected = (1,) if parts.latent is not None else (1, 2, 3)
    if len(tensors) not in expected:
        raise ValueError(f"its forward takes {len(tensors)} arguments ({', '.join(tensors)})")
    defaults = {name: default for name, default in named.items() if name not in tensors}
    flag = parts.flag if parts.flag in defaults else None
    return Arguments(tuple(tensors), flag, defaults)


def call_of(arguments: Arguments, parts: Parts, extra: bool, args: tuple, kwargs: dict) -> Call | None:
    """None for a call with more than the tensors, or with others."""
    names = (*arguments.tensors, *arguments.defaults)
    given = dict(zip(names, args), **kwargs)
    if len(given) < len(args) + len(kwargs):  # too many, or one of them twice
        return None
    tensors = [given.pop(name, None) for name in arguments.tensors]
    if any(type(tensor) not in PLAIN or tensor.is_nested or tensor.dim() != 3 for tensor in tensors):
        return None
    if arguments.flag is not None:
        extra = bool(given.pop(arguments.flag, arguments.defaults[arguments.flag]))
    if any(name not in arguments.defaults or value is not arguments.defaults[name] for name, value in given.items()):
        return None
    if parts.latent is not None:
        return Call(None, tensors[0], False)
    if len(tensors) == 1:
        return Call(*split_class_token(tensors[0]), True) if tensors[0].shape[1] > 1 else None
    query, tokens, *values = tensors
    if query is tokens or any(value is not tokens for value in values) or (extra and query.shape[1] != 1):
        return None
    return Call(query, tokens, extra)


def attended(module: nn.Module, parts: Parts, form: Form, call: Call) -> torch.Tensor:
    """[B, L, D], the heads' outputs side by side."""
    norm, query, tokens = part(module, parts.norm), call.query, call.tokens
    if parts.latent is not None:
        query = part(module, parts.latent)
        query = query.view(1, -1, query.shape[-1])
    extra = query if call.extra else None
    if form.normed != "tokens":
        query = norm(query)
    if form.normed == "query":
        norm, extra = None, query if call.extra else None
    if isinstance(norm, nn.BatchNorm1d):
        norm, tokens = None, norm(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    key, value = _projections(module, parts)
    if parts.query is not None:
        query = part(module, parts.query)(query)
    heads = _heads(module, parts, query)
    scale = _scale(module, form, query.shape[-1] // (1 if key is None else heads))
    operands = (query, tokens, None if extra is None else extra.squeeze(1), norm, key, value)
    options = {name: part(module, getattr(parts, name)) for name in ("mix_pre_attn", "mix_post_attn")}
    options |= {"num_heads": heads, "scale": scale}
    dropout = part(module, parts.dropout)
    if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
        return attention_with_weights(*operands, **options, dropout=dropout.p)[0]
    return absorbed_attention(*operands, **options)


def finished(module: nn.Module, parts: Parts, form: Form, out: torch.Tensor):
    """What the class makes of the result [B, L, D]."""
    if form.pooled == "mean":
        out = out.mean(dim=1)
    elif form.pooled == "flat":
        out = out.flatten(1)
    if parts.out is not None:
        out = part(module, parts.out)(out)
    return (out, None) if form.pair else out


def why_not_parts(module: nn.Module, parts: Parts) -> str | None:
    """Why the parts may not be read past, or are not there."""
    for name in dict.fromkeys((parts.key, parts.value)):
        reason = None if name is None else why_not_linear(part(module, name), name)
        if reason is not None:
            return reason
    for name in filter(None, (parts.latent, parts.mix_pre_attn, parts.mix_post_attn)):
        if type(part(module, name)) not in PLAIN:
            return f"{name} is of class {type(part(module, name)).__name__}"
    reason = None
    if parts.latent is not None and parts.query is not None:  # projected once, and not for each image
        reason = why_not_linear(part(module, parts.query), parts.query)
    elif parts.query is not None:
        reason = why_not_parameters(part(module, parts.query), parts.query)
    return reason or _why_not_norm(module, parts.norm) or _why_not_dropout(module, parts.dropout)


def _why_not_norm(module: nn.Module, name: str | None) -> str | None:
    norm = part(module, name)
    if type(norm) is nn.BatchNorm1d:
        return why_not_part(norm, name, nn.BatchNorm1d)
    return None if name is None else why_not_norm(norm, name)


def _why_not_dropout(module: nn.Module, name: str | None) -> str | None:
    return None if name is None else why_not_part(part(module, name), name, nn.Dropout, nn.Identity)


def state_of(module: nn.Module, parts: Parts) -> tuple[Watched, ...]:
    """Of the module and its parts, but those that are called, and dropout, whose rate may be any."""
    used = used_parts(module, parts)
    return watch_all(module, (*used.called, *filter(None, [used.dropout])), *parts.depends_on)


def used_parts(module: nn.Module, parts: Parts) -> UsedParts:
    normed = type(part(module, parts.norm)) is nn.BatchNorm1d
    called = (parts.query if parts.latent is None else None, parts.norm if normed else None, parts.out)
    read = (parts.key, parts.value, parts.norm, parts.dropout)
    return UsedParts(tuple(filter(None, called)), tuple(filter(None, read)), parts.dropout)


def _serves(module: nn.Module, parts: Parts, form: Form, call: Call) -> bool:
    """Whether the fused form is for tensors of this kind and size; others are the class's own business."""
    query = part(module, parts.latent) if call.query is None else call.query
    batch, count, channels = call.tokens.shape
    if call.tokens.is_meta or query.dtype != call.tokens.dtype or call.tokens.numel() == 0 or query.numel() == 0:
        return False
    if count < FEWEST or (query.dtype == torch.float64 and not form.in_float64):
        return False
    if call.query is not None and (len(query) != batch or (call.extra and query.shape[-1] != channels)):
        return False
    if any(width != channels for width in _widths(module, parts)):
        return False
    if torch.is_autocast_enabled(call.tokens.device.type):
        if not form.in_autocast:
            return False
    elif any(weight.dtype != call.tokens.dtype for weight in _weights_read(module, parts)):
        return False
    rows = query.numel() // query.shape[-1] // (1 if call.query is None else batch)
    rows *= 1 if parts.key is None else _heads(module, parts, query)
    return rows < channels / 2 and call.tokens.numel() * channels >= multihead_attention._LEAST_WORTHWHILE


def _widths(module: nn.Module, parts: Parts) -> list[int]:
    """How many channels the tokens have to have."""
    linears = [part(module, name).in_features for name in (parts.key, parts.value) if name is not None]
    norm, latent = part(module, parts.norm), part(module, parts.latent)
    norms = list(norm.normalized_shape) if type(norm) is nn.LayerNorm else []
    compared = [latent.shape[-1]] if latent is not None and parts.key is None and parts.query is None else []
    return linears + norms + compared


def _weights_read(module: nn.Module, parts: Parts) -> list[torch.Tensor]:
    """The parameters of linear layers and of a LayerNorm."""
    read = [part(module, name) for name in (parts.key, parts.value, parts.norm) if name is not None]
    held = [each._parameters.values() for each in read if type(each) is not nn.BatchNorm1d]
    return [weight for weights in held for weight in weights if weight is not None]


def _projections(module: nn.Module, parts: Parts) -> tuple[nn.Linear | Projection | None, ...]:
    if parts.key is not None and parts.key == parts.value:
        return split_linear(part(module, parts.key), 2)
    return part(module, parts.key), part(module, parts.value)


def _heads(module: nn.Module, parts: Parts, query: torch.Tensor) -> int:
    if parts.key is None:
        return 1 if parts.value is None else query.shape[1]
    return parts.heads if isinstance(parts.heads, int) else part(module, parts.heads)


def _scale(module: nn.Module, form: Form, head_dim: int) -> float:
    if form.scale is None:
        return 1.0
    return module.scale if form.scale == "scale" else head_dim**-0.5


remember_forwards(nn.BatchNorm1d)
