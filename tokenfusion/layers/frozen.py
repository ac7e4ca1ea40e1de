"""What is in an attribute, in a form that can be compared with what is in it later."""

import functools
import logging
import random
import types
import weakref
from collections import deque
from collections.abc import Iterator, MappingView

import torch
from torch import nn

NUMBERS = (bool, int, float, str, type(None))
PLAIN = (*NUMBERS, types.FunctionType, types.BuiltinFunctionType, type)  # stand for themselves
_SET_OF_NUMBERS = frozenset(NUMBERS)
_LISTS = (list, tuple)
_SEQUENCES = (*_LISTS, deque)
_SETS = (set, frozenset)
_CONTAINERS = (*_SEQUENCES, *_SETS, dict)
_NOT_LOOKED_INTO = (types.ModuleType, logging.Logger)
_UNSEEN = (torch.Tensor, nn.Module, Iterator)  # what they compute is in their values
_UNSEEN += (MappingView, weakref.ProxyType, weakref.CallableProxyType)  # of what others hold
_UNSEEN += (random.Random, torch.Generator)  # each number changes them
_MOST = 10_000  # things in one attribute; with more it is never as before


def listed(value) -> tuple:
    """Of what `is_listed`; also in code that is being compiled."""
    kind = type(value)
    return (kind, *[listed(each) for each in value]) if kind in _LISTS else (kind, value)


def is_listed(value) -> bool:
    """Whether it is a list or tuple of such and of what stands for itself."""
    return type(value) in _LISTS and all(type(each) in PLAIN or is_listed(each) for each in value)


def frozen(value) -> tuple:
    """Its class and its contents: of lists, sets and dictionaries, of what is derived from these, and of the attributes
    of objects, as in a configuration."""
    return _Freezing().of(value)


class _Held:
    """An object that is equal to itself alone, and not even that where it may change without being seen."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value

    def __eq__(self, other) -> bool:
        same = isinstance(other, _Held) and self.value is other.value
        return same and not _is_unseen(self.value) and not _is_memory(self.value)

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __reduce__(self):
        """By any protocol: the oldest ones know no slots."""
        return _Held, (self.value,)


def _is_unseen(value) -> bool:
    kind = type(value)  # isinstance would ask a proxy, which may be dead
    return issubclass(kind, _UNSEEN) or str(kind.__module__).startswith("numpy.random")


def _is_memory(value) -> bool:
    """That can be written to, as an array's."""
    try:
        return not memoryview(value).readonly
    except TypeError:
        return False


class _Freezing:
    """Remembers what it met, and looks into each thing once."""

    def __init__(self):
        self._met: dict[int, object] = {}

    def of(self, value) -> tuple:
        kind = type(value)
        if kind in PLAIN and kind is not type:
            return kind, value
        if id(value) in self._met or _is_unseen(value):
            return kind, _Held(value)
        if len(self._met) == _MOST:
            return kind, _Held(iter(()))
        self._met[id(value)] = value
        itself = () if kind in _CONTAINERS else (_Held(value),)
        if kind in _SETS:
            return kind, frozenset(map(self.of, value))
        contents = _contents(value)
        kinds = [*map(type, contents)]
        if _SET_OF_NUMBERS.issuperset(kinds):
            return kind, *itself, *kinds, *contents
        return kind, *itself, *map(self.of, contents)


def _contents(value) -> list:
    """As it is in memory: what the object would say of itself is not asked for."""
    if isinstance(value, type):
        return _constants(value)
    if isinstance(value, _NOT_LOOKED_INTO):
        return []
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    held = []
    if isinstance(value, dict):
        held += [*dict.keys(value), *dict.values(value)]
    if isinstance(value, types.MappingProxyType):
        held += [*value.keys(), *value.values()]
    for kind in (*_SEQUENCES, *_SETS):
        if isinstance(value, kind):
            held += kind.__iter__(value)
    attributes = getattr(value, "__dict__", {})
    held += [*attributes, *attributes.values()]
    for slot in _slots(type(value)):
        try:
            held.append(slot.__get__(value))
        except AttributeError:
            held.append(AttributeError)
    return held


def _constants(kind: type) -> list:
    """Numbers and the like of a class that serves as a namespace; copying an object leaves `__slotnames__` there."""
    bases = (vars(base) for base in kind.__mro__ if base.__module__.partition(".")[0] not in ("builtins", "torch"))
    named = ((name, each) for base in bases for name, each in base.items() if not name.startswith("__"))
    return [each for _, each in named if type(each) in (*NUMBERS, *_CONTAINERS)]


@functools.cache
def _slots(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    named = (item for base in kind.__mro__ for item in vars(base).items() if not item[0].startswith("__"))
    return tuple(each for _, each in named if isinstance(each, types.MemberDescriptorType))
