"""What timm expects of a model, for every model of the package in a small setting."""

import copy
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import tokenfusion
from tests.models.small import COMPILED, FUSED_AFTER_BLOCKS, OTHER_POOL, SMALL, small_images, small_model
from tests.parity import assert_parity

every_model = pytest.mark.parametrize("key", SMALL)


def test_listed_and_registered():
    names = tokenfusion.list_models()
    assert {name for name, _ in SMALL.values()} <= set(names)
    assert all(timm.is_model(name) for name in names)
    of_timm = set(timm.list_modules())
    for name in names:
        module = timm.models._registry._model_to_module[name]
        assert module in of_timm and all(other in names for other in timm.list_models(module=module))
    assert tokenfusion.list_models("*no_such*") == []
    assert "crossvit_15_240" not in names


def test_the_registry_is_walked_once(monkeypatch):
    names = tokenfusion.list_models()
    monkeypatch.setattr(timm, "list_models", None)
    assert tokenfusion.list_models() == names
    assert tokenfusion.list_models("dynamixer_*") == ["dynamixer_l", "dynamixer_m", "dynamixer_s"]


@pytest.mark.parametrize("name", ["tokenfusion_crossvit_51_240", "crossvit_15_240"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=f"name: got {name!r}.*tokenfusion_crossvit_15_240"):
        tokenfusion.create_model(name)


@pytest.mark.parametrize("key", ["crossvit", "token_fusion_late"])
def test_initial_values_hang_on_the_seed_alone(key, monkeypatch):
    """And not on the order of a set of names, which is another in each process."""
    name, settings = SMALL[key]
    model = small_model(key)
    names = sorted(model.no_weight_decay())
    made = []
    for order in (names, names[::-1]):
        monkeypatch.setattr(type(model), "no_weight_decay", lambda self, order=order: order)
        torch.manual_seed(0)
        made.append(tokenfusion.create_model(name, **settings).state_dict())
    assert len(names) > 1 and all(torch.equal(value, made[1][key]) for key, value in made[0].items())


@every_model
def test_every_parameter_receives_a_gradient(key):
    model = small_model(key).train()
    model(small_images(key)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # the keys' bias cancels in the softmax; a second cross-attention has a softmax over one key
        assert parameter.grad.any() or re.search(r"wk\.bias$|fusion\.\d\.1\.attn\.w[qk]\.", name), name


@every_model
@pytest.mark.parametrize("rates", [{}, {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "drop_rate": 0.2}], ids=str)
def test_checkpointed_equals_plain(key, rates):
    results = []
    for checkpointed in (False, True):
        model, images = small_model(key, **rates).train(), small_images(key, batch=4)
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(3)
        logits = model(images)
        logits.square().sum().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


@every_model
def test_checkpointing_holds_less(key):
    """Fewer tensors for the backward pass; how many fewer is a matter of the setting."""
    held = []
    for checkpointed in (False, True):
        model, saved = small_model(key).train(), []
        model.set_grad_checkpointing(checkpointed)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t):
            model(small_images(key))
        held.append(sum(saved))
    assert held[1] < held[0]


@every_model
def test_dropping_in_training_alone(key):
    rates = {"drop_path_rate": 0.5, "proj_drop_rate": 0.5, "drop_rate": 0.5}
    model, images = small_model(key, **rates), small_images(key, batch=4)
    assert torch.equal(model(images), model(images))
    torch.testing.assert_close(model(images), small_model(key)(images))
    model.train()
    assert not torch.equal(model(images), model(images))


@every_model
def test_inference_equals_training(key):
    """The faster forms of inference against the modules with gradients."""
    model = small_model(key)
    for batch in (1, 9):
        images = small_images(key, batch=batch)
        exact = copy.deepcopy(model).double()(images.double()).detach()
        plain = model(images).detach()
        with torch.inference_mode():
            got = model(images)
        assert_parity(got.clone(), plain, exact)


@every_model
def test_features_head_and_classifier(key):
    model, images = small_model(key), small_images(key)
    logits = model(images)
    assert logits.shape == (2, model.num_classes)
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features), logits)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features) and model.num_features == model.head_hidden_size
    assert model.get_classifier() is model.head

    model.reset_classifier(7)
    assert model.num_classes == 7 and model(images).shape == (2, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), pooled)
    assert not list(model.get_classifier().parameters())
    assert small_model(key, num_classes=0)(images).shape == pooled.shape
    pool = OTHER_POOL.get(key, "avg")
    model.reset_classifier(5, pool)
    assert model.global_pool == pool and model(images).shape == (2, 5)
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), model(images))
    with pytest.raises(ValueError, match="global_pool: got 'max'"):
        model.reset_classifier(5, "max")


