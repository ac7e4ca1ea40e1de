"""What is wrong with images, options and files is said in a line, before the work, and nothing is lost."""

import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.training.small import options, painted, rows
from tokenfusion.cli.errors import UsageError


def odd_images(folder):
    """In the class red; returns the names of the files that are no images."""
    red = folder / "red"
    photograph = Image.fromarray(np.full((20, 30, 3), (200, 50, 40), "uint8"))
    photograph.convert("L").save(red / "grey.png")
    photograph.convert("RGBA").save(red / "transparent.png")
    exif = photograph.getexif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    photograph.save(red / "rotated.jpg", exif=exif)
    photograph.resize((1, 1)).save(red / "dot.png")
    photograph.resize((3000, 1)).save(red / "line.png")
    Image.fromarray(np.full((9, 9), 40000, "uint16")).save(red / "deep.png")
    (red / "notes.txt").write_text("not an image")
    (red / "text.jpg").write_text("not an image")
    (red / "cut.jpg").write_bytes((red / "rotated.jpg").read_bytes()[:-300])
    (red / "empty.png").touch()
    return {"notes.txt", "text.jpg", "cut.jpg", "empty.png"}


def test_odd_images_are_taken_and_what_is_none_is_named(program, folder, tmp_path, capsys):
    none = odd_images(folder)
    (folder / "white").mkdir()
    (folder / ".thumbnails").mkdir()
    (folder / "red" / ".ipynb_checkpoints").mkdir()
    (folder / "red" / ".ipynb_checkpoints" / "0.png").write_bytes((folder / "red" / "0.png").read_bytes())
    program("finetune").main(options(folder, tmp_path / "out"))
    said = capsys.readouterr().out
    left_out = [line for line in said.splitlines() if line.startswith("left out: ")]
    named = {line.split(":")[1].rpartition("/")[2] for line in left_out}
    assert named == none | {"white"}, left_out
    assert "29 images to train, 7 to test, 3 classes" in said
    assert len(rows(tmp_path / "out")) == 2


def test_a_rotated_photograph_stands_upright(program, folder):
    odd_images(folder)
    assert program("training.pictures").read(str(folder / "red" / "rotated.jpg")).size == (20, 30)


def test_train_and_val(program, folder, tmp_path, capsys):
    both = tmp_path / "both"
    both.mkdir()
    folder.rename(both / "train")
    painted(both / "val", each=4)
    finetune = program("finetune")
    finetune.main(options(both, tmp_path / "out", "--epochs", "1"))
    assert "30 images to train, 12 to test" in capsys.readouterr().out
    (both / "val" / "red").rename(both / "val" / "pink")
    with pytest.raises(UsageError, match="the class pink is to be tested, and not in train"):
        finetune.main(options(both, tmp_path / "other"))
    (both / "val").rename(both / "valid")
    with pytest.raises(UsageError, match="the class pink is to be tested, and not in train"):
        finetune.main(options(both, tmp_path / "other"))
    (both / "valid").rename(both / "test")
    with pytest.raises(UsageError, match="got 64, expected at most 24"):  # a fifth of train is held out
        finetune.main(options(both, tmp_path / "other", "--batch-size", "64"))
    assert f"left out: {both / 'test'}: beside train" in capsys.readouterr().out
    (both / "train").rename(tmp_path / "train")
    with pytest.raises(UsageError, match="got the folder test, which has folders, expected train beside it"):
        finetune.main(options(both, tmp_path / "other"))


def test_whatever_pillow_raises_of_a_file_is_said(program, monkeypatch):
    def broken(path):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr("training.pictures.read", broken)
    assert program("training.pictures")._problem("a.tif") == "a.tif: damaged image: unpack requires a buffer of 4 bytes"


def test_weights_that_are_not_finite_are_counted(program):
    models = [torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)]
    not_finite = program("training.processes").not_finite
    assert not_finite(models) == 0
    models[1].weight.data[:] = torch.tensor([torch.nan, -torch.inf])
    assert not_finite(models) == 2


def test_an_error_of_another_process_names_it(program, monkeypatch):
    def main():
        raise UsageError("no such file")

    errors = program("training.errors")
    for rank, start in (("0", "error: "), ("3", "process 3: error: ")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match=f": {start}no such file$"):
            errors.reported(main)


def nothing(folder):
    for path in folder.glob("*/*"):
        path.unlink()


def one_class(folder):
    for name in ("blue", "green"):
        (folder / name).rename(folder.parent / name)


def no_folders(folder):
    one_class(folder)
    (folder / "red").rename(folder.parent / "red")


def few(folder):
    for path in folder.glob("*/[4-9].png"):
        path.unlink()


