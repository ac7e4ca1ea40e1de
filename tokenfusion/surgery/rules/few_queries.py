"""Attention of few queries in other people's classes: found by the names of their parameters, or as somebody says.

Names do not tell what a forward computes of such parts. That is found out by trial, in float64, before a module is
replaced.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from tokenfusion.layers import few_queries
from tokenfusion.layers.drop_in import DropIn, why_not_surroundings
from tokenfusion.layers.few_queries import FEWEST, Arguments, FewQueries, Form, Parts
from tokenfusion.layers.found import fused_class, why_not_names
from tokenfusion.layers.watched import kinds_of_numbers, why_not_all_as_before
from tokenfusion.surgery.rules.rule import DECIDED_PER_CALL, Plan, with_forward_on_instance
from tokenfusion.surgery.rules.trial import (
    Draws,
    Inputs,
    Trial,
    agree_in_its_place,
    failed,
    found_out,
    numbers_held,
    with_drawn_parameters,
    without_a_trace,
)

_OTHER = "its forward does not compute attention of few queries with these parts"
_HEADS = dict(heads="num_heads")
_VJEPA = Parts(**_HEADS, query="q", key="kv", value="kv")
_TORCHMIL = Parts(heads="n_heads", query="q_nn", key="kv_nn", value="kv_nn")
_VIT_PYTORCH = Parts(
    heads="heads",
    query="to_q",
    key="to_kv",
    value="to_kv",
    out="to_out",
    norm="norm",
    dropout="dropout",
    tokens="context",
    flag="kv_include_self",
)
_KNOWN = {  # by the names of the parameters, without ".weight" and ".bias", of classes such as
    # V-JEPA's CrossAttention, without and with its projection
    "q kv": _VJEPA,
    "q kv proj": replace(_VJEPA, out="proj"),
    # transformers' VJEPA2PoolerCrossAttention
    "q_proj k_proj v_proj": Parts(
        **_HEADS, query="q_proj", key="k_proj", value="v_proj", depends_on=("config._attn_implementation",)
    ),
    # transformers' Aimv2AttentionPoolingHead
    "cls_token k_proj v_proj output_proj": Parts(
        **_HEADS, latent="cls_token", key="k_proj", value="v_proj", out="output_proj"
    ),
    # AIM's AttentionPoolingClassifier
    "cls_token k v linear": Parts(**_HEADS, latent="cls_token", key="k", value="v", out="linear", norm="bn"),
    # CAPI's AttnPoolClassifier
    "query_token kv linear": Parts(**_HEADS, latent="query_token", key="kv", value="kv", out="linear"),
    # EfficientProbing
    "cls_token v": Parts(latent="cls_token", value="v"),
    # vit-pytorch's PatchMerger
    "queries norm": Parts(latent="queries", norm="norm"),
    # stable-pretraining's MultiHeadAttentiveProbe
    "attn_vectors ln fc": Parts(latent="attn_vectors", norm="ln", out="fc"),
    # torchmil's MultiheadCrossAttention, without and with its projection
    "q_nn kv_nn": _TORCHMIL,
    "q_nn kv_nn out_proj": replace(_TORCHMIL, out="out_proj"),
    # x-transformers' AttentionPool
    "queries pooler.to_q pooler.to_k pooler.to_v pooler.to_out": Parts(
        heads="pooler.heads",
        latent="queries",
        query="pooler.to_q",
        key="pooler.to_k",
        value="pooler.to_v",
        out="pooler.to_out",
    ),
    # Attention of vit-pytorch's CrossViT and XCiT
    "norm to_q to_kv to_out.0": _VIT_PYTORCH,
    # Attention of vit-pytorch's CaiT
    "norm to_q to_kv to_out.0 mix_heads_pre_attn mix_heads_post_attn": replace(
        _VIT_PYTORCH, mix_pre_attn="mix_heads_pre_attn", mix_post_attn="mix_heads_post_attn"
    ),
    # CrossAttention of IBM's CrossViT
    "wq wk wv proj": Parts(**_HEADS, query="wq", key="wk", value="wv", out="proj", dropout="attn_drop"),
    # CaiT's class attention
    "q k v proj": Parts(**_HEADS, query="q", key="k", value="v", out="proj", dropout="attn_drop"),
}
_BY_NAMES = {frozenset(names.split()): parts for names, parts in _KNOWN.items()}
_registered: dict[type[nn.Module], Parts] = {}
_tried: dict[tuple, Form | str] = {}
_MOST_VALUES = 1 << 21  # in the tokens of the trials for numbers of them
_MANY = 263  # tokens: more than what windows and thresholds are made for, and no multiple of anything


def register_rule(
    cls: type[nn.Module],
    *,
    key: str | None = None,
    value: str | None = None,
    heads: str | int = 1,
    query: str | None = None,
    latent: str | None = None,
    out: str | None = None,
    norm: str | None = None,
    dropout: str | None = None,
    example: nn.Module | None = None,
) -> None:
    """Have `fuse` replace a class of one's own that computes multi-head attention of few queries over many tokens.

    With n = norm(tokens) and softmax over the tokens, it is to compute

        out(softmax(scale * query(x) key(n)^T) value(n)),   a head on each of `heads` groups of channels

    where x is a parameter or comes with the call: forward(tokens) with `latent`; forward(query, tokens) or
    forward(query, key, value), called with one tensor for both; or forward(tokens), whose first token is the query.
    Further arguments are optional, and a call that uses them runs the class's own forward.

    Whether the scale is module.scale, one over the square root of a head's channels, or one, whether `norm` is for the
    tokens, the query or both, and whether `out` takes the queries' results one by one, their mean or all side by side,
    is found out by a trial in float64 on random numbers, with gradients and in training: `fuse` makes it for every
    module, and leaves alone what computes something else. What the module and its class hold has to stay as it was in
    the trial: where an attribute, a constant or a method has changed, or a parameter, buffer or module was added, the
    class's own forward runs. A module with buffers or with tensors in attributes is left alone, unless they belong to
    the parts that are called: `query`, `out` and a BatchNorm.

    Args:
        cls: exactly this class is replaced, no subclass.
        key, value: the names of linear layers, C -> D; the same name for one of 2 D rows, the keys' first. Names may be
            paths, such as "attn.k". Without a key, queries are compared with n itself, and each query has a group of
            the value's channels; without both, the result is made of n itself.
        heads: the name of the attribute that holds how many heads there are, or a number.
        query: the name of the linear layer of the queries; None where they are not projected.
        latent: the name of the parameter that holds learned queries, [D], [L, D] or [1, L, D].
        out: the name of the module that the result goes through.
        norm: the name of a LayerNorm, or of a BatchNorm1d, which is called.
        dropout: the name of the dropout of the weights.
        example: a module of the class, to be tried at once.

    Raises:
        TypeError: cls is no class of modules, or example is not of it.
        ValueError: the trial of the example failed; nothing is registered.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls: got {cls!r}, expected a subclass of torch.nn.Module")
    parts = Parts(heads, key, value, query, latent, out, norm, dropout)
    if example is not None:
        if type(example) is not cls:
            raise TypeError(f"example: got {type(example).__name__}, expected {cls.__name__}")
        found = _form(example, parts)
        if isinstance(found, str):
            raise ValueError(f"example: {found}")
    _registered[cls] = parts


