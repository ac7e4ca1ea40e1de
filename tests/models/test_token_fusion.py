"""Token Fusion: parameters and multiply-adds of the paper's tables, every setting, and what timm expects of a model."""

import copy
import pickle

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion
from tests.models.small import TOKEN_FUSION as SMALL
from tests.parity import assert_runs
from tokenfusion.kernels.upconv.project import op as project_op

NAMES = ("late", "early", "layerwise")
SETTINGS = [
    ("late", {}),
    ("late", {"join": "add"}),
    ("late", {"up": "copy"}),
    ("late", {"up": "copy", "join": "add"}),
    ("late", {"up_kernel": 4}),
    ("late", {"up_kernel": 4, "join": "add"}),
    ("early", {}),
    ("early", {"up": "copy"}),
    ("early", {"bridges": "single"}),
    ("early", {"up": "copy", "bridges": "single"}),
    ("layerwise", {}),
    ("layerwise", {"class_token": True}),
]
every_setting = pytest.mark.parametrize("name, options", SETTINGS, ids=str)
every_model = pytest.mark.parametrize("name", NAMES)


def small(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return tokenfusion.create_model(f"token_fusion_{name}", **(SMALL | options)).eval()


def images(batch: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


# Parameters, and multiply-adds in G with up-convolutions and 1x1 convolutions one after the other. The late model's
# kernel is 2 where nothing is said.
TABLE = [
    ("late", {"global_pool": "token"}, 134_233_544, 21.24),
    ("late", {}, 135_573_544, 21.24),
    ("late", {"global_pool": "mixing"}, 135_769_544, 21.24),
    ("late", {"up_kernel": 4}, 142_651_432, 21.59),
    ("late", {"up_kernel": 4, "join": "add"}, 141_883_432, 21.59),
    ("late", {"up": "copy"}, 133_213_480, 21.12),
    ("late", {"up": "copy", "join": "add"}, 132_445_480, 21.12),
    ("early", {"global_pool": "token"}, 141_027_623, 26.64),
    ("early", {}, 141_599_623, 26.64),
    ("early", {"global_pool": "mixing"}, 141_795_623, 26.64),
    ("early", {"up": "copy"}, 132_025_591, 25.86),
    ("early", {"bridges": "single"}, 138_043_195, 25.80),
    ("early", {"up": "copy", "bridges": "single"}, 129_660_715, 25.39),
    ("layerwise", {"global_pool": "token"}, 139_753_160, 26.55),
    ("layerwise", {}, 140_325_160, 26.55),
    ("layerwise", {"global_pool": "mixing"}, 140_521_160, 26.55),
    ("layerwise", {"class_token": True}, 140_326_696, 26.64),
]


@pytest.mark.parametrize("name, options, parameters, macs", TABLE, ids=str)
def test_counts(name, options, parameters, macs, monkeypatch):
    monkeypatch.setattr(project_op, "_composing_pays", lambda *call: False)
    with torch.device("meta"):
        model = tokenfusion.create_model(f"token_fusion_{name}", pretrained_cnn=False, **options).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.cnn.parameters()) == 42_500_160
    assert counter.get_total_flops() / 2e9 == pytest.approx(macs, abs=0.006)


@every_setting
@pytest.mark.parametrize("pool", ["channel", "token", "mixing"])
def test_settings_and_heads(name, options, pool):
    model = small(name, global_pool=pool, **options)
    features = model.forward_features(images())
    assert features.shape == (2, model.num_tokens, model.num_features)
    logits = model(images())
    assert logits.shape == (2, 10)
    pooled = model.forward_head(features, pre_logits=True)
    means = {"channel": [features.mean(1)], "token": [features.mean(2)], "mixing": [features.mean(2), features.mean(1)]}
    torch.testing.assert_close(pooled, torch.cat(means[pool], 1))
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(model.get_classifier()(pooled), logits)


@every_setting
def test_parity_with_the_reference(name, options):
    model, x = small(name, **options), images()
    with torch.no_grad():
        got = model(x)
        with tokenfusion.backend("reference"):
            want = model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, options, operators",
    [
        ("late", {}, ["upconv_concat_cpu"]),
        ("late", {"join": "add"}, ["upconv_concat_project_cpu"]),
        ("early", {}, ["upconv_concat_project_cpu"]),
        ("layerwise", {}, ["upconv_concat_project_cpu"]),
    ],
    ids=str,
)
def test_runs_the_operators(name, options, operators):
    model = small(name, **options)
    with assert_runs(*operators), torch.no_grad():
        model(images())


