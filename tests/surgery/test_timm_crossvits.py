"""Drop-in parity on every CrossViT of timm: outputs, gradients, state_dict, and the way back."""

import copy

import pytest
import timm
import torch

import tokenfusion
from tests.crossvit import SIZES, fused_copy, randomize
from tests.parity import assert_parity, assert_runs, longest_sum

WHOLE = ("crossvit_9_240", "crossvit_15_dagger_408")


def logits_and_gradients(model, images):
    model.zero_grad()
    out = model(images)
    out.square().sum().backward()
    named = dict(model.named_parameters())
    chosen = [n for n in named if "fusion" in n and not n.endswith("wk.bias") or "pos_embed" in n or "patch_embed" in n]
    return {"logits": out.detach()} | {name: named[name].grad for name in chosen}


@pytest.mark.parametrize("name", timm.list_models("crossvit*"))
def test_variant(name):
    """At full width; of both sizes of images one model takes the whole, and the others take half."""
    torch.manual_seed(0)
    options = {} if name in WHOLE else {"img_size": SIZES[name.rpartition("_")[2]]}
    plain = randomize(timm.create_model(name, **options)).eval()
    fused = fused_copy(plain)
    assert len(timm.list_models("crossvit*")) == 11
    for (key, value), (other_key, other) in zip(plain.state_dict().items(), fused.state_dict().items(), strict=True):
        assert key == other_key and torch.equal(value, other)
    images = torch.randn(1, 3, *plain.img_size)
    with assert_runs("single_query_attention_cpu", "single_query_attention_backward_cpu"):
        actual = logits_and_gradients(fused, images)
    unfused = logits_and_gradients(plain, images)
    tokenfusion.unfuse(fused)
    with assert_runs(), torch.no_grad():
        torch.testing.assert_close(fused(images), unfused["logits"])
    del fused
    exact = logits_and_gradients(copy.deepcopy(plain).double(), images.double())
    for key in exact:
        assert_parity(actual[key], unfused[key], exact[key], key, summands=longest_sum(plain))
