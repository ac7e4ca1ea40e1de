"""fuse on other people's classes of few queries: found by the names of their parts, tried out, replaced, restored."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tokenfusion
from tests.crossvit import randomize
from tests.drop_in import FORWARD, check_drop_in, outputs_and_gradients
from tests.parity import assert_runs
from tests.surgery import poolings

DIM, HEADS = 32, 4


def _tokens(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def _query_and_tokens(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x[:, :1], x[:, 1:])


def _three(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    tokens = x[:, 1:]
    return module(x[:, :1], tokens, tokens)[0]


def _with_itself(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x[:, :1], context=x[:, 1:], kv_include_self=True)


class Called(nn.Module):
    def __init__(self, module: nn.Module, call: Callable):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.module, x)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    call: Callable = _tokens

    def model(self) -> Called:
        torch.manual_seed(0)
        return randomize(Called(self.make(), self.call)).eval()


CASES = {
    "q, kv": Case(lambda: poolings.Cross(DIM, HEADS, proj=False), _query_and_tokens),
    "q, kv, proj": Case(lambda: poolings.Cross(DIM, HEADS), _query_and_tokens),
    "query, key, value": Case(lambda: poolings.Triple(DIM, HEADS), _three),
    "BatchNorm, the mean of queries": Case(lambda: poolings.Pool(DIM, HEADS)),
    "no BatchNorm": Case(lambda: poolings.Pool(DIM, HEADS, norm=False)),
    "one query": Case(lambda: poolings.Token(DIM)),
    "slices of the value": Case(lambda: poolings.Slices(DIM)),
    "tokens as keys and values": Case(lambda: poolings.Merger(DIM)),
    "unscaled, side by side": Case(lambda: poolings.Vectors(DIM)),
    "the first token": Case(lambda: poolings.First(DIM, HEADS)),
    "context": Case(lambda: poolings.Context(DIM, HEADS, 8), _query_and_tokens),
    "context and itself": Case(lambda: poolings.Context(DIM, HEADS, 8), _with_itself),
    "talking heads": Case(lambda: poolings.Talking(DIM, HEADS, 8), _query_and_tokens),
    "heads of other sizes": Case(lambda: poolings.Context(DIM, HEADS, 16), _with_itself),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def tokens(batch: int = 3, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, 9, DIM, generator=torch.Generator().manual_seed(1), dtype=dtype)


def reason(module: nn.Module) -> str | None:
    """Why it is left alone; it is then as it was. None where fuse says nothing of it."""
    kind = type(module)
    reports = tokenfusion.fuse(module).modules
    assert type(module) is kind
    return reports[0].reason if reports else None


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_gradients_and_the_way_back(case, dtype):
    check_drop_in(case.model().to(dtype), tokens().to(dtype))


@all_cases
def test_in_training(case):
    """With dropout, by its random numbers."""
    plain = case.model().double().train()
    fused = copy.deepcopy(plain)
    (report,) = tokenfusion.fuse(fused, strict=True).replaced
    assert report.kind == type(plain.module).__name__
    results = []
    for model in (fused, plain):
        torch.manual_seed(2)
        results.append(outputs_and_gradients(model, tokens().double()))
        results[-1] |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert not torch.equal(results[0]["out"], results[1]["out"])  # another order of sums
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, msg=name)


@all_cases
def test_copies_and_pickles(case):
    model, x = case.model(), tokens()
    kind, expected = type(model.module), model(x)
    tokenfusion.fuse(model, strict=True)
    file = io.BytesIO()
    torch.save(model.module, file)
    file.seek(0)
    module = model.module
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert type(other) is type(module) and isinstance(other, kind)
        with assert_runs(FORWARD), torch.no_grad():
            torch.testing.assert_close(case.call(other, x), expected)
        tokenfusion.unfuse(other)
        assert type(other) is kind and not any(name.startswith("_fused") for name in vars(other))


@all_cases
def test_one_graph(case):
    torch.compiler.reset()
    model, x = case.model(), tokens()
    with torch.no_grad():
        expected = model(x)
        tokenfusion.fuse(model, strict=True)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with assert_runs(FORWARD):
            torch.testing.assert_close(compiled(x), expected)


@all_cases
def test_autocast(case):
    plain, x = case.model(), tokens()
    module = copy.deepcopy(plain)
    tokenfusion.fuse(module, strict=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = module(x), plain(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_scripting_says_what_to_do():
    module = torch.nn.Sequential(fused(lambda: poolings.Merger(DIM)))
    with pytest.raises(RuntimeError, match="cannot compile Merger while it is fused; call tokenfusion.unfuse"):
        torch.jit.script(module)


def check_original(module: nn.Module, *args, **kwargs) -> None:
    """This call of a fused module is the original's, bit for bit."""
    plain = copy.deepcopy(module)
    tokenfusion.unfuse(plain)
    with assert_runs(), torch.no_grad():
        got = module(*args, **kwargs)
    torch.testing.assert_close(got, plain(*args, **kwargs), rtol=0, atol=0)


