"""What is in an attribute of a class that nobody here has read, or in a constant of the class, counts however deep."""

import array
import copy
import functools
import logging
import pickle
import random
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace

import numpy
import pytest
import torch

import tokenfusion
from tests.parity import assert_runs
from tests.surgery.test_few_queries import FORWARD, check_original, fused, reason, tokens
from tests.surgery.test_found_classes import Changing, check_same
from tokenfusion.layers.frozen import frozen


class Mapping(dict):
    pass


class Sequence(list):
    pass


@dataclass(slots=True)
class Slots:
    factor: float = 1.0


@dataclass
class Options:
    nested: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(factor=1.0))
    several: list = field(default_factory=lambda: [1.0])


class Namespace:
    factor = 1.0

    def read(self):
        return self.factor


class Reading(Changing):
    """Multiplies its tokens by what it finds in an attribute."""

    def __init__(self, held, read: Callable):
        super().__init__()
        self.held, self.read = held, read

    def changed(self, x):
        return x * self.read(self.held)


def _item(held):
    return held["factor"]


def _set_item(held):
    held["factor"] = held["factor"] + 1


def _first(held):
    return held[0]


def _set_first(held):
    held[0] = 2.0


def _factor(held):
    return held.factor


def _set_factor(held):
    held.factor = 2.0


HELD = {
    "a class of dictionaries": (lambda: Mapping(factor=1.0), _item, _set_item),
    "an OrderedDict": (lambda: OrderedDict(factor=1.0), _item, _set_item),
    "a defaultdict": (lambda: defaultdict(float, factor=1.0), _item, _set_item),
    "a Counter": (lambda: Counter(factor=1), _item, _set_item),
    "a UserDict": (lambda: UserDict(factor=1.0), _item, _set_item),
    "a class of lists": (lambda: Sequence([1.0]), _first, _set_first),
    "a deque": (lambda: deque([1.0]), _first, _set_first),
    "slots": (Slots, _factor, _set_factor),
    "an object in an object": (Options, lambda held: held.nested.factor, lambda held: _set_factor(held.nested)),
    "a list in an object": (Options, lambda held: held.several[0], lambda held: _set_first(held.several)),
    "a method of an object": (
        lambda: Namespace().read,
        lambda held: held(),
        lambda held: _set_factor(held.__self__),
    ),
    "arguments of a partial": (
        lambda: functools.partial(_item, {"factor": 1.0}),
        lambda held: held(),
        lambda held: _set_item(held.args[0]),
    ),
}


@pytest.mark.parametrize("make, read, change", HELD.values(), ids=HELD)
@pytest.mark.parametrize("copied", [False, True])
def test_contents_of_attributes(make, read, change, copied):
    module = fused(lambda: Reading(make(), read))
    module = copy.deepcopy(module) if copied else module
    with assert_runs(FORWARD):
        check_same(module, module)
    change(module.held)
    check_original(module, tokens()[:, :1], tokens())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_any_protocol_of_pickle(protocol):
    module = fused(lambda: Reading(SimpleNamespace(factor=1.0), _factor))
    module = pickle.loads(pickle.dumps(module, protocol))
    with assert_runs(FORWARD):
        check_same(module, module)
    _set_factor(module.held)
    check_original(module, tokens()[:, :1], tokens())


def test_a_class_that_serves_as_a_namespace(monkeypatch):
    module = fused(lambda: Reading(Namespace, _factor))
    monkeypatch.setattr(Namespace, "factor", 2.0)
    check_original(module, tokens()[:, :1], tokens())


def test_a_namespace_of_which_an_object_is_copied():
    class Config:
        factor = 1.0

    module = fused(lambda: Reading((Config, Config()), lambda held: held[0].factor))
    copy.deepcopy(module)
    with assert_runs(FORWARD):
        check_same(module, module)


class Constants(Changing):
    options, several, nested, log = {"factor": 1.0}, [1.0], Options(), logging.getLogger(__name__)

    class Config:
        factor = 1.0

    @classmethod
    def of_class(cls):
        return 1.0

    def changed(self, x):
        of_class = self.of_class() * self.Config.factor
        return x * self.options["factor"] * self.several[0] * self.nested.nested.factor * of_class


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setitem(Constants.options, "factor", 2.0),
        lambda patch: patch.setattr(Constants, "of_class", classmethod(lambda cls: 2.0)),
        lambda patch: patch.setattr(Constants.nested.nested, "factor", 2.0),
        lambda patch: patch.setattr(Constants.Config, "factor", 2.0),
    ],
)
def test_contents_of_constants(change, monkeypatch):
    module = fused(Constants)
    with monkeypatch.context() as patch:
        change(patch)
        check_original(module, tokens()[:, :1], tokens())
    with assert_runs(FORWARD):
        check_same(module, module)


UNSEEN = {
    "an array": array.array("d", [1.0]),
    "a tensor": Options(several=[torch.ones(())]),
    "Python's random numbers": random.Random(0),
    "torch's": torch.Generator(),
    "NumPy's": numpy.random.default_rng(0),
    "a method of those": numpy.random.RandomState(0).rand,
}


@pytest.mark.parametrize("held", UNSEEN.values(), ids=UNSEEN)
def test_what_could_change_unseen(held):
    assert "may change without being seen" in reason(Reading(held, lambda held: 1.0))


class Logging(Changing):
    """Keeps numbers of its calls."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def changed(self, x):
        self.held.append(x.max().item())
        return x


@pytest.mark.parametrize("held", [deque(maxlen=3), Sequence()], ids=["deque", "list"])
def test_what_a_call_leaves_in_an_attribute(held):
    assert not tokenfusion.fuse(Logging(held)).replaced


def test_contents_that_contain_themselves_and_too_many():
    held = {"several": [1.0]}
    held["itself"] = held
    before = frozen(held)
    assert frozen(held) == before
    held["several"][0] = 2.0
    assert frozen(held) != before
    many = [[each] for each in range(20_000)]
    assert frozen(many) != frozen(many)


def test_views_and_proxies_of_what_others_hold():
    held, referent = {"factor": 1.0}, Namespace()
    readonly, view, weak = MappingProxyType(held), held.values(), weakref.proxy(referent)
    before = frozen(readonly)
    assert frozen(readonly) == before
    held["factor"] = 2.0
    assert frozen(readonly) != before
    assert frozen(view) != frozen(view)
    assert frozen(weak) != frozen(weak)
    del referent
    assert frozen(weak) != frozen(weak)  # and nobody asks what is gone
