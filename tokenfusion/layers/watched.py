"""What a module of somebody else's class holds, beside what it held before.

Nobody here knows what the forward of such a class reads: a flag, a list, a function, a configuration, a buffer that is
not there yet, a property. So all that it can reach through the module counts. What could change without being seen is
never as before: the values of buffers, and tensors and modules in attributes.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from tokenfusion.layers.drop_in import NAME, STATE, remember_forwards, why_not_part

_NUMBERS = (bool, int, float, str, type(None))
_CONTAINERS = (list, tuple, set, frozenset)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"_compiled_call_impl", NAME, STATE}
_of_classes: dict[type[nn.Module], dict[str, object]] = {}


class Watched(NamedTuple):
    """A module, by its path in another, as it was."""

    path: str
    kind: type[nn.Module]
    tensors: tuple[tuple[str, tuple[int, ...] | None], ...]
    children: tuple[tuple[str, bool], ...]
    names: frozenset[str]
    attributes: tuple[tuple[str, tuple], ...]


def watch(path: str, module: nn.Module, *more: str) -> Watched:
    """more: paths of attributes of attributes that count in compiled code, too, which sees numbers and texts alone."""
    held = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    attributes = held | {name: attribute(module, name) for name in more}
    frozen = tuple((name, _frozen(value)) for name, value in attributes.items())
    return Watched(path, type(module), _tensors(module), _children(module), frozenset(held), frozen)


def remember(*watched: Watched) -> None:
    """Takes what their classes hold, when these are first seen, for the classes' own, as `remember_forwards` does."""
    for each in watched:
        remember_forwards(each.kind)
        _of_classes.setdefault(each.kind, _of_class(each.kind))


def why_not_as_before(module: nn.Module, then: Watched) -> str | None:
    """What is not, or may not be, as it was when the module that contains this one was tried."""
    reason = why_not_part(module, then.path, then.kind) if then.path else None
    return reason or _why_not_held(module, then) or (None if _compiling() else _why_not_unseen(module, then))


def attribute(owner, path: str):
    """None where there is none."""
    return functools.reduce(lambda owner, name: getattr(owner, name, None), path.split("."), owner)


def _why_not_held(module: nn.Module, then: Watched) -> str | None:
    where = f"{then.path}." if then.path else ""
    for name, buffer in module._buffers.items():
        if buffer is not None:
            return f"{where}{name} is a buffer, with values that a trial does not have"
    if _tensors(module) != then.tensors or _children(module) != then.children:
        return f"{then.path or 'it'} has other parameters, buffers or modules than when it was tried"
    for name, value in then.attributes:
        if (value[0] in _NUMBERS or not _compiling()) and _frozen(attribute(module, name)) != value:
            return f"{where}{name} is not, or may not stay, what it was when it was tried"
    return None


def _why_not_unseen(module: nn.Module, then: Watched) -> str | None:
    """What code that is being compiled cannot look at."""
    names = vars(module).keys() - _OF_EVERY_MODULE
    if names != then.names:
        return (
            f"{then.path or 'it'} has other attributes than when it was tried: {', '.join(sorted(names ^ then.names))}"
        )
    before, now = _of_classes[then.kind], _of_class(then.kind)
    if before.keys() != now.keys() or any(now[name] is not value for name, value in before.items()):
        return f"the class {then.kind.__name__} was changed"
    return None


def _compiling() -> bool:
    return torch.compiler.is_compiling()


def _tensors(module: nn.Module) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
    held = (*module._parameters.items(), *module._buffers.items())
    return tuple([(name, None if tensor is None else tuple(tensor.shape)) for name, tensor in held])


def _children(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    return tuple([(name, child is None) for name, child in module._modules.items()])


def _of_class(kind: type[nn.Module]) -> dict[str, object]:
    """Methods, properties and constants; of torch's classes, their forward alone counts, elsewhere."""
    bases = () if kind.__module__.startswith("torch.") else reversed(kind.__mro__)
    own = (vars(base).items() for base in bases if base not in (nn.Module, object))
    return {name: value for items in own for name, value in items if not name.startswith("__")}


class _Held:
    """An object that is equal to itself alone, and not even that where what it computes is in its values."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value

    def __eq__(self, other) -> bool:
        same = isinstance(other, _Held) and self.value is other.value
        return same and not isinstance(self.value, (torch.Tensor, nn.Module, Iterator))

    def __hash__(self) -> int:
        return hash(type(self.value))


def _frozen(value) -> tuple:
    """Its class and its contents; of an object also the numbers in its attributes, as in a configuration."""
    kind = type(value)
    if kind in _NUMBERS:
        return kind, value
    if kind in _CONTAINERS:
        return kind, tuple([_frozen(each) for each in value])
    if kind is dict:
        return kind, tuple([(_frozen(key), _frozen(each)) for key, each in value.items()])
    attributes = getattr(value, "__dict__", {}).items()
    return kind, _Held(value), tuple([(name, _shallow(each)) for name, each in attributes])


def _shallow(value) -> tuple | _Held:
    return (type(value), value) if type(value) in _NUMBERS else _Held(value)
