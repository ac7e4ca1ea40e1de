"""DynaMixer classes that nobody here has read: what they hold counts, and what they do in training."""

import copy
import gc
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

import tokenfusion
from tests.parity import assert_runs
from tests.surgery.test_dynamixer import FORWARD, OTHER_RESULTS, SomebodysBlock, reason
from tokenfusion.layers import dynamixer
from tokenfusion.models.dynamixer_reference import PlainBlock, PlainOp


class Op(PlainOp):
    """With a temperature, its softmax as a part, and a method of a name that the package's operation has, too."""

    def __init__(self, dim=16, seq_len=5, num_head=4, reduced_dim=2):
        super().__init__(dim, seq_len, num_head, reduced_dim)
        self.reduced_dim, self.tau, self.softmax = reduced_dim, 1.0, nn.Softmax(dim=-2)

    def matrices(self, x):
        lines, length, _ = x.shape
        compressed = self.compress(x).reshape(lines, length, self.num_head, -1).transpose(1, 2).flatten(2)
        tau = getattr(self.generate, "tau", self.tau)
        return self.softmax(self.generate(compressed).reshape(lines, self.num_head, length, length) / tau)

    def mix(self, x, matrices):
        segments = x.unflatten(-1, (self.num_head, -1)).permute(0, 2, 3, 1) @ matrices
        return segments.permute(0, 3, 1, 2).flatten(2)

    def forward(self, x):
        return self.out(self.mix(x, self.matrices(x)))


class Twice(Op):
    def forward(self, x):
        return 2 * super().forward(x)


class Block(SomebodysBlock):
    def __init__(self):
        super().__init__(16, 5, 4)
        self.mix_h, self.mix_w = Op(), Op()
        self.alpha, self.resolution = 1.0, 5

    def forward(self, x):
        return getattr(self.proj, "alpha", self.alpha) * super().forward(x)


def x_of(module: nn.Module, batch: int = 3) -> torch.Tensor:
    sizes = (5, 16) if isinstance(module, PlainOp) else (5, 5, 16)
    return torch.randn(batch, *sizes, generator=torch.Generator().manual_seed(1))


def resize(op: Op) -> None:
    op.num_head, op.reduced_dim, op.generate = 2, 4, nn.Linear(20, 25)


CHANGES = {
    "an attribute": (Op, lambda op: setattr(op, "tau", 0.1)),
    "an attribute of a part": (Op, lambda op: setattr(op.generate, "tau", 0.1)),
    "sizes": (Op, resize),
    "a hook on the softmax": (Op, lambda op: op.softmax.register_forward_hook(lambda *_: _[2] * 2)),
    "another softmax": (Op, lambda op: setattr(op, "softmax", nn.Softmax(dim=-1))),
    "a hook": (Op, lambda op: op.compress.register_forward_hook(lambda *_: _[2] * 2)),
    "a hook on the result": (Op, lambda op: op.out.register_forward_hook(lambda *_: _[2] * 2)),
    "an attribute of a part of the block": (Block, lambda block: setattr(block.proj, "alpha", 0.5)),
    "an attribute of the block": (Block, lambda block: setattr(block, "alpha", 0.5)),
    "a number in the place of sizes": (Block, lambda block: setattr(block, "resolution", 7)),
    "an attribute of an operation": (Block, lambda block: setattr(block.mix_h, "tau", 0.1)),
    "another operation": (Block, lambda block: setattr(block, "mix_h", Twice())),
}


@pytest.mark.parametrize("kind, change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("copied", [False, True])
def test_all_that_a_module_holds_counts(kind, change, copied):
    torch.manual_seed(0)
    plain = kind().eval()
    module = copy.deepcopy(plain)
    assert tokenfusion.fuse(module).replaced
    module = copy.deepcopy(module) if copied else module
    with torch.no_grad(), assert_runs(FORWARD, *["gated_sum_out_cpu"] * (kind is Block)):
        torch.testing.assert_close(module(x_of(plain)), plain(x_of(plain)))
    for each in (plain, module):
        torch.manual_seed(1)
        change(each)
    torch.testing.assert_close(module(x_of(plain)), plain(x_of(plain)))


def test_what_its_class_holds_counts():
    module = Op().eval()
    tokenfusion.fuse(module, strict=True)
    with mock.patch.object(Op, "mix", lambda op, x, matrices: 0 * x), assert_runs():
        torch.testing.assert_close(module(x_of(module)), module.out.bias.expand(3, 5, 16))


def test_attributes_are_the_class_own():
    module = Block()
    tokenfusion.fuse(module, strict=True)
    assert module.resolution == 5 and module.mix_h.tau == 1.0 and not hasattr(module, "dim")


class AsksForItsClass(Op):
    def forward(self, x):
        return super(type(self), self).forward(x)


class AsksInTraining(Op):
    def forward(self, x):
        return super().forward(-x if self.training and type(self) is AsksInTraining else x)


@pytest.mark.parametrize("kind", [AsksForItsClass, AsksInTraining])
def test_a_forward_that_asks_for_its_class(kind):
    assert OTHER_RESULTS in reason(kind())


class OfKind(Op):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return super().forward(-x if self.number is True else x)


def test_numbers_that_are_equal_are_not_the_same():
    assert tokenfusion.fuse(OfKind(1)).replaced
    assert OTHER_RESULTS in reason(OfKind(True))


class Holding(Op):
    def __init__(self, held):
        super().__init__()
        self.held = [held]


def test_a_trial_keeps_nothing_of_a_module_alive():
    part = nn.Identity()
    there = weakref.ref(part)
    assert "may change without being seen" in reason(Holding(part))
    del part
    gc.collect()
    assert there() is None


class FunctionalDropout(Op):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Paths(Op):
    def __init__(self, *args):
        super().__init__(*args)
        self.drop_path = DropPath(0.5)

    def forward(self, x):
        return self.drop_path(super().forward(x))


class Noise(Op):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x) if self.training else x)


