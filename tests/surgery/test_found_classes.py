"""Classes that nobody here has read: what a module and its class hold counts."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.parity import assert_runs
from tests.surgery import poolings
from tests.surgery.test_few_queries import DIM, FORWARD, HEADS, check_original, fused, reason, tokens, unfused


class Changing(poolings.Cross):
    """Attention of few queries over the tokens, changed."""

    def __init__(self):
        super().__init__(DIM, HEADS)

    def changed(self, x):
        return x

    def forward(self, q, x):
        return super().forward(q, self.changed(x))


class Holding(Changing):
    """Reads whatever can be put into a module."""

    constant = 1.0

    def __init__(self, **attributes):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.register_parameter("bias", None)
        self.register_buffer("factor", None)
        self._private, self.several, self.named, self.function = 1.0, [1.0], {"factor": [1.0]}, torch.clone
        self.options = SimpleNamespace(factor=1.0)
        vars(self).update(attributes)

    def method(self):
        return 1.0

    def changed(self, x):
        x = self.function(x * self._private * self.several[0] * self.named["factor"][0] * self.options.factor)
        x = x if self.bias is None else x + self.bias
        x = x if self.factor is None else x * self.factor
        x = x.tanh() if hasattr(self, "late") else x
        return self.drop(x) * self.constant * self.method()


CHANGES = {
    "a private attribute": lambda module: setattr(module, "_private", 2.0),
    "a list": lambda module: module.several.append(module.several.pop() + 1.0),
    "a dictionary": lambda module: module.named["factor"].append(module.named["factor"].pop() + 1.0),
    "a function": lambda module: setattr(module, "function", torch.tanh),
    "an object": lambda module: setattr(module.options, "factor", 2.0),
    "a parameter": lambda module: setattr(module, "bias", nn.Parameter(torch.ones(DIM))),
    "a buffer": lambda module: setattr(module, "factor", torch.tensor(2.0)),
    "a new attribute": lambda module: setattr(module, "late", True),
    "a new buffer": lambda module: module.register_buffer("late", torch.ones(1)),
    "a new module": lambda module: module.add_module("late", nn.Identity()),
    "dropout in training": lambda module: module.drop.train(),
    "training": lambda module: module.train(),
}
COMPILED = [name for name in CHANGES if name not in ("a dictionary", "an object", "a new attribute")]


def check_same(module: nn.Module, plain: nn.Module) -> None:
    """With the same random numbers."""
    results = []
    for each in (module, plain):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(each(tokens()[:, :1], tokens()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("copies", [(), ("before",), ("after",)], ids=str)
def test_all_that_a_module_holds_counts(change, copies):
    module = fused(Holding)
    module = copy.deepcopy(module) if "before" in copies else module
    with assert_runs(FORWARD):
        check_same(module, module)
    change(module)
    module = copy.deepcopy(module) if "after" in copies else module
    with assert_runs():
        check_same(module, unfused(copy.deepcopy(module)))


@pytest.mark.parametrize("change", [CHANGES[name] for name in COMPILED], ids=COMPILED)
def test_what_a_module_holds_counts_in_compiled_code(change):
    torch.compiler.reset()
    module = fused(Holding)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    check_same(compiled, module)
    change(module)
    check_same(compiled, unfused(copy.deepcopy(module)))


@pytest.mark.parametrize("name, value", [("constant", 2.0), ("method", lambda self: 2.0), ("late", True)])
def test_what_its_class_holds_counts(monkeypatch, name, value):
    module = fused(Holding)
    monkeypatch.setattr(Holding, name, value, raising=False)
    check_original(module, tokens()[:, :1], tokens())


def test_each_module_is_tried_with_what_it_holds():
    fused(Holding)
    for attributes in (dict(_private=2.0), dict(several=[2.0]), dict(function=torch.tanh)):
        assert "does not compute attention of few queries" in reason(Holding(**attributes))


@pytest.mark.parametrize(
    "attributes",
    [
        dict(several=[torch.ones(())]),
        dict(options=SimpleNamespace(factor=torch.ones(()))),
        dict(function=nn.Identity().forward),
    ],
)
def test_a_tensor_in_an_attribute_could_change_unseen(attributes):
    (name,) = attributes
    assert f"another {name} than when it was tried, or one that may change without being seen" in reason(
        Holding(**attributes)
    )


class OfBuffer(Changing):
    def __init__(self, dtype: torch.dtype, persistent: bool):
        super().__init__()
        self.register_buffer("absent", torch.ones(DIM, dtype=dtype), persistent=persistent)

    def changed(self, x):
        return x.masked_fill(self.absent > 0.5, 0.0)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_buffers_have_values_that_a_trial_has_not(dtype, persistent):
    assert reason(OfBuffer(dtype, persistent)) is not None


class OfAPart(Changing):
    """An adapter, or whatever somebody puts into a part."""

    def changed(self, x):
        return x * getattr(self.kv, "gain", 1.0) if not hasattr(self.kv, "adapter") else self.kv.adapter(x)


@pytest.mark.parametrize("name, value", [("gain", 2.0), ("adapter", nn.Linear(DIM, DIM))])
def test_what_is_put_into_a_part_that_is_read_past(name, value):
    module = fused(OfAPart)
    setattr(module.kv, name, value)
    check_original(module, tokens()[:, :1], tokens())


class Inside(poolings.Context):
    def forward(self, x, context=None, kv_include_self=True):
        return super().forward(x, context, kv_include_self)


def test_the_default_of_a_flag_is_the_class_own():
    module = fused(lambda: Inside(DIM, HEADS, 8))
    plain = unfused(copy.deepcopy(module))
    with assert_runs(FORWARD):
        check_same(module, plain)


def test_an_argument_that_is_given_twice():
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        fused(lambda: poolings.Merger(DIM))(tokens(), x=tokens())


@pytest.mark.parametrize("training", [True, False])
def test_dropout_in_another_mode_than_its_module(training):
    module = fused(lambda: poolings.First(DIM, HEADS)).train(training)
    module.attn_drop.train(not training)
    torch.manual_seed(0)
    got = module(tokens())
    torch.manual_seed(0)
    with assert_runs():
        assert torch.equal(got, unfused(module)(tokens()))


def test_another_shape_of_what_is_learned():
    module = fused(lambda: poolings.Merger(DIM))
    module.queries = nn.Parameter(torch.randn(3, 4, DIM))  # of each image its own
    check_original(module, tokens())


def test_exporting_with_sizes_that_change():
    module, batch, count = fused(Changing), torch.export.Dim("batch"), torch.export.Dim("count", max=999)
    plain = unfused(copy.deepcopy(module))
    example, sizes = (tokens()[:, :1], tokens()), ({0: batch}, {0: batch, 1: count})
    exported = torch.export.export(module, example, dynamic_shapes=sizes).module()
    other = (torch.randn(2, 1, DIM), torch.randn(2, 30, DIM))
    torch.testing.assert_close(exported(*other), plain(*other))


@pytest.mark.parametrize(
    "make", [lambda: poolings.Merger(DIM), lambda: poolings.Vectors(DIM), lambda: poolings.Slices(DIM)]
)
def test_tokens_of_another_width_raise_what_the_original_raises(make):
    module, narrow = fused(make), tokens()[..., : DIM // 2]
    with pytest.raises(Exception) as expected:
        unfused(copy.deepcopy(module))(narrow)
    with pytest.raises(type(expected.value)):
        module(narrow)


def test_a_part_without_sizes_in_the_place_of_a_linear_layer(caplog):
    module = fused(Changing)
    module.kv = nn.Sequential(module.kv)
    check_original(module, tokens()[:, :1], tokens())
    assert "kv is Sequential" in caplog.text


def test_meta_tensors():
    module = fused(Changing).to("meta")
    x = tokens().to("meta")
    assert module(x[:, :1], x).shape == (len(x), 1, DIM)


@pytest.mark.parametrize("name", ["details", "arguments", "original", "found", "fuses"])
def test_attributes_of_the_fused_class_names(name):
    class Named(Changing):
        def __init__(self):
            super().__init__()
            setattr(self, name, nn.Identity() if name == "original" else "its own")

        def forward(self, q, x):
            getattr(self, name)
            return super().forward(q, x)

    assert reason(Named()) == f"it has attributes of the names that its fused class has: {name}"


def test_attributes_that_come_later():
    module = fused(Changing)
    module.details, module.arguments = "its own", 1
    check_original(module, tokens()[:, :1], tokens())


def test_a_module_that_its_fused_class_makes():
    module = fused(Changing)
    other = type(module)()
    other.load_state_dict(module.state_dict())
    for each in (other, copy.deepcopy(other)):
        check_original(each.eval(), tokens()[:, :1], tokens())


class OwnPickle(Changing):
    def __reduce__(self):
        return OwnPickle, (), vars(self)


def test_a_class_with_its_own_pickles():
    assert reason(OwnPickle()) == "its class has a way of its own to be pickled"


class Register(type):
    names = set()

    def __init__(cls, name, *_):
        if name in Register.names:
            raise RuntimeError(f"{name} is there already")
        Register.names.add(name)


class Registered(Changing, metaclass=Register):
    pass


def test_a_class_that_another_than_type_makes():
    assert reason(Registered()) == "its class is made by Register"


class AsksForItsClass(Changing):
    def changed(self, x):
        return x if type(self) is AsksForItsClass else x.tanh()


class CallsWhatItsClassIsDerivedFrom(Changing):
    def forward(self, q, x):
        return super(type(self), self).forward(q, x)


class AsksInTraining(Changing):
    def changed(self, x):
        return x.tanh() if self.training and type(self) is AsksInTraining else x


@pytest.mark.parametrize("kind", [AsksForItsClass, AsksInTraining, CallsWhatItsClassIsDerivedFrom])
def test_a_forward_that_asks_for_its_class(kind):
    assert reason(kind()) == "its forward asks for its class, which is another when it is fused"
