"""fuse on DynaMixer's modules as other people's code has them: found by structure, tried out, replaced, restored."""

import copy
import io
import pickle

import pytest
import torch
from timm.layers import Mlp
from torch import nn

import tokenfusion
from tests.crossvit import randomize
from tests.models.test_dynamixer import images, small
from tests.parity import assert_parity, assert_runs
from tokenfusion.kernels import extension
from tokenfusion.models.dynamixer_reference import PlainBlock, PlainOp, plain

FORWARD, BACKWARD = "dynamic_mixing_cpu", "dynamic_mixing_backward_cpu"


class SomebodysOp(PlainOp):
    """A class that the package does not know; its module stands for the official code."""


class SomebodysBlock(PlainBlock):
    resolution = "its own meaning"


def block(resolution=(6, 5), **parts: nn.Module) -> SomebodysBlock:
    torch.manual_seed(0)
    made = SomebodysBlock(16, resolution, 4, 2)
    for name, part in parts.items():
        setattr(made, name, part)
    return randomize(made)


def sums(dtype: torch.dtype) -> list[str]:
    return ["gated_sum_out_cpu"] if dtype in extension.own_product_dtypes() else []


def tokens(batch: int = 3, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, 6, 5, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)


def outputs_and_gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype))
    return [out.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def reason(module: nn.Module) -> str:
    """Why it is left alone, alone or as part of a model; it is then as it was."""
    before = {name: type(part) for name, part in module.named_modules()}
    (report,) = [each for each in tokenfusion.fuse(module).modules if each.name == ""]
    assert type(module) is before[""]
    return report.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_computes_the_same(dtype):
    module = block().to(dtype)
    fused = copy.deepcopy(module)
    report = tokenfusion.fuse(fused, strict=True)
    assert [(m.name, m.kind, m.op, m.reason) for m in report.modules] == [
        ("", "SomebodysBlock", "dynamic_mixing", None)
    ]
    assert isinstance(fused, SomebodysBlock) and fused.state_dict().keys() == module.state_dict().keys()
    with assert_runs(FORWARD, BACKWARD, *sums(dtype)):
        actual = outputs_and_gradients(fused, tokens().to(dtype))
    exact = outputs_and_gradients(copy.deepcopy(module).double(), tokens().to(dtype).double())
    for got, unfused, expected in zip(actual, outputs_and_gradients(module, tokens().to(dtype)), exact, strict=True):
        assert_parity(got, unfused, expected)


def test_reweighting_of_another_activation_is_kept():
    module = block(reweight=Mlp(16, 4, 48, act_layer=nn.ReLU))
    expected = module(tokens())
    tokenfusion.fuse(module, strict=True)
    torch.testing.assert_close(module(tokens()), expected)


def test_an_operation_by_itself():
    module = randomize(SomebodysOp(16, 5, 4, 2))
    fused = nn.Sequential(copy.deepcopy(module))
    assert [m.kind for m in tokenfusion.fuse(fused, strict=True).replaced] == ["SomebodysOp"]
    x = tokens()[0]
    with torch.no_grad(), assert_runs(FORWARD):
        got = fused(x)
    assert_parity(got, module(x).detach(), copy.deepcopy(module).double()(x.double()).detach())


def test_a_whole_model():
    model = plain(small()).eval()
    fused = copy.deepcopy(model)
    report = tokenfusion.fuse(fused, strict=True)
    assert [m.name for m in report.replaced] == [f"network.{i}.0.attn" for i in (0, 2, 3, 4)]
    x = images(model)
    with torch.no_grad(), assert_runs(FORWARD, *sums(x.dtype)):
        assert_parity(fused(x), model(x), copy.deepcopy(model).double()(x.double()))
    assert not tokenfusion.fuse(small()).modules  # the package's own layers need no replacement


def test_parameters_and_results_come_back():
    module = block()
    before, parameters = copy.deepcopy(module), list(module.parameters())
    for _ in range(2):
        assert tokenfusion.fuse(module).replaced
        assert tokenfusion.fuse(module, strict=True).replaced  # twice is once
        assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
        tokenfusion.unfuse(module)
        assert [type(part) for part in module.modules()] == [type(part) for part in before.modules()]
        assert torch.equal(module(tokens()), before(tokens()))
        tokenfusion.unfuse(module)
    assert vars(module).keys() == vars(before).keys()
    assert module.resolution == "its own meaning"


def test_the_random_numbers_and_modes_of_the_caller_stay():
    module = block().train()
    module.mlp_c.requires_grad_(False)
    module.proj.eval()
    state = torch.get_rng_state()
    assert tokenfusion.fuse(module).replaced
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training and not module.proj.training and not module.mlp_c.weight.requires_grad
    assert module.proj.weight.grad is None


@pytest.mark.parametrize("where", ["meta", "empty weights", "default device", "backend"])
def test_the_trial_needs_nothing_of_its_surroundings(where):
    module = block()
    if where == "meta":
        module.to("meta")
    if where == "empty weights":
        module.load_state_dict({name: torch.zeros_like(value) for name, value in module.state_dict().items()})
    with torch.device("meta" if where == "default device" else "cpu"):
        with tokenfusion.backend("cuda" if where == "backend" else "auto"):
            assert tokenfusion.fuse(module).replaced


@pytest.mark.parametrize("fused_first", [True, False])
def test_copies_and_pickles(fused_first):
    module = block()
    expected = module(tokens())
    if fused_first:
        tokenfusion.fuse(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert type(other) is type(module)
        torch.testing.assert_close(other(tokens()), expected)
        tokenfusion.unfuse(other)
        assert type(other) is SomebodysBlock and type(other.mix_h) is PlainOp


def test_one_graph():
    module = block()
    expected = module(tokens())
    tokenfusion.fuse(module)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens()), expected)


