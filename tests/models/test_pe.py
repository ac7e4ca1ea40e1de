"""ViT-PE and ResNet50-PE: counts of the paper, and what timm expects of a model."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_layer_decay

import tokenfusion.models  # noqa: F401  (registers the models)
from tests.crossvit import randomize
from tests.parity import assert_runs

VIT = "vit_pe_small_patch16_224"
SETTINGS = {
    VIT: {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5},
    "resnet50_pe1": {"layers": (2, 1, 2, 1), "channels": (16, 32, 64, 128), "num_classes": 5},
    "resnet50_pe2": {"layers": (1, 1, 2, 2), "channels": (16, 32, 64, 128), "num_classes": 5},
}
every_model = pytest.mark.parametrize("name", SETTINGS)


def _small(name: str, **options):
    torch.manual_seed(0)
    if name != VIT:
        options = {"zero_init_last": False} | options
    return randomize(timm.create_model(name, **(SETTINGS[name] | options))).eval()


def _images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name, with_head, without_head",
    [
        (VIT, 11_433_832, 11_048_832),
        ("resnet50_pe1", 14_813_736, 12_764_736),
        ("resnet50_pe2", 15_458_344, 13_409_344),
    ],
)
def test_counts(name, with_head, without_head):
    for num_classes, expected in ((1000, with_head), (0, without_head)):
        model = timm.create_model(name, num_classes=num_classes, device="meta")
        assert sum(p.numel() for p in model.parameters()) == expected


@every_model
def test_contract(name):
    model, images = _small(name), _images()
    logits = model(images)
    assert logits.shape == (2, 5)
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, features)
    assert len(maps) == len(model.feature_info)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert model.pretrained_cfg["architecture"] == name
    extractor = timm.create_model(name, features_only=True, **SETTINGS[name])
    assert [f.shape[1] for f in extractor(images)] == extractor.feature_info.channels()


@every_model
def test_checkpointed_equals_plain_and_every_parameter_gets_a_gradient(name):
    results = []
    for checkpointed in (False, True):
        model = _small(name, drop_path_rate=0.2).train()
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(3)
        logits = model(_images(4))
        logits.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        results.append([logits, *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@every_model
def test_layer_decay_groups(name):
    model = _small(name)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay() if name == VIT else (), layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = {n: scales[id(p)] for n, p in model.named_parameters()}
    if name == VIT:
        assert named["blocks.0.mlp.weight"] == named["blocks.0.norm1.weight"] < named["blocks.1.mlp.weight"]
    else:
        assert named["layer4.weight"] == named["layer4.blocks.0.conv2.weight"] < named["fc.weight"]


@every_model
def test_state_dict_round_trip(name, tmp_path):
    model = _small(name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = _small(name, drop_rate=0.1)
    torch.nn.init.zeros_(next(other.parameters()))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(other(_images()), model(_images()))


@every_model
def test_one_graph(name):
    torch.compiler.reset()
    model, images = _small(name), _images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)


def test_vit_runs_the_kernel():
    model = _small(VIT).train()
    with assert_runs("tied_ffn_cpu", "tied_ffn_backward_cpu"):
        model(_images()).sum().backward()


def test_parts_that_the_tied_form_lacks_are_refused():
    with pytest.raises(ValueError, match="tied_stages: got"):
        timm.create_model("resnet50_pe1", tied_stages=(0, 1))
    with pytest.raises(ValueError, match="anti-aliasing"):
        timm.create_model("resnet50_pe1", act_layer="silu")


@every_model
def test_a_checkpoint_loads_completely_or_not_at_all(name, tmp_path):
    model = _small(name)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    loaded = tokenfusion.create_model(name, checkpoint_path=tmp_path / "weights.safetensors", **SETTINGS[name])
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    save_file({k: v for k, v in model.state_dict().items() if "bias" not in k}, tmp_path / "part.safetensors")
    other = _small(name)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="missing"):
        tokenfusion.models.load_checkpoint(other, tmp_path / "part.safetensors")
    assert all(torch.equal(other.state_dict()[key], value) for key, value in before.items())


def test_positions_of_another_resolution_are_resized(tmp_path):
    save_file(_small(VIT).state_dict(), tmp_path / "weights.safetensors")
    larger = tokenfusion.create_model(
        VIT, checkpoint_path=tmp_path / "weights.safetensors", **(SETTINGS[VIT] | {"img_size": 48})
    )
    assert larger.pos_embed.shape[1] == 1 + 9