class FewQueriesRule:
    op = "single_query_attention"

    def plan(self, module: nn.Module) -> Plan | None:
        kind = type(module)
        if isinstance(module, FewQueries):
            return _plan(module, kind)
        if isinstance(module, (DropIn, torch.jit.ScriptModule)):
            return None
        parts = _registered.get(kind) or _known_parts(module)
        if parts is None:
            return None
        found = why_not_surroundings() or _form(module, parts)  # in whose trial hooks on all modules would be called
        if isinstance(found, _Unlike) and kind not in _registered:
            return None
        reason = with_forward_on_instance(module) or (found if isinstance(found, str) else None)
        if reason is not None:
            return Plan(kind.__name__, reason)
        return _plan(module, fused_class(FewQueries, kind, (parts, found)))


def _plan(module: nn.Module, fused: type[FewQueries]) -> Plan:
    parts, _ = fused.details
    note = "" if parts.latent is not None else DECIDED_PER_CALL
    reason = fused.why_not_fused(module)
    return Plan(fused.__name__, reason, lambda: few_queries.become(module, fused), note=note)


RULES = (FewQueriesRule(),)


class _Unlike(str):
    """Why a module is none of these at all: it cannot be called like them, or gives results of other sizes."""


def _known_parts(module: nn.Module) -> Parts | None:
    if type(module).__module__.startswith("timm."):
        return None  # other rules know them, as parts of their blocks
    names = (name for name, _ in module.named_parameters())
    parts = _BY_NAMES.get(frozenset(name.removesuffix(".weight").removesuffix(".bias") for name in names))
    if parts is None:
        return None
    optional = {name: few_queries.part(module, getattr(parts, name)) for name in ("norm", "dropout")}
    absent = (name for name, part in optional.items() if type(part) is nn.Identity or not isinstance(part, nn.Module))
    return replace(parts, **dict.fromkeys(absent))


def _form(module: nn.Module, parts: Parts) -> Form | str:
    """What its class computes with these parts, or why the module is not to be replaced; tried once for its state."""
    try:
        arguments = few_queries.arguments_of(type(module), parts)
        reason = few_queries.why_not_parts(module, parts)
        if reason is not None:
            return reason
        state = few_queries.state_of(module, parts)
        sizes = tuple((name, tensor.shape) for name, tensor in module.state_dict().items())
        kinds = tuple(type(part) for part in module.modules())
        what = (type(module).forward, parts, state, kinds_of_numbers(state), kinds, sizes)
        found = _tried.get(what)
        if found is None:
            with without_a_trace():
                found = _tried_form(module, parts, arguments)
        changed = why_not_all_as_before(module, state)
        if changed is None:  # else it would be found by no other module, and keep alive what this one holds
            _tried[what] = found
        return found if isinstance(found, str) else changed or found
    except Exception as error:  # noqa: BLE001  (whatever a module of somebody else's raises, it is left alone)
        return _Unlike(failed(error))