VIT = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "depth=1"]
WRONG = {
    "no images": (nothing, [], "no images in its subfolders"),
    "one class": (one_class, [], "got the class red alone, expected two or more"),
    "no folders": (no_folders, [], "Couldn't find any class folder in"),
    "few images": (few, [], "no class has 5 images"),
    "large batch": (None, ["--batch-size", "64"], "--batch-size: got 64, expected at most 24"),
    "odd batch": (None, ["--batch-size", "7", "--mixup", "0.8"], "--batch-size: got 7, expected even shares"),
    "model": (None, ["--model", "crossvit_9_2400"], "expected the name of a model of timm or tokenfusion"),
    "keyword": (None, ["--model-kwargs", "width=3"], "timm cannot build .*unexpected keyword argument 'width'"),
    "weights": (None, ["--pretrained"], "--pretrained: .*"),
    "rate": (
        None,
        ["--lr", "1e30", "--save-steps", "1", "--clip-grad", "0", "--warmup-epochs", "0"],
        "the loss is (nan|inf) by step|weights are nan or inf after step",
    ),
    "scheduler": (None, ["--sched", "nonsense"], "--sched: timm cannot make nonsense: "),
    "no scheduler": (None, ["--sched", "none"], "--sched: got none, expected a scheduler of timm"),
    "by epochs": (None, ["--sched", "plateau"], "--sched: timm cannot make plateau: "),
    "optimizer": (None, ["--opt", "nonsense"], "--opt: timm cannot make nonsense: "),
    "device": (None, ["--device", "mps"], "--device: got mps, expected cpu or cuda"),
    "no device": (None, ["--device", "cuda:99"], "--device: got cuda:99, and PyTorch sees [0-9]+ GPUs"),
    "no value": (None, ["--model-kwargs", "foo"], "--model-kwargs: got foo, expected NAME=VALUE"),
    "seed": (None, ["--seed", "-1"], "--seed: got -1, expected 0 or more"),
    "workers": (None, ["--workers", "-1"], "--workers: got -1, expected 0 or more"),
    "size": (None, [*VIT, "--img-size", "40"], "--img-size: vit_tiny_patch16_224 takes no images of 3x40x40: "),
    "missing": (None, ["--data", "/nowhere"], "No such file or directory: '/nowhere'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_in_a_line(program, folder, tmp_path, wrong, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    change, more, message = WRONG[wrong]
    if change:
        change(folder)
    with pytest.raises(UsageError, match=message) as caught:
        program("finetune").main(options(folder, tmp_path / "out", *more))
    assert len(str(caught.value).splitlines()) == 1
    for path in tmp_path.glob("out/*/model.safetensors"):
        assert all(values.isfinite().all() for values in load_file(path).values())


def test_what_was_written_is_not_overwritten(program, folder, tmp_path, capsys):
    """By a training that is not a continuation, or one of another model."""
    finetune, out = program("finetune"), tmp_path / "out"
    finetune.main(options(folder, out, "--epochs", "1"))
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.name != "options.txt"}
    with pytest.raises(UsageError, match="has a training; --resume goes on with it"):
        finetune.main(options(folder, out))
    with pytest.raises(UsageError, match="is of a training with another model_kwargs"):
        finetune.main(options(folder, out, "--resume", kwargs=("qkv_bias=False",)))
    with pytest.raises(UsageError, match="--model-kwargs: the model is the folder"):
        finetune.main(options(folder, tmp_path / "other", "--model", str(out / "best")))
    (folder / "red" / "0.png").rename(folder / "red" / "zero.png")
    with pytest.raises(UsageError, match="is of a training with another images: 24 to train with, 6 to test with"):
        finetune.main(options(folder, out, "--resume"))
    (folder / "red" / "zero.png").rename(folder / "red" / "0.png")
    capsys.readouterr()
    finetune.main(options(folder, out, "--resume", "--epochs", "1", "--lr", "0.5", "--sched", "constant"))
    said = " ".join(capsys.readouterr().out.split())
    assert "resumed after step 3, with --lr 0.5 (was 0.002), --sched constant (was cosine)" in said
    few(folder)
    with pytest.raises(UsageError, match="no class has 5 images"):
        finetune.main(options(folder, out, "--resume"))
    before = {path: content for path, content in before.items() if path.name != "curves.png"}  # drawn again
    assert {path: path.read_bytes() for path in before} == before
    (out / "training.safetensors").write_bytes(b"cut")
    painted(tmp_path / "again")
    with pytest.raises(UsageError, match="training.safetensors: no state of a training: "):
        finetune.main(options(tmp_path / "again", out, "--resume"))
    (out / "training.safetensors").unlink()
    for more in (["--resume", "--model", str(out / "best")], []):
        with pytest.raises(UsageError, match="best is a model, which would be overwritten"):
            finetune.main(options(folder, out, *more))


def test_an_output_that_cannot_be_written(program, folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file/out/options.txt: cannot be written: "):
        program("finetune").main(options(folder, tmp_path / "file" / "out"))


def test_weights_of_another_model(program, folder, tmp_path):
    finetune, out = program("finetune"), tmp_path / "out"
    finetune.main(options(folder, out, "--epochs", "1"))
    config = json.loads((out / "best" / "config.json").read_text())
    config["model_args"]["embed_dim"] = [16, 30]
    (out / "best" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="best: no model of timm or tokenfusion: .*does not fit, nothing was loaded"):
        program("training.checkpoints").load(out / "best")
    with pytest.raises(UsageError, match="No such file or directory"):
        program("training.checkpoints").load(tmp_path)
