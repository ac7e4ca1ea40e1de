"""The package's CrossViT against timm's, and what it has beyond it."""

import copy

import pytest
import timm
import torch
from timm.models.crossvit import CrossAttentionBlock as TimmCrossAttentionBlock

import tokenfusion
from tests.crossvit import SIZES, randomize
from tests.models.small import small_images, small_model
from tests.parity import assert_parity, assert_runs, longest_sum
from tokenfusion.layers import CrossAttentionBlock

FORWARD, BACKWARD = "single_query_attention_cpu", "single_query_attention_backward_cpu"


@pytest.mark.parametrize("name", timm.list_models("crossvit*"))
def test_every_variant_of_timm(name):
    """Names, order and shapes of the parameters at full width, logits and features."""
    img_size = SIZES[name.rpartition("_")[2]]
    torch.manual_seed(0)
    plain = randomize(timm.create_model(name, img_size=img_size)).eval()
    model = tokenfusion.create_model(f"tokenfusion_{name}", img_size=img_size).eval()
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    assert {info["module"]: info["reduction"] for info in model.feature_info} == {
        info["module"]: info["reduction"] for info in plain.feature_info
    }
    images = torch.randn(1, 3, *plain.img_size)
    with torch.no_grad():
        with assert_runs(FORWARD):
            actual = [model(images), *model.forward_features(images)]
        unfused = [plain(images), *plain.forward_features(images)]
        plain, images = plain.double(), images.double()
        exact = [plain(images), *plain.forward_features(images)]
    for triple in zip(actual, unfused, exact, strict=True):
        assert_parity(*triple, summands=longest_sum(model))


def both(**options):
    """timm's model and the package's, with the same weights."""
    settings = {"img_size": 120, "embed_dim": (16, 24), "num_heads": (2, 3), "num_classes": 10} | options
    torch.manual_seed(0)
    plain = randomize(timm.create_model("crossvit_9_240", **settings))
    model = tokenfusion.create_model("tokenfusion_crossvit_9_240", **settings)
    model.load_state_dict(plain.state_dict())
    return plain, model


def gradients(model, images):
    logits = model(images)
    logits.square().sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if not name.endswith("wk.bias")}
    return {"logits": logits.detach()} | named


@pytest.mark.parametrize(
    "options", [{}, {"depth": ((1, 2, 1), (1, 1, 2))}, {"global_pool": "avg"}, {"crop_scale": True}], ids=str
)
def test_gradients_are_those_of_timm(options):
    plain, model = both(**options)
    images = torch.randn(2, 3, 120, 120)
    with assert_runs(FORWARD, BACKWARD):
        actual = gradients(model, images)
    unfused, exact = gradients(plain, images), gradients(copy.deepcopy(plain).double(), images.double())
    for name in exact:
        assert_parity(actual[name], unfused[name], exact[name], name, summands=longest_sum(model))


def test_dropping_is_that_of_timm():
    plain, model = both(drop_path_rate=0.5, proj_drop_rate=0.3, pos_drop_rate=0.2, drop_rate=0.2)
    rates = [
        [getattr(module, "drop_prob", None) for name, module in each.named_modules() if "drop_path" in name]
        for each in (plain, model)
    ]
    assert rates[0] == rates[1]
    images, outs = torch.randn(4, 3, 120, 120), []
    for each in (plain.train(), model.train()):
        torch.manual_seed(5)
        outs.append(each(images))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)


def test_intermediates_are_those_of_timm():
    plain, model = both()
    images = torch.randn(2, 3, 120, 120)
    for options in ({}, {"norm": True, "indices": [0, 4]}, {"output_fmt": "NLC", "stop_early": True, "indices": [1]}):
        options["intermediates_only"] = True
        expected, got = (each.eval().forward_intermediates(images, **options) for each in (plain, model))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [112, 120, 150])
def test_images_of_any_size_are_resized_for_each_branch(size):
    plain, model = both()
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


def test_logits_need_no_patches_after_the_last_encoder():
    model = small_model("crossvit")
    seen = []
    for norm in model.norm:
        norm.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    model(small_images("crossvit"))
    assert seen == [(2, 1, 16), (2, 1, 24)]


def test_unfuse_gives_the_plain_attention_and_fuse_takes_it_back():
    model, images = small_model("crossvit"), small_images("crossvit")
    expected = model(images)
    tokenfusion.unfuse(model)
    assert {type(block[0]) for block in model.blocks[1].fusion} == {TimmCrossAttentionBlock}
    with assert_runs():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert len(tokenfusion.fuse(model).replaced) == 6
    assert {type(block[0]) for block in model.blocks[1].fusion} == {CrossAttentionBlock}


def test_without_class_tokens_the_mean_of_the_patches_asks():
    model = small_model("crossvit_without_class_tokens")
    encoder = model.blocks[0]
    small, large = torch.randn(2, 16, 16), torch.randn(2, 9, 24)
    for blocks in encoder.blocks:
        blocks.__class__, blocks._modules = torch.nn.Sequential, {}  # no blocks: the fusion alone
    got = encoder([small, large])[0]
    token = encoder.projs[0](small.mean(1, keepdim=True))
    token = encoder.revert_projs[0](encoder.fusion[0](torch.cat((token, large), 1)))
    torch.testing.assert_close(got, small + token, rtol=1e-4, atol=1e-5)


def test_equal_widths_need_no_projection():
    model = small_model("crossvit_equal_widths")
    assert not [name for name, _ in model.named_parameters() if "projs" in name]


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"fusion": "sum"}, ["fusion", "'sum'", "'pairwise'"]),
        ({"tokenizer": "resnet"}, ["tokenizer", "'resnet'", "'t2t'"]),
        ({"tokenizer": "t2t", "patch_size": (8, 16)}, ["patch_size", "8", "12 or 16"]),
        ({"tokenizer": "multi_conv", "img_size": 50}, ["img_size", "50", "multiple"]),
        ({"class_token": False, "fusion": "pairwise"}, ["class_token", "pairwise", "cross_attention"]),
        ({"class_token": False, "global_pool": "token"}, ["global_pool", "'token'", "'avg'"]),
        ({"global_pool": "max"}, ["global_pool", "'max'", "one of 'token', 'avg'"]),
        ({"embed_dim": (16, 24, 32)}, ["embed_dim", "(16, 24, 32)", "2 values"]),
        ({"depth": ((1, 2),)}, ["depth", "(N, M, L)"]),
        ({"depth": ()}, ["depth", "()"]),
    ],
    ids=str,
)
def test_bad_arguments(options, parts):
    with pytest.raises(ValueError) as caught:
        small_model("crossvit", **options)
    assert all(part in str(caught.value) for part in parts)
