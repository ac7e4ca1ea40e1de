"""Drop-in on a small model of each of timm's families beside CrossViT: parity, state, copies, compilation."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tokenfusion
from tests.crossvit import fused_copy
from tests.drop_in import BACKWARD, FORWARD, check_drop_in
from tests.parity import assert_parity, assert_runs
from tests.surgery.families import FAMILIES, images, small_model

REPLACED = {
    "cait": {"blocks_token_only.0": "LayerScaleBlockClassAttn", "blocks_token_only.1": "LayerScaleBlockClassAttn"},
    "xcit": {"cls_attn_blocks.0.attn": "ClassAttn", "cls_attn_blocks.1.attn": "ClassAttn"},
    "volo": {"post_network.0": "ClassBlock", "post_network.1": "ClassBlock"},
    "siglip": {"attn_pool": "AttentionPoolLatent"},
    "pe": {"attn_pool": "AttentionPoolLatent"},
    "naflex": {"attn_pool": "AttentionPoolLatent"},
    "clip resnet": {"head": "AttentionPool2d"},
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_what_is_replaced(family):
    report = tokenfusion.fuse(small_model(family), strict=True)
    assert {module.name: module.kind for module in report.modules} == REPLACED[family]


@every_family
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_in(family, dtype, training):
    model = small_model(family).train(training).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # statistics of two images would magnify the rounding of everybody
    check_drop_in(model, images(family).to(dtype))


@every_family
def test_every_parameter_has_a_gradient(family):
    model = fused_copy(small_model(family))
    model(images(family)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@every_family
def test_autocast(family):
    plain = small_model(family).eval()
    fused, x = fused_copy(plain), images(family)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            unfused = plain(x)
            with assert_runs(FORWARD):
                actual = fused(x)
    assert_parity(actual, unfused, exact)


@every_family
@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_compute_the_same(family, copied):
    model = small_model(family).eval()
    tokenfusion.fuse(model)
    other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    with assert_runs(FORWARD), torch.no_grad():
        assert torch.equal(other(images(family)), model(images(family)))


@every_family
@pytest.mark.parametrize("training", [False, True])
def test_one_graph(family, training):
    torch.compiler.reset()
    plain, x = small_model(family).eval(), images(family)
    fused = fused_copy(plain)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training), assert_runs(*((FORWARD, BACKWARD) if training else (FORWARD,))):
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