def _tried_form(module: nn.Module, parts: Parts, arguments: Arguments) -> Form | str:
    drawn = Draws()
    plain = with_drawn_parameters(module, drawn)
    used, why_not = few_queries.used_parts(plain, parts), _Unlike(_OTHER)
    counts = list(_counts(numbers_held(plain, used), _channels(plain, parts)))

    def trial(batch: int, count: int, length: int, keywords: dict) -> Trial:
        inputs = _inputs(plain, parts, len(arguments.tensors), (batch, count, length), drawn)
        return Trial(plain, inputs, used, keywords)

    for extra, shown in _ways(arguments):
        trials, keywords = [trial(*each) for each in shown], shown[-1][-1]
        for form in _forms(plain, parts, extra):
            fused = functools.partial(_fused, parts, arguments, form)
            found = found_out(trials, fused, (trial(1, count, 1, keywords) for count in counts))
            if found is not None:
                form = form._replace(**found._asdict())
                return _why_not_in_its_place(module, parts, form, trials) or form
        if any(trial.comparable for trial in trials):
            why_not = _OTHER
    return why_not


def _why_not_in_its_place(module: nn.Module, parts: Parts, form: Form, trials: list[Trial]) -> str | None:
    reason = why_not_names(module, FewQueries)
    if reason is not None:
        return reason
    agree = agree_in_its_place(trials, fused_class(FewQueries, type(module), (parts, form)))
    return None if agree else "its forward asks for its class, which is another when it is fused"


def _fused(parts: Parts, arguments: Arguments, form: Form, module: nn.Module, *inputs: torch.Tensor, **keywords):
    call = few_queries.call_of(arguments, parts, form.extra, inputs, keywords)
    return few_queries.finished(module, parts, form, few_queries.attended(module, parts, form, call))


def _ways(arguments: Arguments) -> Iterator[tuple[bool, list[tuple[int, int, int, dict]]]]:
    """Whether the query is a token, and what shows it: images, tokens, queries and keywords of calls.

    One image or query may be squeezed out of a result, and what is done to many tokens alone needs more than a few.
    """
    several, one = (2, FEWEST, 3), (1, _MANY, 1)
    if len(arguments.tensors) == 1:
        yield False, [(*several, {}), (*one, {})]
    elif arguments.flag is None:
        yield False, [(*several, {}), (*one, {})]
        yield True, [(2, FEWEST, 1, {}), (*one, {})]
    else:
        keywords = [{arguments.flag: value} for value in (False, True)]
        yield False, [(*several, keywords[0]), (*one, keywords[0]), (2, FEWEST, 1, keywords[1]), (*one, keywords[1])]


def _counts(numbers: set[float], channels: int) -> Iterator[int]:
    """Of tokens, for which a forward may do something of its own: numbers that the module holds, such as a limit or how
    many patches there are, their squares, of a grid, and one more than these; as far as they take no long time."""
    left = _MOST_VALUES // channels
    held = sorted(int(number) for number in numbers if number.is_integer() and 1 < number <= left)
    wanted = (count + more for counts in (held, [number**2 for number in held]) for count in counts for more in (0, 1))
    for count in dict.fromkeys(wanted):
        if FEWEST <= count <= left:
            left -= count
            yield count


def _forms(module: nn.Module, parts: Parts, extra: bool) -> Iterator[Form]:
    scales = ("scale", "heads", None) if type(getattr(module, "scale", None)) is float else ("heads", None)
    normed = ("tokens", "query", "both") if type(few_queries.part(module, parts.norm)) is nn.LayerNorm else ("tokens",)
    for choice in itertools.product(scales, normed, (None, "mean", "flat"), (False, True)):
        yield Form(*choice, extra, in_training=False, in_float64=False, in_autocast=False, modes=())


def _inputs(module: nn.Module, parts: Parts, tensors: int, sizes: tuple[int, int, int], drawn: Draws) -> Inputs:
    batch, count, length = sizes
    channels = _channels(module, parts)
    tokens = drawn(batch, count, channels)
    if tensors == 1:
        return (tokens,)
    query = few_queries.part(module, parts.query)
    query = drawn(batch, length, channels if query is None else query.in_features)
    return query, *(tokens,) * (tensors - 1)


def _channels(module: nn.Module, parts: Parts) -> int:
    projection = few_queries.part(module, parts.key or parts.value)
    return few_queries.part(module, parts.latent).shape[-1] if projection is None else projection.in_features
