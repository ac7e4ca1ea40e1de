import json
import os
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import tokenfusion
from tokenfusion.cli import main
from tokenfusion.cli.compare import comparison, images, models, timing

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = "crossvit_tiny_240"
NOTHING_TO_FUSE = "test_resnet"


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    monkeypatch.setattr(models, "pretrained", lambda name: (None, "a test"))


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photograph.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


def _compare(*arguments) -> int:
    return main.main(["compare", *map(str, arguments)])


def _error(capsys, *arguments) -> str:
    assert _compare(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tokenfusion compare: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_compares_a_crossvit(capsys, photograph, tmp_path):
    record = tmp_path / "record.json"
    quick = ("--no-compile", "--rounds", 2, "--batch-size", 1, "--device", "cpu")
    assert _compare(TINY, photograph, *quick, "--json", record) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for shown in ("random, seed 0: a test", str(photograph), "labels mean nothing", "6  CrossAttentionBlock  replaced"):
        assert shown in captured.out
    assert "The same top-1 class in 1 of 1 image." in captured.out

    facts = json.loads(record.read_text())
    assert facts["conditions"]["torch"] == torch.__version__
    assert facts["conditions"]["image_size"] == [3, 240, 240]
    assert len(facts["images"][0]["top"]) == 3
    assert {module["kind"] for module in facts["modules"]} == {"CrossAttentionBlock", "MultiScaleBlock"}
    assert facts["difference"]["fused_from_eager"]["relative"] < 1e-4
    assert facts["difference"]["same_top_1"] == 1
    assert sum(facts["operators"]["single_query_attention"]["calls"].values()) == 6
    for timings in (facts["timings"]["fused modules"], facts["timings"]["whole model"]):
        assert list(timings) == [timing.EAGER, timing.FUSED]
        for timed in timings.values():
            assert len(timed["seconds"]) == 2
            assert timed["peak_extra_bytes"] > 0
            assert timed["vs_eager"] > 0
        assert timings[timing.EAGER]["vs_eager"] == 1


def test_compares_a_model_of_the_package_with_its_plain_form(capsys, photograph, tmp_path, monkeypatch):
    small = {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (4, 8, 8, 8)}
    model = tokenfusion.create_model("dynamixer_s", **small).eval()
    loaded = models.Loaded(model.plain(), model, "plain", False, "random")
    monkeypatch.setattr(models, "load", lambda name: loaded)
    record = tmp_path / "record.json"
    assert _compare("dynamixer_s", photograph, "--no-compile", "--rounds", 1, "--device", "cpu", "--json", record) == 0
    assert "4  PlainBlock  replaced (dynamic_mixing)" in capsys.readouterr().out
    facts = json.loads(record.read_text())
    assert 0 < facts["difference"]["fused_from_eager"]["relative"] < 1e-5
    assert facts["operators"]["dynamic_mixing"]["calls"]["cpu"] == 8
    assert all(list(timings) == [timing.EAGER, timing.FUSED] for timings in facts["timings"].values())


def test_a_model_of_the_package_is_set_beside_timms(capsys, photograph, tmp_path):
    record = tmp_path / "record.json"
    quick = ("--no-compile", "--rounds", 1, "--batch-size", 1, "--device", "cpu", "--json", record)
    assert _compare("tokenfusion_crossvit_9_240", photograph, *quick) == 0
    assert "6  CrossAttentionBlock  replaced" in capsys.readouterr().out
    facts = json.loads(record.read_text())
    assert facts["difference"]["fused_from_eager"]["relative"] < 1e-4
    assert list(facts["timings"]["whole model"]) == [timing.EAGER, timing.FUSED]


def test_a_model_with_nothing_to_replace_is_still_timed(capsys, photograph, tmp_path):
    record = tmp_path / "record.json"
    assert _compare(NOTHING_TO_FUSE, photograph, photograph, "--no-compile", "--rounds", 1, "--json", record) == 0
    assert "no module of a kind that tokenfusion can replace; only the model" in capsys.readouterr().out
    facts = json.loads(record.read_text())
    assert facts["modules"] == []
    assert "difference" not in facts
    assert {subject: list(timed) for subject, timed in facts["timings"].items()} == {"whole model": [timing.EAGER]}


def test_a_failing_compiler_is_shown_in_its_row(capsys, photograph, monkeypatch):
    def failing(module, **_):
        def call(*_):
            raise RuntimeError("no compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    assert _compare(NOTHING_TO_FUSE, photograph, "--rounds", 1) == 0
    assert f"{timing.COMPILED}: not available: no compiler\n" in capsys.readouterr().out


def test_reduced_precision_is_set_beside_float32(capsys, photograph):
    assert _compare(TINY, photograph, "--no-compile", "--rounds", 1, "--batch-size", 1, "--dtype", "bfloat16") == 0
    assert "fused in bfloat16 against float32" in capsys.readouterr().out


def test_a_backend_that_cannot_run_is_an_error(capsys, photograph):
    before = tokenfusion.kernels.dispatch.get_backend()
    assert _compare(TINY, photograph, "--no-compile", "--device", "cpu", "--backend", "cuda") == 2
    assert "--backend: tokenfusion.single_query_attention: backend 'cuda' cannot run here" in capsys.readouterr().err
    assert tokenfusion.kernels.dispatch.get_backend() == before


@pytest.mark.parametrize("name", ["crossvit_51_240", "crossvit_15_240.no_such_weights"])
def test_unknown_model_names_close_ones(capsys, name):
    error = _error(capsys, name)
    assert f"MODEL: got {name!r}" in error
    assert "crossvit_15_240" in error


def test_image_in_place_of_the_model(capsys, photograph):
    assert f"tokenfusion compare crossvit_15_240 {photograph}" in _error(capsys, photograph)


def test_missing_image(capsys, tmp_path):
    assert f"IMAGE: {tmp_path / 'none.jpg'}: No such file" in _error(capsys, TINY, tmp_path / "none.jpg")


def test_a_file_that_is_no_image(capsys, tmp_path):
    path = tmp_path / "text.jpg"
    path.write_text("not an image")
    assert f"IMAGE: {path}: not an image file" in _error(capsys, TINY, path)


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_truncated_image(capsys, photograph, tmp_path, kind):
    path = tmp_path / f"truncated.{kind}"
    Image.open(photograph).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert f"IMAGE: {path}: damaged image: " in _error(capsys, TINY, path)


def test_json_that_cannot_be_written_fails_first(capsys, photograph, tmp_path):
    path = tmp_path / "none" / "record.json"
    assert f"--json: {path}" in _error(capsys, TINY, photograph, "--json", path)


def test_sizes_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        _compare(TINY, "--rounds", "0")
    assert "--rounds: got '0'" in capsys.readouterr().err


def test_default_photographs_need_scikit_learn(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "scikit-learn" in _error(capsys, TINY)


def test_a_model_without_a_classifier(capsys, photograph, monkeypatch):
    pooled = {"global_pool": "map", "class_token": False, "num_classes": 0, "depth": 1}
    model = timm.create_model("vit_tiny_patch16_224", **pooled).eval()
    monkeypatch.setattr(models, "load", lambda name: models.Loaded(model, None, "timm's model", False, "random"))
    assert _compare("vit_tiny_patch16_224", photograph, "--no-compile", "--rounds", 1, "--batch-size", 1) == 0
    shown = capsys.readouterr().out
    assert "has no classifier" in shown and "fused against eager" in shown
    assert "top-1" not in shown


def test_names_that_are_not_utf8_are_shown_and_recorded(capsys, photograph, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    os.rename(photograph, path)
    record = tmp_path / "record.json"
    assert _compare(NOTHING_TO_FUSE, path, "--no-compile", "--rounds", 1, "--json", record) == 0
    assert r"caf\xe9.png" in capsys.readouterr().out
    assert json.loads(record.read_text())["images"][0]["image"] == rf"{tmp_path}/caf\xe9.png"


def test_a_long_image_is_cut_before_it_is_resized(photograph, monkeypatch):
    image, resized = Image.new("RGB", (20000, 1)), []
    resize = Image.Image.resize

    def noted(image, size, *arguments, **options):
        resized.append(size)
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    model = timm.create_model(NOTHING_TO_FUSE)
    assert comparison._preprocessed(model, [images.Photograph("long", image)]).shape == (1, 3, 160, 160)
    assert resized and max(max(size) for size in resized) <= 16 * 200


def test_a_batch_that_does_not_fit_is_an_error(capsys, photograph):
    assert _compare(NOTHING_TO_FUSE, photograph, "--no-compile", "--batch-size", 10**6) == 2
    fault = "--batch-size: test_resnet and batches of 1000000 do not fit into the memory of cpu\n"
    assert capsys.readouterr().err.endswith(f"error: {fault}")