def fused(make: Callable) -> nn.Module:
    torch.manual_seed(0)
    module = randomize(make()).eval()
    assert tokenfusion.fuse(module, strict=True).replaced
    return module


def test_calls_of_another_kind_run_the_original():
    x, query = tokens(), tokens()[:, :1]
    context = fused(lambda: poolings.Context(DIM, HEADS, 8))
    check_original(context, x)  # self-attention
    check_original(context, x, context=x)
    check_original(context, x[:, :2], context=x, kv_include_self=True)  # two more tokens
    triple = fused(lambda: poolings.Triple(DIM, HEADS))
    check_original(triple, query, x, x.clone())
    check_original(triple, query, x, x, torch.zeros(1, 9))
    check_original(triple, query, keys=x, values=x, attention_mask=torch.zeros(1, 9))
    check_original(fused(lambda: poolings.Slices(DIM)), x, cls=torch.ones(1, 4, DIM))
    check_original(fused(lambda: poolings.Cross(DIM, HEADS)), tokens(3).repeat(1, 2, 1), x)  # too many queries
    check_original(fused(lambda: poolings.First(DIM, HEADS)), x[:, :1])


def test_keywords_and_defaults_are_the_same_call():
    x, query = tokens(), tokens()[:, :1]
    triple = fused(lambda: poolings.Triple(DIM, HEADS))
    for args, kwargs in (((query, x, x, None), {}), ((query,), dict(values=x, keys=x)), ((query, x), dict(values=x))):
        with assert_runs(FORWARD), torch.no_grad():
            triple(*args, **kwargs)


@pytest.mark.parametrize("wrong", [(), (None,), (3,), (torch.ones(2, DIM),), (torch.ones(2, 3, DIM), 1, 2, 3)])
def test_a_wrong_call_raises_what_the_original_raises(wrong):
    module = fused(lambda: poolings.Merger(DIM))
    with pytest.raises(Exception) as expected:
        poolings.Merger.forward(module, *wrong)
    with pytest.raises(type(expected.value)):
        module(*wrong)


@pytest.mark.parametrize("name, value", [("num_heads", 8), ("scale", 2.0), ("attn_drop", nn.Softmax(dim=-1))])
def test_what_was_changed_counts(name, value, caplog):
    module = fused(lambda: poolings.First(DIM, HEADS, attn_drop=0.0))
    setattr(module, name, value)
    check_original(module, tokens())
    assert "runs its original forward" in caplog.text


def test_the_configuration_counts():
    module = fused(lambda: poolings.Triple(DIM, HEADS))
    module.config._attn_implementation = "eager"
    query, x = tokens()[:, :1], tokens()
    with assert_runs(), torch.no_grad():
        assert module(query, x, x)[1] is not None
    assert "forward does not compute" in reason(copy.deepcopy(unfused(module)))


def unfused(module: nn.Module) -> nn.Module:
    tokenfusion.unfuse(module)
    return module


class Tanh(poolings.Cross):
    """Gated: the names are the same, what is computed is not."""

    def forward(self, q, x):
        return super().forward(q, x.tanh())


class Rotary(poolings.Cross):
    def forward(self, q, x):
        x = x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype).unsqueeze(1)
        return super().forward(q, x)


class Masked(poolings.Merger):
    """The last token does not count."""

    def forward(self, x):
        return super().forward(x[:, :-1])


@pytest.mark.parametrize("kind", [Tanh, Rotary])
def test_what_computes_something_else_is_left_alone(kind):
    assert "does not compute attention of few queries" in reason(kind(DIM, HEADS))
    assert "does not compute attention of few queries" in reason(Masked(DIM))


