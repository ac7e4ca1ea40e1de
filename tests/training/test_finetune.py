"""finetune.py: what it learns, what it writes, and how it goes on after an interruption."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.parity import assert_runs
from tests.training.small import options, rows


def test_digits_leave_a_model_that_timm_loads(program, tmp_path, capsys, monkeypatch, run_python):
    """In a fresh interpreter, too, and without asking any hub."""
    finetune, checkpoints = program("finetune"), program("training.checkpoints")
    every_eighth = program("training.digits").pictures()[::8]
    monkeypatch.setattr("training.digits.pictures", lambda: every_eighth)
    monkeypatch.setattr("training.model.models.pretrained", None)
    finetune.main(["--epochs", "1", "--warmup-epochs", "0", "--lr", "1e-3", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    log = rows(tmp_path)
    assert len(log) == 1 and float(log[0]["loss"]) < 2.5, log
    assert "183 images to train, 42 to test, 10 classes" in said, said
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    model, config = checkpoints.load(tmp_path / "best")
    assert config["label_names"] == [str(digit) for digit in range(10)]
    of_timm = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True).eval()
    images = torch.randn(2, *of_timm.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    assert images.shape[1:] == (1, 16, 16)
    torch.testing.assert_close(of_timm(images), model(images), rtol=1e-4, atol=1e-5)
    load = f"timm.create_model('local-dir:{tmp_path / 'best'}', pretrained=True)"
    run_python(f"import timm\nimport tokenfusion.models\n{load}")


def test_fused_and_plain_give_the_same_checkpoints(program, folder, tmp_path):
    finetune = program("finetune")
    with assert_runs("single_query_attention_cpu", "single_query_attention_backward_cpu"):
        finetune.main(options(folder, tmp_path / "fused", "--epochs", "1"))
    finetune.main(options(folder, tmp_path / "plain", "--no-fuse", "--epochs", "1"))
    for name in ("best/model.safetensors", "last/model.safetensors", "training.safetensors"):
        fused, plain = (load_file(tmp_path / kind / name) for kind in ("fused", "plain"))
        assert {key: (value.shape, value.dtype) for key, value in fused.items()} == {
            key: (value.shape, value.dtype) for key, value in plain.items()
        }
        for key, value in fused.items():
            torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")


VARIED = ("--mixup", "0.8", "--cutmix", "1.0", "--aa", "rand-m9-mstd0.5", "--reprob", "0.3", "--layer-decay", "0.8")
DROPS = ("drop_path_rate=0.2", "drop_rate=0.1")


@pytest.mark.parametrize("save_steps", ["0", "1"])
def test_a_resumed_training_has_the_very_same_losses(program, folder, tmp_path, monkeypatch, save_steps):
    finetune, checkpoints = program("finetune"), program("training.checkpoints")

    def arguments(out):
        return options(folder, tmp_path / out, *VARIED, "--save-steps", save_steps, kwargs=DROPS)

    finetune.main(arguments("whole"))
    update = finetune.ModelEmaV3.update

    def interrupted(ema, model, step):
        if step == 5:  # of six
            raise KeyboardInterrupt
        update(ema, model, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(finetune.ModelEmaV3, "update", interrupted)
        finetune.main(arguments("parts"))
    assert checkpoints.load_training(tmp_path / "parts" / checkpoints.STATE)[1]["step"] == 3 + int(save_steps)
    finetune.main([*arguments("parts"), "--resume"])
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    for name in ("best/model.safetensors", "last/model.safetensors", checkpoints.STATE):
        whole, parts = (load_file(tmp_path / kind / name) for kind in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert [key for key, value in whole.items() if not torch.equal(value, parts[key])] == []


def test_a_training_that_has_ended_is_resumed_for_more_epochs(program, folder, tmp_path):
    finetune = program("finetune")
    for epochs in ("1", "1", "2"):
        finetune.main(options(folder, tmp_path / "out", "--epochs", epochs, "--resume"))
        assert len(rows(tmp_path / "out")) == int(epochs)


def test_a_tuned_model_is_tuned_on(program, folder, tmp_path):
    """With its tied matrices, and a new head for other classes."""
    finetune, checkpoints = program("finetune"), program("training.checkpoints")
    finetune.main(options(folder, tmp_path / "first", "--tie", "--epochs", "1"))
    tied, config = checkpoints.load(tmp_path / "first" / "best")
    assert config["tied"] and config["label_names"] == ["blue", "green", "red"]
    (folder / "red").rename(tmp_path / "elsewhere")
    some = ["--model", str(tmp_path / "first" / "best"), "--data", str(folder), "--workers", "0", "--batch-size", "8"]
    finetune.main([*some, "--epochs", "1", "--lr", "0", "--out", str(tmp_path / "second")])
    again, config = checkpoints.load(tmp_path / "second" / "best")
    assert config["tied"] and config["label_names"] == ["blue", "green"]
    for key, value in again.state_dict().items():
        if not key.startswith("head"):
            torch.testing.assert_close(value, tied.state_dict()[key])


def test_a_model_of_a_folder_is_tied(program, folder, tmp_path):
    """Whose matrices are not; and new weights depend on the seed alone."""
    checkpoints, make = program("training.checkpoints"), program("training.model").make
    classes, parsed = ["blue", "green", "red"], program("training.options").parsed

    def made(model, *more):
        args = parsed("", ["--model", str(model), "--data", str(folder), "--device", "cpu", *more])
        args.say = print
        return args, *make(args, classes)

    kwargs = ("--no-pretrained", "--model-kwargs", "depth=1", "embed_dim=24", "num_heads=2")
    _, model, options = made("vit_tiny_patch16_224", *kwargs)
    checkpoints.save_config(tmp_path, model, ["other"], options, tied=False)
    checkpoints.save_model(tmp_path, model.state_dict())
    args, tied, options = made(tmp_path, "--tie")
    assert args.tie and sum(p.numel() for p in tied.parameters()) < sum(p.numel() for p in model.parameters())
    torch.rand(1)
    torch.testing.assert_close(made(tmp_path)[1].head.weight, tied.head.weight, rtol=0, atol=0)
    checkpoints.save_config(tmp_path, tied, classes, options, args.tie)
    checkpoints.save_model(tmp_path, tied.state_dict())
    assert checkpoints.load(tmp_path)[1]["tied"]


def test_in_bfloat16_without_averaged_weights(program, folder, tmp_path):
    finetune = program("finetune")
    finetune.main(options(folder, tmp_path / "out", "--amp", "bf16", "--ema", "0", "--epochs", "1"))
    assert len(rows(tmp_path / "out")) == 1


def test_a_file_is_the_old_one_or_the_new_one(program, tmp_path):
    checkpoints = program("training.checkpoints")
    path = tmp_path / "a.txt"
    checkpoints.replace(path, lambda partial: partial.write_text("old"))

    def fails(partial):
        partial.write_text("ne")
        raise OSError("the disk is full")

    with pytest.raises(checkpoints.UsageError, match="a.txt: cannot be written: the disk is full"):
        checkpoints.replace(path, fails)
    assert path.read_text() == "old"
