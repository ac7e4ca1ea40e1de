"""Classes that nobody here has read: what one trial would not show, and what a trial leaves behind: nothing."""

import copy
import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import NamedTuple

import numpy
import pytest
import torch
from torch import nn

import tokenfusion
from tests.parity import assert_runs
from tests.surgery.test_few_queries import DIM, FORWARD, check_original, fused, reason, tokens, unfused
from tests.surgery.test_found_classes import Changing, Holding, check_same


class OfKind(Changing):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def changed(self, x):
        return x.tanh() if self.number is True else x


def test_numbers_that_are_equal_are_not_the_same():
    fused(lambda: OfKind(1))
    assert "does not compute attention of few queries" in reason(OfKind(True))
    fused(lambda: OfKind(1.0))


def test_a_trial_keeps_nothing_of_a_module_alive():
    part = nn.Identity()
    there = weakref.ref(part)
    assert "may change without being seen" in reason(Holding(spare=[part]))
    del part
    gc.collect()
    assert there() is None


class Window(Changing):
    def changed(self, x):
        return x[:, :196]


class Long(Changing):
    def changed(self, x):
        return x if x.shape[1] < 64 else x.tanh()


class Detached(Changing):
    def changed(self, x):
        return x.detach()


class Clipped(Changing):
    """Gradients that are larger than ordinary ones."""

    def changed(self, x):
        x = x.view_as(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient.clamp(-100.0, 100.0))
        return x


class WithGradients(Changing):
    def changed(self, x):
        return x.tanh() if torch.is_grad_enabled() else x


class Counting(Changing):
    calls = 0

    def changed(self, x):
        self.calls += 1
        return x


class Keeping(Changing):
    def changed(self, x):
        self.last = x
        return x


class KeepingForPictures(Changing):
    """What it saw, where nobody trains."""

    def changed(self, x):
        if not torch.is_grad_enabled():
            self.last = x
        return x


kept: list[torch.Tensor] = []


class KeepingElsewhere(Changing):
    """What it saw, where somebody trains, in a list that is global."""

    def changed(self, x):
        if torch.is_grad_enabled():
            kept.append(x + 1.0)
        return x


class KeepingInAPart(Changing):
    def changed(self, x):
        self.kv.last = x
        return x


class KeepingInACalledPart(Changing):
    def changed(self, x):
        self.proj.last = x
        return x


class OneImage(Changing):
    def forward(self, q, x):
        return super().forward(q, x).squeeze(0)


class OneQuery(Changing):
    def forward(self, q, x):
        return super().forward(q, x).squeeze(1)


class Uncalled(Changing):
    """A hook on the projection, or an adapter in its place, would count in the fused form alone."""

    def forward(self, q, x):
        projection, self.q = self.q, nn.Identity()
        try:
            return super().forward(nn.functional.linear(q, projection.weight, projection.bias), x)
        finally:
            self.q = projection


@pytest.mark.parametrize(
    "kind",
    [
        Window,
        Long,
        Detached,
        Clipped,
        WithGradients,
        Counting,
        Keeping,
        KeepingForPictures,
        KeepingElsewhere,
        KeepingInAPart,
        KeepingInACalledPart,
    ]
    + [OneImage, OneQuery, Uncalled],
)
def test_what_one_trial_would_not_show(kind):
    assert "does not compute attention of few queries" in reason(kind())


class Limit(Changing):
    """Takes no more tokens than a number says that it holds."""

    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)

    def limit(self):
        return self.most

    def changed(self, x):
        return x[:, : self.limit()]


class LimitInTraining(Limit):
    def changed(self, x):
        return super().changed(x) if self.training else x


class OfConfiguration(Limit):
    def limit(self):
        return self.options["tokens"].most


class WithoutClassToken(Limit):
    def changed(self, x):
        return x[:, 1:] if x.shape[1] == self.patches + 1 else x


class OfGrid(Limit):
    def changed(self, x):
        rows, columns = self.grid
        return x[:, 1:] if x.shape[1] == rows * columns + 1 else x


