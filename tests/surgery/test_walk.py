"""Random sequences of fuse, unfuse and changes: the model gives what one gives that was never fused."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tokenfusion
from tests.surgery.subjects import SUBJECTS

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def _halve(module: nn.Module, args: tuple) -> tuple:
    return tuple(0.5 * each for each in args)


class _Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Walk:
    """A model with the way back from each change; `linear` is one that the fused forward does not call, if any."""

    def __init__(self, kind: str):
        self.subject = SUBJECTS[kind]
        self.model = self.subject.model()

    @property
    def linear(self) -> nn.Module:
        return self.model.get_submodule(f"module.{(self.subject.weighted or self.subject.others)[-1]}")

    def fuse(self):
        tokenfusion.fuse(self.model)

    def unfuse(self):
        tokenfusion.unfuse(self.model)

    def copy(self):
        self.model = copy.deepcopy(self.model)

    def pickle(self):
        self.model = pickle.loads(pickle.dumps(self.model))

    def train(self):
        self.model.train(not self.model.training)

    def dtype(self):
        double = self.linear.weight.dtype == torch.float64
        self.model.to(torch.float32 if double else torch.float64)

    def freeze(self):
        weight = self.linear.weight
        weight.requires_grad_(not weight.requires_grad)

    def hook(self):
        hooks = self.linear._forward_pre_hooks
        if hooks:
            hooks.clear()
        else:
            self.linear.register_forward_pre_hook(_halve)

    def swap(self):
        if type(self.linear) is nn.Linear:
            self.linear.__class__ = _Doubling
        elif type(self.linear) is _Doubling:
            self.linear.__class__ = nn.Linear

    def dropout(self):
        if self.subject.dropout:
            layer = self.model.get_submodule(f"module.{self.subject.dropout}")
            layer.p = 0.4 - layer.p

    def step(self):
        """Those of SGD."""
        self.results()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad

    def results(self, run=None) -> dict[str, torch.Tensor]:
        x = self.subject.inputs().to(self.linear.weight.dtype).requires_grad_()
        self.model.zero_grad()
        torch.manual_seed(0)
        out = (self.model if run is None else run)(x)
        out.backward(torch.linspace(-1, 1, out.numel()).to(out).view_as(out))
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return {"out": out.detach(), "input": x.grad, **gradients}

    def compiled(self) -> dict[str, torch.Tensor]:
        torch.compiler.reset()
        return self.results(torch.compile(self.model, backend="eager"))


CHANGES = ("copy", "pickle", "train", "dtype", "freeze", "hook", "swap", "dropout", "step")
FUSING = ("fuse", "unfuse")


@hypothesis.settings(max_examples=40, derandomize=True, deadline=None, database=None)
@hypothesis.given(
    st.sampled_from(sorted(SUBJECTS)),
    st.lists(st.sampled_from(CHANGES + FUSING), min_size=3, max_size=8),
    st.integers(0, 19),
)
def test_always_the_results_of_the_plain_model(kind, steps, compiles):
    plain, fused = Walk(kind), Walk(kind)
    fused.fuse()
    for step in steps:
        getattr(fused, step)()
        if step not in FUSING:
            getattr(plain, step)()
        compare(fused.results(), plain.results())
    if compiles == 0:
        compare(fused.compiled(), plain.results())
    fused.unfuse()
    assert [type(module) for module in fused.model.modules()] == [type(module) for module in plain.model.modules()]
    assert fused.model.state_dict().keys() == plain.model.state_dict().keys()


def compare(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5 * max(1.0, value.abs().max().item()))