class OverTargets(PlainOp):
    """The softmax over the other axis."""

    def forward(self, x):
        lines, length, dim = x.shape
        flat = self.compress(x).view(lines, length, self.num_head, -1).transpose(1, 2).flatten(2)
        matrices = self.generate(flat).view(lines, self.num_head, length, length).softmax(dim=-1)
        mixed = x.view(lines, length, self.num_head, -1).permute(0, 2, 3, 1) @ matrices
        return self.out(mixed.permute(0, 3, 1, 2).reshape(lines, length, dim))


class ChannelMajor(PlainOp):
    """Segments of every S-th channel."""

    def forward(self, x):
        order = torch.arange(x.shape[-1]).view(-1, self.num_head).T.flatten()
        return super().forward(x[..., order])


class WithResidual(SomebodysBlock):
    def forward(self, x):
        return x + super().forward(x)


class OfTwoInputs(SomebodysBlock):
    def forward(self, x, mask):
        return super().forward(x) * mask


class Failing(SomebodysBlock):
    def forward(self, x):
        raise NotImplementedError("only on\nsome other device")


OTHER_RESULTS = "its forward does not compute what the official code's does"


@pytest.mark.parametrize(
    "module, message",
    [
        (block(mix_h=OverTargets(16, 6, 4, 2)), OTHER_RESULTS),
        (block(mix_w=ChannelMajor(16, 5, 4, 2)), OTHER_RESULTS),
        (WithResidual(16, (6, 5), 4), OTHER_RESULTS),
        (OverTargets(16, 6, 4, 2), OTHER_RESULTS),
        (OfTwoInputs(16, (6, 5), 4), "its forward cannot be tried out: TypeError: "),
        (Failing(16, (6, 5), 4), "its forward cannot be tried out: NotImplementedError: only on"),
        (block(proj=nn.Linear(16, 16, bias=False)), "other parameters than the official code's: proj.bias"),
        (block(mlp_c=nn.Linear(16, 16)), "other parameters than the official code's: mlp_c.bias"),
        (block(proj_drop=nn.Dropout(0.1)), "proj_drop: dropout 0.1"),
        (block(more=nn.BatchNorm1d(3)), "other parameters than the official code's: more.bias"),
        (block(mlp_c=nn.utils.parametrizations.weight_norm(nn.Linear(16, 16, bias=False))), "mlp_c is Parametrized"),
    ],
)
def test_what_is_left_alone(module, message):
    assert message in reason(module)
    with pytest.raises(ValueError, match="strict"):
        tokenfusion.fuse(module, strict=True)


@pytest.mark.parametrize("part", ["mix_h", "mix_h.generate", "proj"])
def test_watched_parts_are_left_alone(part):
    module = block()
    handle = module.get_submodule(part).register_forward_hook(lambda *_: None)
    assert reason(module) == f"{part} has hooks, which would not run as before"
    handle.remove()
    module.get_submodule(part).forward = lambda x: x
    assert reason(module) == f"{part} has its forward set on the instance"


def test_operations_of_a_block_that_is_left_alone():
    module = block(proj_drop=nn.Dropout(0.1)).eval()
    expected = module(tokens())
    assert [m.name for m in tokenfusion.fuse(module).replaced] == ["mix_h", "mix_w"]
    with assert_runs(FORWARD, "dynamic_mixing_backward_cpu"):
        out = module(tokens())
        out.sum().backward()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "sizes",
    [
        {"generate": (12, 25)},  # N * d is no multiple of N
        {"generate": (10, 24)},  # no square
        {"compress": (16, 7)},  # S * d is no multiple of d
        {"out": (16, 8)},
        {"compress": (16, 10)},  # S = 5 does not divide D
    ],
    ids=str,
)
def test_other_structures_are_not_known(sizes):
    op = PlainOp(16, 5, 4, 2)
    for name, shape in sizes.items():
        setattr(op, name, nn.Linear(*shape))
    assert not tokenfusion.fuse(op).modules


def test_ops_can_be_chosen():
    assert not tokenfusion.fuse(block(), ops=["single_query_attention"]).modules
    assert tokenfusion.fuse(block(), ops=["dynamic_mixing"]).replaced