@every_model
def test_intermediates(key):
    model, images = small_model(key), small_images(key)
    final, features = model.forward_intermediates(images)
    assert len(features) == len(model.feature_info)
    for info, feature in zip(model.feature_info, features, strict=True):
        assert feature.shape[:2] == (2, info["num_chs"]) and feature.ndim == 4
        assert model.get_submodule(info["module"]) is not None
    for got, expected in zip(final, model.forward_features(images), strict=True):
        torch.testing.assert_close(got, expected)
    (last,) = model.forward_intermediates(images, indices=[-1], norm=True, output_fmt="NLC", intermediates_only=True)
    if key not in FUSED_AFTER_BLOCKS:
        tokens = final[-1] if isinstance(final, list) else final.flatten(1, -2)
        torch.testing.assert_close(last, tokens[:, -last.shape[1] :])
    early = model.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], features[0])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(images, output_fmt="NHWC")

    before = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
    assert sum(p.numel() for p in model.parameters()) < before
    torch.testing.assert_close(model.forward_intermediates(images, [0], intermediates_only=True)[0], features[0])


@every_model
def test_pruned_model_runs(key):
    """Whatever was removed, the final features fit the norm, the pool and a new head."""
    whole, images = small_model(key), small_images(key)
    for index, info in enumerate(whole.feature_info):
        model = copy.deepcopy(whole)
        model.prune_intermediate_layers([index])
        final, features = model.forward_intermediates(images, [index])
        torch.testing.assert_close(model.forward_features(images), final)
        assert features[0].shape[1] == info["num_chs"]
        model.reset_classifier(7, OTHER_POOL.get(key, "avg"))
        assert model(images).shape == (2, 7)
        assert model.forward_head(final, pre_logits=True).shape == (2, model.head_hidden_size)


@every_model
def test_features_only(key):
    name, settings = SMALL[key]
    extractor = tokenfusion.create_model(name, features_only=True, **settings).eval()
    features = extractor(small_images(key))
    assert [feature.shape[1] for feature in features] == extractor.feature_info.channels()
    pruned = tokenfusion.create_model(name, features_only=True, out_indices=(0,), **settings).eval()
    assert len(pruned(small_images(key))) == 1


@every_model
def test_optimizer_groups(key):
    model = small_model(key)
    names = {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    assert {name for name in names if "pos_embed" in name or "cls_token" in name} <= model.no_weight_decay()
    create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.7)
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert len({group["lr_scale"] for group in groups}) > 2


@every_model
def test_state_dict_round_trip(key, tmp_path):
    model, images = small_model(key), small_images(key)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    name, settings = SMALL[key]
    other = tokenfusion.create_model(name, checkpoint_path=tmp_path / "model.safetensors", **settings).eval()
    assert torch.equal(other(images), model(images))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


@pytest.mark.parametrize("key", COMPILED)
def test_one_graph_and_export(key):
    torch.compiler.reset()
    model, images = small_model(key), small_images(key)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)


@every_model
def test_construction_arguments(key):
    name, settings = SMALL[key]
    model = tokenfusion.create_model(name, in_chans=5, dtype=torch.bfloat16, norm_layer=nn.LayerNorm, **settings)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(1, 5, *small_images(key).shape[2:], dtype=torch.bfloat16)).shape == (1, model.num_classes)
    with torch.device("meta"):
        on_meta = [tokenfusion.create_model(name, **settings)]
    on_meta.append(tokenfusion.create_model(name, device="meta", **settings))
    assert all(tensor.is_meta for made in on_meta for tensor in made.state_dict().values())
    assert model.pretrained_cfg["architecture"] == name and model.in_chans == 5


@every_model
def test_copies(key):
    model, images = small_model(key), small_images(key)
    assert torch.equal(copy.deepcopy(model)(images), model(images))