class SelfAttention(nn.Module):
    """Of all tokens, with the names of a class attention."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.attn_drop = HEADS, 0.1
        self.q, self.k, self.v, self.proj = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x):
        return self.proj(self.q(x) * self.k(x).softmax(1) * self.v(x))


class OfMaps(SelfAttention):
    def forward(self, x, height, width):
        return super().forward(x.view(-1, height * width, DIM))


@pytest.mark.parametrize("kind", [SelfAttention, OfMaps])
def test_names_alone_are_not_worth_a_line(kind):
    assert reason(kind()) is None


def test_a_module_is_tried_once_for_its_sizes(monkeypatch):
    from tokenfusion.surgery.rules import few_queries

    monkeypatch.setattr(few_queries, "_tried", {})
    model = nn.ModuleList(poolings.Cross(DIM, HEADS) for _ in range(3)).append(poolings.Cross(DIM, 2))
    assert len(tokenfusion.fuse(model).replaced) == 4
    assert len(few_queries._tried) == 2


class Mine(nn.Module):
    """A class with names of its own: a LayerNorm of query and tokens, and a residual sum outside."""

    def __init__(self, normed_query: bool = True):
        super().__init__()
        self.before = nn.LayerNorm(DIM)
        self.inner = nn.ModuleDict({name: nn.Linear(DIM, DIM) for name in ("ask", "name", "tell", "end")})
        self.normed_query = normed_query

    def forward(self, asking, told):
        told = self.before(told)
        asking = self.before(asking) if self.normed_query else asking
        query, key, value = (
            self.inner[name](x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name, x in (("ask", asking), ("name", told), ("tell", told))
        )
        weights = (query @ key.transpose(2, 3) * (DIM // HEADS) ** -0.5).softmax(-1)
        return self.inner["end"]((weights @ value).transpose(1, 2).flatten(2))


MINE = dict(query="inner.ask", key="inner.name", value="inner.tell", out="inner.end", heads=HEADS, norm="before")


@pytest.fixture
def rules(monkeypatch):
    from tokenfusion.surgery.rules import few_queries

    monkeypatch.setattr(few_queries, "_registered", {})


@pytest.mark.parametrize("normed_query", [True, False])
def test_a_rule_for_a_class_of_ones_own(rules, normed_query):
    model = Called(Mine(normed_query), _query_and_tokens)
    assert tokenfusion.fuse(model).modules == ()
    tokenfusion.register_rule(Mine, **MINE, example=Mine())
    check_drop_in(randomize(model), tokens())


class Bare(nn.Module):
    """What comes out is the mean of the tokens themselves."""

    def __init__(self):
        super().__init__()
        self.latent = nn.Parameter(torch.randn(2, DIM))

    def forward(self, x):
        return (self.latent @ x.transpose(1, 2)).softmax(-1) @ x


def test_a_result_that_is_changed_in_place(rules):
    tokenfusion.register_rule(Bare, latent="latent")
    torch.manual_seed(0)
    plain, gradients = Bare(), []
    fused = copy.deepcopy(plain)
    tokenfusion.fuse(fused, strict=True)
    for module in (plain, fused):
        module(tokens()).tanh_().sum().backward()
        gradients.append(module.latent.grad)
    torch.testing.assert_close(*gradients)


class NotMine(Mine):
    def forward(self, asking, told):
        return 2 * super().forward(asking, told)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        (NotMine, {}, "example: its forward does not compute attention of few queries"),
        (Mine, dict(norm=None), "example: its forward does not compute"),
        (Mine, dict(key="inner.nothing"), "example: inner.nothing is NoneType, expected torch's Linear"),
        (Mine, dict(norm="inner.end"), "example: inner.end is Linear, expected torch's LayerNorm"),
        (Mine, dict(heads="nothing"), "example: its forward cannot be tried out"),
    ],
)
def test_a_rule_that_does_not_hold_is_not_accepted(rules, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        tokenfusion.register_rule(kind, **MINE | changes, example=kind())
    assert tokenfusion.fuse(kind()).modules == ()
    tokenfusion.register_rule(kind, **MINE | changes)
    assert reason(kind()).startswith(message.removeprefix("example: "))
    with pytest.raises(ValueError, match="strict was asked for"):
        tokenfusion.fuse(kind(), strict=True)


def test_what_is_no_class(rules):
    with pytest.raises(TypeError, match="cls: got 3, expected a subclass of torch.nn.Module"):
        tokenfusion.register_rule(3, **MINE)
    with pytest.raises(TypeError, match="example: got Linear, expected Mine"):
        tokenfusion.register_rule(Mine, **MINE, example=nn.Linear(1, 1))
