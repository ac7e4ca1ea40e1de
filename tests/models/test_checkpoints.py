"""Loading of weights: timm's, the official release's, of another resolution; files that do not fit or are damaged."""

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file

import tokenfusion
from tests.models.small import small_images, small_model
from tests.parity import assert_parity
from tokenfusion.models import load_checkpoint

NAME = "tokenfusion_crossvit_9_240"
TINY = {"embed_dim": (16, 24), "num_heads": (2, 3), "img_size": 120, "num_classes": 10}  # 10 x 10 and 7 x 7 patches


def tiny(**options):
    return tokenfusion.create_model(NAME, **(TINY | options)).eval()


def official(state_dict):
    """The names of IBM's release, whose positions and class tokens are lists."""
    return {
        name.replace("pos_embed_", "pos_embed.").replace("cls_token_", "cls_token."): value
        for name, value in state_dict.items()
    }


def timm_weights(**options):
    torch.manual_seed(1)
    return timm.create_model("crossvit_9_240", **(TINY | options)).state_dict()


def same(model, state_dict):
    return all(torch.equal(value, state_dict[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("names", [dict, official])
def test_timm_and_official_names(names):
    weights = timm_weights()
    given = names(weights)
    before = dict(given)
    model = tiny()
    result = model.load_state_dict(given, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert same(model, weights)
    assert list(given) == list(before) and all(given[name] is before[name] for name in given)
    assert list(model.state_dict()) == list(weights)


def test_official_names_inside_another_module():
    outer = torch.nn.Sequential(tiny())
    weights = timm_weights()
    outer.load_state_dict({f"0.{name}": value for name, value in official(weights).items()}, strict=True)
    assert same(outer[0], weights)


@pytest.mark.parametrize("wrapped", [None, "model", "state_dict"])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_files(tmp_path, wrapped, kind):
    if wrapped and kind == "safetensors":
        pytest.skip("safetensors files hold tensors alone")
    path, weights = tmp_path / f"weights.{kind}", timm_weights()
    (save_file if kind == "safetensors" else torch.save)(
        {wrapped: official(weights)} if wrapped else official(weights), path
    )
    assert same(tiny(checkpoint_path=path), weights)
    assert same(timm.create_model(NAME, checkpoint_path=path, **TINY), weights)


@pytest.mark.parametrize("img_size", [240, (120, 240)])
def test_another_resolution_resizes_positions(tmp_path, img_size):
    path, weights = tmp_path / "weights.pth", timm_weights()
    torch.save({"model": official(weights)}, path)
    model = tiny(img_size=img_size, checkpoint_path=path)
    for i, grid in enumerate(model.grids):
        table, resized = weights[f"pos_embed_{i}"], model.get_parameter(f"pos_embed_{i}")
        assert torch.equal(resized[:, 0], table[:, 0])
        side = (10, 7)[i]
        image = table[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        expected = torch.nn.functional.interpolate(image, size=grid, mode="bicubic")
        torch.testing.assert_close(resized[:, 1:], expected.flatten(2).transpose(1, 2))
    assert model(torch.randn(1, 3, *model.img_size)).shape == (1, 10)


def test_pretrained_goes_through_timms_hub_configuration(monkeypatch):
    weights, asked = timm_weights(num_classes=1000), []
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf", lambda where, **_: asked.append(where) or official(weights)
    )
    model = tokenfusion.create_model(NAME, pretrained=True, **(TINY | {"num_classes": 1000}))
    assert asked == ["timm/crossvit_9_240.in1k"]
    assert same(model, weights)
    fine_tuned = tiny(pretrained=True, img_size=240)  # another head, another resolution
    assert torch.equal(fine_tuned.norm[0].weight, weights["norm.0.weight"])
    assert fine_tuned.head[0].out_features == 10


def test_configurations_are_those_of_timm():
    for name in tokenfusion.list_models("tokenfusion_crossvit*"):
        ours, of_timm = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(name.removeprefix("tokenfusion_"))
        if of_timm is None:
            assert name == "tokenfusion_crossvit_18_dagger_504" and not ours.has_weights
        else:
            assert ours.hf_hub_id == of_timm.hf_hub_id and ours.input_size == of_timm.input_size
            assert ours.first_conv == of_timm.first_conv and ours.crop_pct == of_timm.crop_pct


def test_no_pretrained_weights():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for tokenfusion_crossvit_18_dagger_504"):
        tokenfusion.create_model("tokenfusion_crossvit_18_dagger_504", pretrained=True, img_size=168)


def missing(weights):
    del weights["norm.1.bias"]
    return "1 missing (norm.1.bias)"


def surplus(weights):
    weights["extra.weight"] = torch.zeros(1)
    return "1 not known here (extra.weight)"


def wrong_shape(weights):
    weights["head.0.weight"] = torch.zeros(11, 16)
    return "head.0.weight got (11, 16), expected (10, 16)"


def no_tensor(weights):
    weights["head.0.weight"] = [1.0]
    return "head.0.weight got list, expected (10, 16)"


def another_architecture(weights):
    names = list(weights)
    weights.clear()
    weights["conv.weight"] = torch.zeros(3)
    return f"{len(names)} missing"


WRONG = pytest.mark.parametrize("damage", [missing, surplus, wrong_shape, no_tensor, another_architecture])


@WRONG
@pytest.mark.parametrize("way", ["load_state_dict", "file"])
def test_weights_that_do_not_fit_leave_the_model_as_it_was(tmp_path, damage, way):
    model, weights = tiny(), timm_weights()
    before = copy.deepcopy(model.state_dict())
    message = damage(weights)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match="nothing was loaded") as caught:
        if way == "file":
            load_checkpoint(model, tmp_path / "weights.pth")
        else:
            model.load_state_dict(weights, strict=True)
    assert message in str(caught.value)
    assert same(model, before)


def test_not_strict_loads_what_is_there():
    model, weights = tiny(), timm_weights()
    del weights["norm.1.bias"]
    result = model.load_state_dict(weights | {"extra": torch.zeros(1)}, strict=False)
    assert result.missing_keys == ["norm.1.bias"] and result.unexpected_keys == ["extra"]
    assert torch.equal(model.norm[0].weight, weights["norm.0.weight"])
    with pytest.raises(RuntimeError, match="head.0.weight got"):
        model.load_state_dict({"head.0.weight": torch.zeros(1)}, strict=False)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty", "text", "not a dictionary"])
def test_damaged_files(tmp_path, kind, damage):
    path, model = tmp_path / f"weights.{kind}", tiny()
    (save_file if kind == "safetensors" else torch.save)(timm_weights(), path)
    data = path.read_bytes()
    if damage == "not a dictionary":
        torch.save([torch.zeros(1)], path)
    else:
        path.write_bytes(
            {
                "truncated": data[: len(data) // 2],
                "overwritten": b"\xff" * 4096 + data[4096:],
                "empty": b"",
                "text": b"<html>not found</html>",
            }[damage]
        )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="cannot be read") as caught:
        load_checkpoint(model, path)
    assert str(path) in str(caught.value)
    assert same(model, before)
    with pytest.raises(RuntimeError, match="cannot be read"):
        tiny(checkpoint_path=path)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth: no such file"):
        load_checkpoint(tiny(), tmp_path / "none.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"model": Code()}, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match="cannot be read"):
        load_checkpoint(tiny(), tmp_path / "weights.pth")


def test_loaded_weights_compute_what_timms_model_does():
    weights, model = timm_weights(), tiny()
    model.load_state_dict(weights)
    plain = timm.create_model("crossvit_9_240", **TINY).eval()
    plain.load_state_dict(weights)
    images = torch.randn(2, 3, 120, 120)
    with torch.no_grad():
        assert_parity(model(images), plain(images), copy.deepcopy(plain).double()(images.double()))


def test_a_small_model_of_another_fusion_does_not_fit():
    weights = small_model("crossvit_no_fusion").state_dict()
    with pytest.raises(RuntimeError, match="missing.*blocks.0.fusion"):
        small_model("crossvit").load_state_dict(weights)
    assert small_model("crossvit")(small_images("crossvit")).isfinite().all()
