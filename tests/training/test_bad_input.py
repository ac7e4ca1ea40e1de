"""What is wrong with images, options and files is said in a line, before the work, and nothing is lost."""

import json

import numpy as np
import pytest
from PIL import Image

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
    program("finetune").main(options(folder, tmp_path / "out"))
    said = capsys.readouterr().out
    left_out = [line for line in said.splitlines() if line.startswith("left out: ")]
    named = {line.split(":")[1].rpartition("/")[2] for line in left_out}
    assert named == none | {"white", ".thumbnails"}, left_out
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
    with pytest.raises(UsageError, match="the class pink is in val, and not in train"):
        finetune.main(options(both, tmp_path / "other"))


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
    "rate": (None, ["--lr", "1e30", "--clip-grad", "0", "--warmup-epochs", "0"], "the loss is (nan|inf) by step"),
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


def test_what_was_written_is_not_overwritten(program, folder, tmp_path):
    """By a training that is not a continuation, or one of another model."""
    finetune, out = program("finetune"), tmp_path / "out"
    finetune.main(options(folder, out, "--epochs", "1"))
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.name != "options.txt"}
    with pytest.raises(UsageError, match="has a training; --resume goes on with it"):
        finetune.main(options(folder, out))
    with pytest.raises(UsageError, match="is of a training with another model_kwargs"):
        finetune.main(options(folder, out, "--resume", kwargs=("qkv_bias=False",)))
    few(folder)
    with pytest.raises(UsageError, match="no class has 5 images"):
        finetune.main(options(folder, out, "--resume"))
    assert {path: path.read_bytes() for path in before} == before
    (out / "training.safetensors").write_bytes(b"cut")
    painted(tmp_path / "again")
    with pytest.raises(UsageError, match="training.safetensors: no state of a training: "):
        finetune.main(options(tmp_path / "again", out, "--resume"))


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
