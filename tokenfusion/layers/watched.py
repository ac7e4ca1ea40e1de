"""What a module of somebody else's class holds, beside what it held before.

Nobody here knows what the forward of such a class reads: a flag, a list, a function, a configuration, a buffer that is
not there yet, a property. So all that it can reach through the module counts. What could change without being seen is
never as before: the values of buffers, and tensors and modules in attributes.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from tokenfusion.layers.drop_in import NAME, STATE, remember_forwards, why_not_part
from tokenfusion.layers.frozen import NUMBERS, PLAIN, frozen, is_listed, listed

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"_compiled_call_impl", NAME, STATE}


class Watched(NamedTuple):
    """A module, by its path in another, as it was.

    plain are attributes and constants of the class that stand for themselves, contained are lists and the like of such,
    deeper are attributes of attributes; frozen are all others, at which compiled code cannot look, and classes, which
    may be namespaces.
    """

    path: str
    kind: type[nn.Module]
    tensors: tuple[tuple[str, tuple[int, ...] | None], ...]
    children: tuple[tuple[str, bool], ...]
    names: frozenset[str]
    plain: tuple[tuple[str, object], ...]
    deeper: tuple[tuple[str, object], ...]
    contained: tuple[tuple[str, tuple], ...]
    frozen: tuple[tuple[str, tuple], ...]


class UsedParts(NamedTuple):
    """The names of the parts of a module that its fused form knows, and nothing but them.

    called are called as the class calls them, whatever they are; of the others, which are read past, dropout is one
    whose rate may be any.
    """

    called: tuple[str, ...]
    read: tuple[str, ...]
    dropout: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.called + self.read


class _Class(NamedTuple):
    """What a class holds, and how many names each of its bases has.

    frozen is what is in the contents that do not stand for themselves; others are those of the bases' names that give
    another object each time, such as methods of the class.
    """

    contents: dict[str, object]
    bases: tuple[tuple[Mapping[str, object], int], ...]
    frozen: tuple[tuple[str, tuple], ...]
    others: tuple[tuple[Mapping[str, object], str, object], ...]


_classes: dict[type[nn.Module], _Class] = {}


def watch(path: str, module: nn.Module, *deeper: str) -> Watched:
    """deeper: paths of attributes of attributes, such as "config.causal". Those of any attribute count, but compiled
    code sees these alone."""
    held = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    constants = {name: getattr(module, name) for name in _names(type(module)) - held.keys()}
    plain = {name: value for name, value in constants.items() if type(value) in NUMBERS}
    plain |= {name: value for name, value in held.items() if type(value) in PLAIN}
    contained = {name: listed(value) for name, value in held.items() if name not in plain and is_listed(value)}
    seen = {name for name, value in held.items() if name in contained or not _holds(value)}
    return Watched(
        path,
        type(module),
        _tensors(module),
        _children(module),
        frozenset(held),
        tuple(plain.items()),
        tuple((name, attribute(module, name)) for name in deeper),
        tuple(contained.items()),
        tuple((name, frozen(value)) for name, value in held.items() if name not in seen),
    )


def watch_all(module: nn.Module, beside: Iterable[str] = (), *deeper: str) -> tuple[Watched, ...]:
    """A module and all in it but the parts of the names `beside`; deeper is as in `watch`, of the module itself."""
    watched = tuple(
        watch(path, each, *(() if path else deeper))
        for path, each in module.named_modules()
        if not any(f"{path}.".startswith(f"{name}.") for name in beside)
    )
    remember(*watched)
    return watched


def why_not_all_as_before(module: nn.Module, watched: tuple[Watched, ...]) -> str | None:
    """What differs from how they were in the module, or may do so without being seen."""
    for then in watched:
        reason = why_not_as_before(attribute(module, then.path) if then.path else module, then)
        if reason is not None:
            return reason
    return None


def kinds_of_numbers(watched: tuple[Watched, ...]) -> tuple[type, ...]:
    """Of those that stand for themselves, beside them in a key: 1, 1.0 and True are equal."""
    return tuple(type(value) for then in watched for _, value in (*then.plain, *then.deeper))


def why_not_modes(module: nn.Module, paths: tuple[str, ...]) -> str | None:
    """A trial has all of a module in training, or nothing of it."""
    for path in paths:
        each = attribute(module, path)
        if each is not None and each.training is not module.training:
            return f"{path} is {'' if each.training else 'not '}in training, unlike the module that it is in"
    return None


def remember(*watched: Watched) -> None:
    """Takes what their classes hold, when these are first seen, for the classes' own, as `remember_forwards` does."""
    for each in watched:
        remember_forwards(each.kind)
        if each.kind not in _classes:
            _classes[each.kind] = _class(each.kind)


