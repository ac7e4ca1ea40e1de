"""fuse and unfuse: what they change, what they leave, and when they refuse."""

import copy
import io
import pickle

import pytest
import torch
from timm.models import cait, crossvit
from torch import nn
from torch.nn.utils import parametrize

import tokenfusion
from tests.crossvit import randomize, small_crossvit
from tests.parity import assert_runs
from tokenfusion import layers

IMAGES = torch.randn(2, 3, 48, 48)


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def test_replaces_in_place_and_back():
    model = randomize(small_crossvit()).eval()
    parameters, before, expected = dict(model.named_parameters()), classes(model), model(IMAGES)
    keys = list(model.state_dict())
    report = tokenfusion.fuse(model)
    assert not report.left
    assert {m.kind for m in report.replaced} == {"MultiScaleBlock", "CrossAttentionBlock"}
    assert len(report.replaced) == sum(
        issubclass(c, (crossvit.MultiScaleBlock, crossvit.CrossAttentionBlock)) for c in before.values()
    )
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert list(model.state_dict()) == keys
    with assert_runs("single_query_attention_cpu"):
        torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(model.blocks[0], crossvit.MultiScaleBlock)
    tokenfusion.unfuse(model)
    assert classes(model) == before
    with assert_runs():
        assert torch.equal(model(IMAGES), expected)


def test_twice_is_once():
    model = small_crossvit()
    first = tokenfusion.fuse(model)
    assert tokenfusion.fuse(model) == first


def test_a_block_inside_any_module():
    model = nn.Sequential(nn.LayerNorm(16), crossvit.CrossAttentionBlock(16, 2))
    assert [m.name for m in tokenfusion.fuse(model).replaced] == ["1"]
    block = crossvit.CrossAttentionBlock(16, 2)
    tokenfusion.fuse(block)
    assert type(block) is layers.CrossAttentionBlock


def test_optimizer_made_before_goes_on():
    model = randomize(small_crossvit())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokenfusion.fuse(model)
    before = copy.deepcopy(model.state_dict())
    model(IMAGES).square().sum().backward()
    optimizer.step()
    assert all(
        not torch.equal(before[name], value) for name, value in model.state_dict().items() if "wq.weight" in name
    )


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_compute_the_same(copied):
    model = randomize(small_crossvit()).eval()
    tokenfusion.fuse(model)
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif copied == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = small_crossvit().eval()
        other.load_state_dict(model.state_dict())
        tokenfusion.fuse(other)
    assert type(other.blocks[0]) is layers.MultiScaleBlock
    with assert_runs("single_query_attention_cpu"):
        assert torch.equal(other(IMAGES), model(IMAGES))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_log_names_a_module_of_a_copy(copied, caplog):
    model = nn.Sequential(nn.Identity(), cait.ClassAttn(16, 2))
    before = set(vars(model[1]))
    tokenfusion.fuse(model)
    other = copied(model)
    for each in (model, other):
        each[1].k.register_forward_hook(lambda *_: None)
        for _ in range(2):
            each(torch.randn(1, 3, 16))
    told = [record.getMessage() for record in caplog.records]
    assert told == ["1 (ClassAttn) runs its original forward: k has hooks, which would not run as before"] * 2
    tokenfusion.unfuse(model)
    assert set(vars(model[1])) == before


def test_train_and_eval_after_fusing():
    plain = randomize(small_crossvit(drop_path_rate=0.2))
    fused = copy.deepcopy(plain)
    tokenfusion.fuse(fused)
    for training in (True, False, True):
        outs = []
        for model in (plain, fused):
            torch.manual_seed(0)
            outs.append(model.train(training)(IMAGES))
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_attention_dropout_is_left_alone_and_reported():
    model = small_crossvit(attn_drop_rate=0.1).train()
    before = classes(model)
    report = tokenfusion.fuse(model)
    assert not report.replaced and classes(model) == before
    assert all("dropout 0.1 in training" in m.reason for m in report.left)
    assert "dropout" in str(report)
    assert tokenfusion.fuse(model.eval()).replaced
    with assert_runs():  # back in training: timm's forward
        model.train()(IMAGES)


