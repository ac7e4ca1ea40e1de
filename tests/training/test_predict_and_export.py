"""predict.py and export.py on models that finetune.py wrote, and on others."""

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import tokenfusion
from tests.models.small import _DYNAMIXER, TOKEN_FUSION
from tests.training.conftest import EXAMPLES
from tests.training.small import options, painted
from tokenfusion.cli.errors import UsageError


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    place = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(EXAMPLES)
        import finetune

        finetune.main(options(painted(place / "images"), place / "out", "--epochs", "1"))
    return place / "out" / "best"


def test_predicts_and_draws_where_the_class_tokens_look(program, tuned, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program("predict"), "_BATCH", 1)
    images = [str(folder / "red" / "0.png"), str(folder / "blue" / "1.png")]
    program("predict").main([str(tuned), *images, "--picture", str(tmp_path / "seen.png")])
    said = capsys.readouterr().out
    assert all(name in said for name in (*images, "red", "green", "blue", "probability", "seen.png"))
    width, height = Image.open(tmp_path / "seen.png").size
    assert width > height  # an image and two grids, for each of two images
    with pytest.raises(UsageError, match="--top: got 0, expected 1 or more"):
        program("predict").main([str(tuned), *images, "--top", "0"])


def test_attention_is_what_the_model_computes(program):
    maps = program("training.maps")
    torch.manual_seed(0)
    model = tokenfusion.create_model("tokenfusion_crossvit_9_240", img_size=48, img_scale=(1.0, 1.0)).eval()
    found = maps.attention(model, torch.randn(2, 3, 48, 48))
    assert {tuple(weights.shape) for weights in found} == {(2, 4, 4), (2, 3, 3)}
    siglip = timm.create_model("vit_tiny_patch16_224", global_pool="map", class_token=False, img_size=64).eval()
    (weights,) = maps.attention(siglip, torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(2))
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
    (weights,) = maps.attention(vit, torch.randn(2, 3, 64, 64))
    assert weights.shape == (2, 4, 4) and 0 < weights.sum(dim=(1, 2)).max() < 1  # the rest is the class token's own
    wide = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64)).eval()
    (weights,) = maps.attention(wide, torch.randn(2, 3, 32, 64))
    assert weights.shape == (2, 2, 4)
    late = tokenfusion.create_model("token_fusion_late", **TOKEN_FUSION).eval()
    assert maps.attention(late, torch.randn(1, 3, 64, 64)) == []


def test_masked_tokens_are_not_looked_at(program):
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 5, 4)
    mask = torch.tensor([[True, True, False, True, False]])
    for given in (mask, torch.zeros(1, 5).masked_fill(~mask, -torch.inf)):
        with program("training.maps")._Attention() as seen:
            F.scaled_dot_product_attention(query, key, key, attn_mask=given)
        weights = seen.alone[5]
        assert ((weights == 0) == ~mask).all()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 2))


def test_mixing_matrices_are_drawn(program, tmp_path, monkeypatch):
    predict, maps = program("predict"), program("training.maps")
    torch.manual_seed(0)
    model = tokenfusion.create_model("dynamixer_s", **_DYNAMIXER).eval()
    found = maps.mixing(model, torch.randn(2, 3, 56, 56))
    assert len(found) == 4
    for columns, rows in found.values():
        for matrices in (columns, rows):
            torch.testing.assert_close(matrices.sum(dim=-2), torch.ones_like(matrices[..., 0, :]))
    monkeypatch.setattr(predict, "load", lambda name: (model, False))
    model.pretrained_cfg["input_size"] = (3, 56, 56)
    predict.main(["dynamixer_s", "--picture", str(tmp_path / "mixed.png")])
    assert (tmp_path / "mixed.png").stat().st_size > 10_000


def test_exports_what_computes_the_same(program, tuned, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    program("export").main([str(tuned), "--out", str(tmp_path / "exported")])
    assert "torch.export" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {"model.pt2", "model.onnx"}


def test_pushes_by_timm(program, tuned, monkeypatch):
    export, pushed = program("export"), {}
    monkeypatch.setattr(export, "push_to_hf_hub", lambda model, name, **options: pushed.update(options, name=name))
    model, _ = program("predict").load(str(tuned))
    export.push(model, tuned, "me/colours")
    assert pushed["name"] == "me/colours" and pushed["model_config"]["label_names"] == ["blue", "green", "red"]

    def offline(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(export, "push_to_hf_hub", offline)
    with pytest.raises(UsageError, match="^--push: me/colours: no network$"):
        export.main([str(tuned), "--push", "me/colours"])  # writes no files
    with pytest.raises(UsageError, match="--push: got the model crossvit_9_240, expected a folder"):
        export.main(["crossvit_9_240", "--push", "me/colours"])