def why_not_as_before(module: nn.Module, then: Watched) -> str | None:
    """What is not, or may not be, as it was when the module that contains this one was tried."""
    reason = why_not_part(module, then.path, then.kind) if then.path else None
    if reason is not None:
        return reason
    where = then.path or "it"
    for name, buffer in module._buffers.items():
        if buffer is not None:
            return f"{where} has the buffer {name}, with values that a trial does not have"
    if _tensors(module) != then.tensors or _children(module) != then.children:
        return f"{where} has other parameters, buffers or modules than when it was tried"
    for name, value in then.plain:
        if _differs(getattr(module, name, None), value):
            return f"{where} has another {name} than when it was tried"
    for path, value in then.deeper:
        if _differs(attribute(module, path), value):
            return f"{where} has another {path} than when it was tried"
    for name, value in then.contained:
        if listed(getattr(module, name, None)) != value:
            return f"{where} has another {name} than when it was tried"
    for name, value in _classes[then.kind].contents.items():
        if _differs(getattr(then.kind, name, None), value):
            return f"{name} of the class {then.kind.__name__} was changed"
    return None if torch.compiler.is_compiling() else _why_not_unseen(module, then)


def attribute(owner, path: str):
    """None where there is none."""
    return functools.reduce(_attribute, path.split("."), owner)


def _attribute(owner, name: str):
    return getattr(owner, name, None)


def _why_not_unseen(module: nn.Module, then: Watched) -> str | None:
    """What code that is being compiled cannot look at."""
    where, held = then.path or "it", vars(module)
    if held.keys() - _OF_EVERY_MODULE != then.names:
        return f"{where} has other attributes than when it was tried"
    for name, value in then.frozen:
        if frozen(held[name]) != value:
            return f"{where} has another {name} than when it was tried, or one that may change without being seen"
    of_class = _classes[then.kind]
    if any(len(base) != count for base, count in of_class.bases) and _names(then.kind) != of_class.contents.keys():
        return f"names of the class {then.kind.__name__} were changed"
    for name, value in of_class.frozen:
        if frozen(getattr(then.kind, name)) != value:
            return f"{name} of the class {then.kind.__name__} was changed, or may change without being seen"
    for base, name, value in of_class.others:
        if base.get(name) is not value:
            return f"{name} of the class {then.kind.__name__} was changed"
    return None


def _differs(now, then) -> bool:
    return now is not then and (type(now) is not type(then) or type(then) not in NUMBERS or now != then)


def _tensors(module: nn.Module) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
    held = (*module._parameters.items(), *module._buffers.items())
    return tuple([(name, None if tensor is None else tensor.shape) for name, tensor in held])


def _children(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    return tuple([(name, child is None) for name, child in module._modules.items()])


def _class(kind: type[nn.Module]) -> _Class:
    contents, bases = {name: getattr(kind, name) for name in _names(kind)}, [vars(each) for each in _bases(kind)]
    return _Class(
        contents,
        tuple((base, len(base)) for base in bases),
        tuple((name, frozen(value)) for name, value in contents.items() if _holds(value)),
        tuple(
            (base, name, value)
            for base in bases
            for name, value in base.items()
            if not (name.startswith("__") or name in contents)
        ),
    )


def _holds(value) -> bool:
    """Whether there may be something in it that changes; a class may be a namespace."""
    return type(value) not in PLAIN or isinstance(value, type)


def _bases(kind: type[nn.Module]) -> list[type]:
    """Of torch's classes none: their forward alone counts, and `why_not_part` looks at that."""
    return (
        []
        if kind.__module__.startswith("torch.")
        else [base for base in kind.__mro__ if base not in (nn.Module, object)]
    )


def _names(kind: type[nn.Module]) -> set[str]:
    """Of methods, properties and constants, but for what is another object each time."""
    names = {name for base in _bases(kind) for name in vars(base) if not name.startswith("__")}
    return {name for name in names if getattr(kind, name) is getattr(kind, name)}