@pytest.mark.parametrize(
    "make",
    [
        lambda: Limit(most=300),
        lambda: OfConfiguration(options={"tokens": SimpleNamespace(most=300)}),
        lambda: WithoutClassToken(patches=196),
        lambda: WithoutClassToken(patches=300.0),
        lambda: OfGrid(grid=(14, 14)),
    ],
)
def test_how_many_tokens_a_module_knows_of(make):
    assert "does not compute attention of few queries" in reason(make())


def test_how_many_tokens_a_module_knows_of_in_training():
    module, query, x = fused(lambda: LimitInTraining(most=300)), torch.randn(1, 1, DIM), torch.randn(1, 301, DIM)
    with assert_runs(FORWARD), torch.no_grad():
        module(query, x)
    check_original(module.train(), query, x)


class LongInTraining(Changing):
    """Of a bag, training takes some tokens."""

    def changed(self, x):
        return x[:, :64] if self.training and x.shape[1] > 100 else x


class OneImageInTraining(Changing):
    def changed(self, x):
        return x.tanh() if self.training and len(x) == 1 else x


class KeepingInTraining(Changing):
    def changed(self, x):
        if self.training:
            kept.append(x + 1.0)
        return x


def test_what_is_kept_elsewhere_in_training():
    module = fused(KeepingInTraining).train()
    kept.clear()
    check_original(module, tokens()[:, :1], tokens())
    assert len(kept) == 2


@pytest.mark.parametrize("kind", [LongInTraining, OneImageInTraining])
def test_what_training_does_to_long_inputs_or_to_one_image(kind):
    module = fused(kind).train()
    check_original(module, torch.randn(1, 1, DIM), torch.randn(1, 300, DIM))


class OneToken(Changing):
    def changed(self, x):
        return x.tanh() if x.shape[1] == 1 else x


def test_calls_of_fewer_tokens_than_it_was_tried_with():
    module = fused(OneToken)
    for count in (1, 4):
        check_original(module, tokens()[:, :1], tokens()[:, :count])


class Pair(NamedTuple):
    out: torch.Tensor
    weights: None


class Named(Changing):
    def forward(self, q, x):
        return Pair(super().forward(q, x), None)


def test_a_result_of_another_class():
    module = Named().eval()
    tokenfusion.fuse(module)
    assert type(module(tokens()[:, :1], tokens())) is Pair


class Cast(Changing):
    def forward(self, q, x):
        dtype = self.q.weight.dtype
        return super().forward(q.to(dtype), x.to(dtype)).to(q.dtype)


@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_that_a_class_changes(autocast):
    module = fused(Cast)
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        check_original(module, tokens(dtype=dtype)[:, :1], tokens(dtype=dtype))


class AlmostTheSame(Changing):
    """As where 1e-8 is added to a denominator: nothing in float32."""

    def forward(self, q, x):
        return super().forward(q, x) / (1 + 1e-8)


def test_what_only_float64_shows():
    module, x = fused(AlmostTheSame), tokens()
    with assert_runs(FORWARD):
        check_same(module, unfused(copy.deepcopy(module)))
    check_original(module.double(), x[:, :1].double(), x.double())


class LimitedInAutocast(Changing):
    def changed(self, x):
        return x.clamp(-1.0, 1.0) if torch.is_autocast_enabled("cpu") else x


def test_values_that_a_class_changes_under_autocast():
    module = fused(LimitedInAutocast)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_original(module, tokens()[:, :1], tokens())