@every_setting
def test_every_parameter_receives_a_gradient(name, options):
    model = small(name, train_cnn=True, drop_path_rate=0.1, **options).train()
    model(images(4)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


@every_model
def test_the_cnn_is_frozen_unless_asked(name):
    model = small(name).train()
    assert not any(p.requires_grad for p in model.cnn.parameters()) and not model.cnn.training
    before = copy.deepcopy(model.cnn.state_dict())
    model(images()).sum().backward()
    assert all(torch.equal(before[key], value) for key, value in model.cnn.state_dict().items())
    model.set_cnn_trainable()
    assert all(p.requires_grad for p in model.cnn.parameters()) and model.cnn.training
    model.eval()
    assert not model.cnn.training


@every_model
def test_learns_digits(name):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.images[:96] / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    x, y = nn.functional.interpolate(x, 32, mode="bilinear"), torch.tensor(digits.target[:96])
    model = small(name, img_size=32, train_cnn=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_model
def test_other_image_sizes(name):
    model = small(name)
    assert model(images(size=96)).shape == (2, 10)
    larger = small(name, img_size=96)
    larger.load_state_dict(larger.checkpoint_filter(model.state_dict()))
    torch.testing.assert_close(larger(images(size=96)), model(images(size=96)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="images: got 80 x 80 pixels, expected multiples of 32"):
        model(images(size=80))
    with pytest.raises(ValueError, match="'token' head has a weight for each token"):
        small(name, global_pool="token")(images(size=96))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("late", {"img_size": 72}, "img_size: got 72, expected multiples of 32"),
        ("late", {"up": "nearest"}, "up: got 'nearest', expected one of 'upconv', 'copy'"),
        ("late", {"join": "sum"}, "join: got 'sum'"),
        ("late", {"up_kernel": 3}, "up_kernel: got 3"),
        ("early", {"bridges": "none"}, "bridges: got 'none'"),
        ("layerwise", {"depth": 5}, "depth: got 5, expected 6 or more"),
        ("layerwise", {"global_pool": "avg"}, "global_pool: got 'avg', expected one of 'channel'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        small(name, **options)


@every_model
def test_integration_starts_as_identity_and_classifier_is_reset(name):
    model = small(name)
    if name == "layerwise":
        for weight in (model.integrate[0].weight, model.integrate_last.proj.weight.flatten(1)):
            assert torch.equal(weight[:, :24], torch.eye(24))
    model.reset_classifier(7, "mixing")
    assert model(images()).shape == (2, 7) and model.global_pool == "mixing"
    model.reset_classifier(0)
    assert model(images()).shape == (2, model.head_hidden_size)
    assert model.no_weight_decay() == {key for key, _ in model.named_parameters() if "pos_embed" in key}


@every_setting
def test_intermediates_and_features_only(name, options):
    model = small(name, **options)
    final, features = model.forward_intermediates(images())
    torch.testing.assert_close(final, model.forward_features(images()))
    for info, feature in zip(model.feature_info, features, strict=True):
        side = 64 // info["reduction"]
        assert feature.shape == (2, info["num_chs"], side, side)
    last, *_ = model.forward_intermediates(images(), [-1], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(last, features[-1].flatten(2).transpose(1, 2))
    for index in range(len(features)):
        calls = []
        hooks = [block.register_forward_hook(lambda *_, calls=calls: calls.append(1)) for block in model.blocks]
        (early,) = model.forward_intermediates(images(), [index], stop_early=True, intermediates_only=True)
        assert torch.equal(early, features[index]) and len(calls) == index + 1
        for hook in hooks:
            hook.remove()
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([index]) == [index] and len(pruned.blocks) == index + 1
        out, (feature,) = pruned.forward_intermediates(images(), [index])
        assert torch.equal(feature, features[index])
        assert pruned.num_classes == 0 and torch.equal(pruned(images()), pruned.forward_head(out))
    extractor = tokenfusion.create_model(f"token_fusion_{name}", features_only=True, **(SMALL | options)).eval()
    assert [f.shape[1] for f in extractor(images())] == extractor.feature_info.channels()


@every_model
def test_checkpointing_optimizers_and_copies(name):
    model, x = small(name).train(), images()
    expected = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected)
    model.eval()
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.7)
    assert sum(len(group["params"]) for group in groups) == len(names)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    assert timm.create_model(f"token_fusion_{name}", device="meta", **SMALL).head.weight.is_meta
    assert small(name, dtype=torch.bfloat16, in_chans=5)(torch.randn(1, 5, 64, 64).bfloat16()).dtype == torch.bfloat16


@every_model
def test_compiled(name):
    model, x = small(name), images()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