class PathsOfBlock(PlainBlock):
    def __init__(self):
        super().__init__(16, 5, 4)
        self.drop_path = DropPath(0.5)

    def forward(self, x):
        return self.drop_path(super().forward(x))


@pytest.mark.parametrize("kind", [FunctionalDropout, Paths, Noise, PathsOfBlock])
@pytest.mark.parametrize("part", ["", "drop_path"])
def test_training_that_is_another_one(kind, part):
    module = kind().eval()
    tokenfusion.fuse(module, strict=True)
    x = x_of(module, 8)
    with torch.no_grad(), assert_runs(FORWARD, *["gated_sum_out_cpu"] * isinstance(module, PlainBlock)):
        module(x)
    if part and not hasattr(module, part):
        pytest.skip("has no such part")
    module.get_submodule(part).train()
    plain, results = copy.deepcopy(module), []
    tokenfusion.unfuse(plain)
    for each in (module, plain):
        torch.manual_seed(0)
        results.append(each(x))
    torch.testing.assert_close(*results)


class Detached(Op):
    def matrices(self, x):
        return super().matrices(x.detach())


def test_gradients_count():
    assert reason(Detached()) == OTHER_RESULTS


class OfOneInput(Op):
    def forward(self, x, mask=None):
        return super().forward(x)


def test_more_arguments_are_not_known():
    assert "its forward takes x, mask" in reason(OfOneInput())


class Reweight(nn.Module):
    def __init__(self, part: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = part.fc1, part.fc2

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class OfBatch(Reweight):
    def forward(self, x):
        return super().forward(x - x.mean(dim=0))


def centred(part, args, out):
    return out - out.mean(dim=0)


@pytest.mark.parametrize(
    "kind, change, pieces",
    [
        (Reweight, None, 3),
        (Reweight, lambda part: part.register_forward_hook(centred), 1),
        (Reweight, lambda part: part.fc2.register_forward_hook(centred), 1),
        (Reweight, lambda part: setattr(part, "late", 1), 1),
        (Reweight, lambda part: part.train(), 1),
        (OfBatch, None, 1),
    ],
)
def test_a_reweighting_gets_pieces_where_it_cannot_tell(monkeypatch, kind, change, pieces):
    monkeypatch.setattr(dynamixer, "_PIECE_BYTES", 1)
    torch.manual_seed(0)
    plain = PlainBlock(16, 5, 4).eval()
    plain.reweight = kind(plain.reweight).eval()
    module = copy.deepcopy(plain)
    tokenfusion.fuse(module, strict=True)
    for each in (plain, module):
        if change is not None:
            change(each.reweight)
    with torch.no_grad(), mock.patch.object(dynamixer, "_run", wraps=dynamixer._run) as runs:
        torch.testing.assert_close(module(x_of(plain)), plain(x_of(plain)))
    assert runs.call_count == pieces


def test_a_hook_on_the_own_reweighting_sees_the_batch_once(monkeypatch):
    monkeypatch.setattr(dynamixer, "_PIECE_BYTES", 1)
    module, seen = dynamixer.DynaMixerBlock(16, 5, 4).eval(), []
    module.reweight.register_forward_hook(lambda part, args, out: seen.append(len(out)))
    with torch.no_grad():
        module(x_of(module))
    assert seen == [3]


def test_attributes_of_the_fused_class_names():
    op = Op()
    op.details = "its own"
    assert reason(op) == "it has attributes of the names that its fused class has: details"


def test_a_module_that_its_fused_class_makes():
    module = Op().eval()
    tokenfusion.fuse(module, strict=True)
    other = type(module)().eval()
    other.load_state_dict(module.state_dict())
    for each in (other, copy.deepcopy(other)):
        with assert_runs():
            each(x_of(module))
        torch.testing.assert_close(each(x_of(module)), module(x_of(module)))