class Rarely(Changing):
    """Not once in all trials, probably."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def changed(self, x):
        return x.tanh() if self.training and self.number() < 1e-3 else x


@pytest.mark.parametrize("number", [random.random, lambda: numpy.random.rand(), lambda: torch.rand(())])
def test_what_happens_rarely_in_training(number):
    check_original(fused(lambda: Rarely(number)).train(), tokens()[:, :1], tokens())


class NoiseInTraining(Changing):
    def changed(self, x):
        return x + random.random() + numpy.random.rand() if self.training else x


def test_noise_in_training():
    module, x = fused(NoiseInTraining), tokens()
    with assert_runs(FORWARD), torch.no_grad():
        module(x[:, :1], x)
    results = []
    for each in (module.train(), unfused(copy.deepcopy(module))):
        random.seed(0)
        numpy.random.seed(0)
        with assert_runs():
            results.append(each(x[:, :1], x))
    assert torch.equal(*results)


class RandomInPython(Changing):
    def changed(self, x):
        return x + random.random() + numpy.random.rand()


class Random(Changing):
    def changed(self, x):
        return x + torch.rand(())


@pytest.mark.parametrize("kind", [Random, RandomInPython, Changing])
@pytest.mark.parametrize("inference", [False, True])
def test_a_trial_leaves_nothing_behind(kind, inference):
    with torch.inference_mode(inference):
        module, hooks = kind(), []
        module.register_full_backward_hook(lambda *_: hooks.append(None))
        state, others = torch.get_rng_state(), repr((random.getstate(), numpy.random.get_state()))
        assert (reports := tokenfusion.fuse(module).modules) and reports[0].replaced is (kind is Changing)
        assert torch.equal(torch.get_rng_state(), state)
        assert repr((random.getstate(), numpy.random.get_state())) == others
    assert not hooks and all(parameter.grad is None for parameter in module.parameters())


def test_a_trial_seeds_no_gpu(monkeypatch):
    """Whose processes, each with a seed of its own, would draw the same numbers afterwards."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    assert tokenfusion.fuse(RandomInPython()).modules and tokenfusion.fuse(Changing()).replaced
    assert not seeds


def test_trials_of_several_threads():
    """One's random numbers are no other's, and nobody's afterwards."""
    modules = [type("OfItsOwn", (Changing,), {})() for _ in range(3)]
    state = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(tokenfusion.fuse, modules))
    assert all(report.replaced for report in reports)
    assert torch.equal(torch.get_rng_state(), state)


class ZeroIsPadding(Changing):
    def changed(self, x):
        return torch.where((x == 0).all(dim=-1, keepdim=True), 1.0, x)


class NumberIsPadding(Changing):
    def __init__(self):
        super().__init__()
        self.padding = -77.0

    def changed(self, x):
        return torch.where((x == self.padding).all(dim=-1, keepdim=True), 1.0, x)


class MinusOneIsPadding(Changing):
    def changed(self, x):
        return torch.where((x == -1).all(dim=-1, keepdim=True), 1.0, x)


class NothingIsThere(Changing):
    """An image without any token, as where a modality is missing."""

    def changed(self, x):
        return torch.where((x == 0).flatten(1).all(dim=1)[:, None, None], 1.0, x)


class NothingAtAll(Changing):
    def changed(self, x):
        return x if x.any() else x + 1.0


class AlmostNothing(Changing):
    def changed(self, x):
        return torch.ones_like(x) if x.abs().max() < 1e-3 else x


class Cleaned(Changing):
    def changed(self, x):
        return torch.nan_to_num(x)


class Finite(Changing):
    def changed(self, x):
        return x.masked_fill(x.isinf(), 0.0)


class Refusing(Changing):
    def changed(self, x):
        if not x.isfinite().all():
            raise ValueError("tokens are not finite")
        return x


class Limited(Changing):
    def changed(self, x):
        return x.clamp(-50.0, 50.0)


class QueryIsCleaned(Changing):
    def forward(self, q, x):
        return super().forward(torch.nan_to_num(q), x)


class AutocastInside(Changing):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, q, x):
        return super().forward(q, x)


class CastBack(AutocastInside):
    def forward(self, q, x):
        return super().forward(q, x).to(x.dtype)


class Widened(Changing):
    def forward(self, q, x):
        out = super().forward(q, x)
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out


class LimitedInHalf(Changing):
    def changed(self, x):
        return x.clamp(-1.0, 1.0) if x.dtype == torch.float16 else x


PADDED = [ZeroIsPadding, NumberIsPadding, MinusOneIsPadding, NothingIsThere, NothingAtAll, AlmostNothing]
LIMITED = [Cleaned, Finite, Refusing, Limited, QueryIsCleaned]


@pytest.mark.parametrize("kind", [*PADDED, *LIMITED, AutocastInside, CastBack, Widened, LimitedInHalf])
def test_what_ordinary_tokens_in_float64_would_not_show(kind):
    assert "does not compute attention of few queries" in reason(kind())


class Recording(Changing):
    def changed(self, x):
        RECORDED.append(x[:, :1] * 2)
        return x


RECORDED = []


def test_a_class_that_keeps_tensors_elsewhere():
    assert "does not compute attention of few queries" in reason(Recording())
