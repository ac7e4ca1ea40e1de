import json
import math
import socket
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torch import nn

import tokenfusion
from tokenfusion.cli import main

TINY = "crossvit_tiny_240"
NOTHING_TO_FUSE = "test_resnet"


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
    monkeypatch.setattr(timm_models, "_pretrained", lambda name: (None, "a test"))


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other take many times as long where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        assert list(timings) == [variants.EAGER, variants.FUSED]
        for timing in timings.values():
            assert len(timing["seconds"]) == 2
            assert timing["peak_extra_bytes"] > 0
            assert timing["vs_eager"] > 0
        assert timings[variants.EAGER]["vs_eager"] == 1


def test_compares_a_model_of_the_package_with_its_plain_form(capsys, photograph, tmp_path, monkeypatch):
    small = {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (4, 8, 8, 8)}
    model = tokenfusion.create_model("dynamixer_s", **small).eval()
    loaded = timm_models.Loaded(model.plain(), model, "plain", False, "random")
    monkeypatch.setattr(timm_models, "load", lambda name: loaded)
    record = tmp_path / "record.json"
    assert _compare("dynamixer_s", photograph, "--no-compile", "--rounds", 1, "--device", "cpu", "--json", record) == 0
    assert "4  PlainBlock  replaced (dynamic_mixing)" in capsys.readouterr().out
    facts = json.loads(record.read_text())
    assert 0 < facts["difference"]["fused_from_eager"]["relative"] < 1e-5
    assert facts["operators"]["dynamic_mixing"]["calls"]["cpu"] == 8
    assert all(list(timings) == [variants.EAGER, variants.FUSED] for timings in facts["timings"].values())


def test_a_model_of_the_package_is_set_beside_timms(capsys, photograph, tmp_path):
    record = tmp_path / "record.json"
    quick = ("--no-compile", "--rounds", 1, "--batch-size", 1, "--device", "cpu", "--json", record)
    assert _compare("tokenfusion_crossvit_9_240", photograph, *quick) == 0
    assert "6  CrossAttentionBlock  replaced" in capsys.readouterr().out
    facts = json.loads(record.read_text())
    assert facts["difference"]["fused_from_eager"]["relative"] < 1e-4
    assert list(facts["timings"]["whole model"]) == [variants.EAGER, variants.FUSED]


def test_counterparts():
    loaded = timm_models.load("tokenfusion_crossvit_9_240")
    assert type(loaded.model).__module__ == "timm.models.crossvit"
    assert type(loaded.own).__module__ == "tokenfusion.models.crossvit"
    assert timm_models.load(NOTHING_TO_FUSE).own is None
    plain, own, _ = timm_models._with_own(tokenfusion.create_model("tokenfusion_crossvit_18_dagger_504", img_size=168))
    assert type(plain) is type(own) and "tokenfusion.layers.crossvit" not in {
        type(m).__module__ for m in plain.modules()
    }


def test_a_model_with_nothing_to_replace_is_still_timed(capsys, photograph, tmp_path):
    record = tmp_path / "record.json"
    assert _compare(NOTHING_TO_FUSE, photograph, photograph, "--no-compile", "--rounds", 1, "--json", record) == 0
    assert "found no module of a kind that it can replace" in capsys.readouterr().out
    facts = json.loads(record.read_text())
    assert facts["modules"] == []
    assert "difference" not in facts
    assert {subject: list(timed) for subject, timed in facts["timings"].items()} == {"whole model": [variants.EAGER]}


def test_a_failing_compiler_is_shown_in_its_row(capsys, photograph, monkeypatch):
    def failing(module, **_):
        def call(*_):
            raise RuntimeError("no compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    assert _compare(NOTHING_TO_FUSE, photograph, "--rounds", 1) == 0
    rows = capsys.readouterr().out.splitlines()
    (row,) = [row.rstrip() for row in rows if row.startswith(variants.COMPILED)]
    assert row.endswith("not available: no compiler")


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


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    path = tmp_path / "image.tiff"
    Image.new("RGB", (4, 3), "white").convert(mode).save(path)
    ((name, image),) = images.load([str(path)])
    assert (name, image.mode, image.size) == (str(path), "RGB", (4, 3))
    assert np.asarray(image).min() == 255


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)).save(path)
    ((_, image),) = images.load([str(path)])
    assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255]


def test_rotation_of_the_camera_is_undone(tmp_path):
    path = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    Image.new("RGB", (4, 3)).save(path, exif=exif)
    ((_, image),) = images.load([str(path)])
    assert image.size == (3, 4)


def test_default_photographs():
    pytest.importorskip("sklearn")
    assert [name for name, _ in images.load([])] == ["china.jpg", "flower.jpg"]


def test_default_photographs_need_scikit_learn(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "scikit-learn" in _error(capsys, TINY)


def test_a_hub_that_does_not_answer_fails_fast(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(timm_models, "_HUB_SECONDS", 0.2)
        assert "cannot be reached" in timm_models._why_no_hub()
    assert "cannot be reached" in timm_models._why_no_hub()  # nobody listens any more


def test_innermost_modules_hold_no_other():
    assert variants.innermost(["a", "a.b", "a.c.d", "ab"]) == ["a.b", "a.c.d", "ab"]
    assert variants.innermost(["", "a"]) == ["a"]


def test_recorded_calls_repeat_the_forward_pass():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    calls = variants.recorded_calls(model, ["2", "0"], x)
    assert [name for name, _, _ in calls] == ["0", "2"]
    outputs = variants.Calls(model, calls)([call[1:] for call in calls])
    torch.testing.assert_close(outputs[1], model(x))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_ratios_say_how_many_times_as_fast():
    timings = {
        variants.EAGER: variants.Timing([2.0, 4.0], 10, 2.0),
        variants.COMPILED: variants.Timing(unavailable="no compiler"),
        variants.FUSED: variants.Timing([1.0, 1.0], 5, 1.0),
    }
    facts = compare._timing_facts(timings)
    assert math.isclose(facts[variants.FUSED]["vs_eager"], 3.0)
    assert facts[variants.FUSED]["vs_compile"] is None
    assert facts[variants.COMPILED]["median_seconds"] is None