def test_subclasses_and_changed_parts_are_left_alone():
    class Other(crossvit.CrossAttentionBlock):
        def forward(self, x):
            return x[:, :1]

    assert not tokenfusion.fuse(nn.Sequential(Other(16, 2))).modules
    block = crossvit.CrossAttentionBlock(16, 2)
    block.norm1 = nn.Identity()
    assert "norm1 is Identity" in tokenfusion.fuse(block).left[0].reason
    block = crossvit.CrossAttentionBlock(16, 2)
    block.attn = nn.Identity()
    assert "attn is Identity" in tokenfusion.fuse(block).left[0].reason
    block = crossvit.CrossAttentionBlock(16, 2)
    block.forward = lambda x: x
    assert "set on the instance" in tokenfusion.fuse(block).left[0].reason
    block = crossvit.CrossAttentionBlock(16, 2)
    block.attn.wk = nn.Sequential(block.attn.wk)
    assert "attn.wk is Sequential" in tokenfusion.fuse(block).left[0].reason
    model = small_crossvit()
    model.blocks[0].fusion[0].attn.wk.register_forward_hook(lambda *_: None)
    reasons = {m.name: m.reason for m in tokenfusion.fuse(model).left}
    assert set(reasons) == {"blocks.0", "blocks.0.fusion.0"}
    assert "hooks" in reasons["blocks.0"]
    with assert_runs("single_query_attention_cpu"):
        model.eval()(IMAGES)


def test_a_model_with_nothing_to_replace():
    model = nn.Sequential(nn.Linear(4, 4))
    report = tokenfusion.fuse(model)
    assert report.modules == ()
    assert "no module" in str(report)
    tokenfusion.unfuse(model)


def test_layers_of_the_package_s_own_are_said_to_be_fused_already():
    model = nn.Sequential(tokenfusion.layers.TiedFFN(16, 32), tokenfusion.layers.TiedFFN(16, 32), nn.Linear(16, 4))
    report = tokenfusion.fuse(model)
    assert not report.modules and report.own_layers == 2
    assert "tokenfusion's own layers (2)" in str(report)


def test_only_the_operators_asked_for():
    model = small_crossvit()
    assert tokenfusion.fuse(model, ops=[]).modules == ()
    assert tokenfusion.fuse(model, ops=(name for name in ["single_query_attention"])).replaced


@pytest.mark.parametrize(
    "arguments, error, parts",
    [
        (dict(model="crossvit_9_240"), TypeError, ["model", "str", "torch.nn.Module"]),
        (dict(ops=["attention"]), ValueError, ["ops", "attention", "single_query_attention"]),
        (dict(ops=["attention", 3]), ValueError, ["ops", "attention", "3"]),
        (dict(ops="single_query_attention"), TypeError, ["ops", "collection"]),
        (dict(ops=3), TypeError, ["ops", "collection"]),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(arguments, error, parts):
    model = small_crossvit()
    before = classes(model)
    with pytest.raises(error) as caught:
        tokenfusion.fuse(**({"model": model} | arguments))
    assert all(part in str(caught.value) for part in parts)
    assert classes(model) == before


def test_strict_replaces_all_or_nothing():
    model = small_crossvit()
    model.blocks[1].fusion[0][0].norm1 = nn.Identity()
    before = classes(model)
    with pytest.raises(ValueError, match="blocks.1.fusion.0.0.*norm1 is Identity"):
        tokenfusion.fuse(model, strict=True)
    assert classes(model) == before


def test_unfuse_wants_a_module():
    with pytest.raises(TypeError, match="model: got str"):
        tokenfusion.unfuse("crossvit")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda block: setattr(block, "forward", block.forward), "its forward was set on the instance"),
        (lambda block: parametrize.register_parametrization(block, "gamma_1", nn.Identity()), "it is parametrized"),
    ],
)
def test_what_holds_on_to_the_fused_forward_is_named_by_unfuse(change, reason):
    model = nn.Sequential(cait.LayerScaleBlockClassAttn(16, 2), cait.LayerScaleBlockClassAttn(16, 2))
    tokenfusion.fuse(model)
    change(model[1])
    before = classes(model)
    with pytest.raises(ValueError, match=f"1 cannot be unfused: {reason}"):
        tokenfusion.unfuse(model)
    assert classes(model) == before
