"""Processes that are killed, and processes that share the work."""

import pytest

from tests.conftest import ROOT
from tests.training.small import options, rows

BEGIN = f"""
import faulthandler, os, signal, sys
sys.path.insert(0, "{ROOT / "examples"}")
import torch, finetune
from training import checkpoints
from pathlib import Path
torch.set_num_threads(1)

def other_weights(*args, make=finetune.make):  # as where one process alone could download pretrained ones
    model, options = make(*args)
    for parameter in model.parameters():
        parameter.data += 1
    return model, options

def started(arguments, **environment):
    pid = os.fork()
    if pid == 0:
        os.environ.update(environment)
        faulthandler.dump_traceback_later(180, exit=True)  # what hangs says where
        if environment.get("RANK") == "1":
            finetune.make = other_weights
        try:
            finetune.main(arguments)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def ended(*pids):
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert not any(codes), codes
"""


def test_whenever_it_is_killed_a_usable_last_is_left(run_python, folder, tmp_path):
    whole, parts = (options(folder, tmp_path / out, "--save-steps", "1") for out in ("whole", "parts"))
    run_python(
        BEGIN
        + f"""
ended(started({whole}))
out = Path("{tmp_path}/parts")
state, replace = out / checkpoints.STATE, os.replace

def killed_at(count):  # by itself, at so many files, of which the last one is cut and has not taken its place
    written = []

    def replaced(partial, path):
        written.append(path)
        if len(written) == count:
            os.truncate(partial, partial.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(partial, path)

    checkpoints.os.replace = replaced
    pid = started({parts} + ["--resume"])
    checkpoints.os.replace = replace
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL

killed_at(7)  # options.txt, two config.json, best, last, last after a step
assert not state.exists()
checkpoints.load(out / "last")
for count in (8, 3, 7):  # the model, its state, the log of the first epoch
    killed_at(count)
    checkpoints.load(out / "last")
    checkpoints.load_training(state)
ended(started({parts} + ["--resume"]))
states = (Path("{tmp_path}") / each / checkpoints.STATE for each in ("whole", "parts"))
expected, got = map(checkpoints.load_training, states)
for part, values in expected[0].items():
    for name, value in values.items():
        same = got[0][part][name]
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same, (part, name)
losses = [[(row["train_loss"], row["loss"]) for row in each[1]["history"]] for each in (expected, got)]
assert losses[0] == losses[1], losses
"""
    )


def test_two_processes_have_the_losses_of_one(run_python, folder, tmp_path):
    """By DDP and by FSDP, whatever weights the second one begins with."""
    (folder / "red" / "9.png").unlink()  # five images to test with, of which one process gets three
    steady = ("--sched", "step", "--warmup-epochs", "0")  # whatever --epochs is
    ways = {way: options(folder, tmp_path / way, *steady, "--parallel", way) for way in ("ddp", "fsdp")}
    one = options(folder, tmp_path / "one", *steady)
    run_python(
        BEGIN
        + f"""
import socket

def both(arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    ended(*(started(arguments, **address, RANK=rank, LOCAL_RANK=rank) for rank in "01"))

one, ddp, fsdp = {one}, *{list(ways.values())}
ended(started(one))
for arguments in (ddp, fsdp):
    both([*arguments, "--epochs", "1"])
ended(started([*ddp, "--resume"]))  # one process goes on with what two have saved
both([*fsdp, "--resume"])
"""
    )
    expected = losses(tmp_path / "one")
    assert len(expected) == 4
    for way in ways:
        assert losses(tmp_path / way) == pytest.approx(expected, rel=1e-4), way


def losses(out):
    return [float(row[name]) for row in rows(out) for name in ("train_loss", "loss")]
