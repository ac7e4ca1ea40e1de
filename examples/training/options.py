"""The command line of finetune.py."""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils import ParseKwargs
from torch import nn

from tokenfusion.cli.errors import UsageError
from training import checkpoints, digits, schedule

_LEAST = {"epochs": 1, "batch_size": 1, "img_size": 1, "save_steps": 0, "workers": 0, "seed": 0}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Keywords(ParseKwargs):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            if "=" not in value:
                raise UsageError(f"{option_string}: got {value}, expected NAME=VALUE")
        super().__call__(parser, namespace, values, option_string)


def parsed(description: str, arguments: list[str] | None) -> argparse.Namespace:
    """The options; without --data those that suit the digits are the defaults.

    Raises:
        UsageError: a value that none of them takes.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help, allow_abbrev=False)
    _add_what(parser.add_argument)
    _add_how(parser.add_argument)
    args = parser.parse_args(arguments)
    if args.data is None:
        parser.set_defaults(**digits.options(args.model))
        args = parser.parse_args(arguments)
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')}: got {value}, expected {least} or more")
    _check_device(args.device)
    args.given = shlex.join(arguments)
    return args


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdecimal() or device == kind):
        raise UsageError(f"--device: got {device}, expected cpu or cuda")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device: got {device}, and PyTorch sees {torch.cuda.device_count()} GPUs")


def check(args) -> None:
    """
    Raises:
        UsageError: what can be known before an image has been read.
    """
    if (args.out / checkpoints.STATE).exists() and not args.resume:
        raise UsageError(f"--out: {args.out} has a training; --resume goes on with it")
    for folder in (args.out / "best", args.out / "last"):
        if (folder / "config.json").exists() and (not args.resume or _is_same(folder, args.model)):
            raise UsageError(f"--out: {folder} is a model, which would be overwritten; name another folder")
    share, rest = divmod(args.batch_size, args.world_size)
    if rest or (share % 2 and (args.mixup or args.cutmix)):
        raise UsageError(f"--batch-size: got {args.batch_size}, expected even shares for {args.world_size} processes")
    schedule.make(args, nn.Linear(1, 1), steps=1000)  # timm knows their names
    if args.world_size > 1:
        dist.barrier()  # before any process writes


def keep(args) -> None:
    """In options.txt."""
    checkpoints.replace(args.out / "options.txt", lambda path: path.write_bytes(os.fsencode(args.given + "\n")))


def _is_same(folder: Path, model: str) -> bool:
    return os.path.exists(model) and os.path.samefile(folder, model)


def _add_what(add) -> None:
    add("--model", default="tokenfusion_crossvit_9_240", help="of timm or tokenfusion, or a folder such as best/")
    add("--model-kwargs", nargs="+", action=_Keywords, default={}, metavar="NAME=VALUE", help="of the model")
    add("--pretrained", action=argparse.BooleanOptionalAction, help="weights of a hub; without, where there are any")
    add("--data", type=Path, metavar="FOLDER", help="a subfolder of images for each class; the digits without")
    add("--img-size", type=int, metavar="N", help="of images, where the model takes another than its own")
    add("--out", type=Path, default=Path("finetuned"), metavar="FOLDER", help="where everything goes")
    add("--resume", action="store_true", help="go on with the training in --out, or begin it where there is none")
    add("--save-steps", type=int, default=0, metavar="N", help="save after so many steps, too; 0: after epochs alone")
    add("--fuse", action=argparse.BooleanOptionalAction, default=True, help="tokenfusion's operators")
    add("--tie", action="store_true", help="one matrix where a layer has two, see tokenfusion.tie_weights")
    add("--compile", action="store_true", help="torch.compile")
    add("--amp", choices=("bf16",), help="autocast in this dtype")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of each process")
    add("--workers", type=int, default=4, metavar="N", help="that read images, for each process")
    add("--seed", type=int, default=0, metavar="N", help="of all that is random")


def _add_how(add) -> None:
    add("--epochs", type=int, default=10, metavar="N", help="times through the images")
    add("--batch-size", type=int, default=64, metavar="N", help="images of a step, all processes together")
    add("--opt", default="adamw", help="an optimizer of timm")
    add("--lr", type=float, default=3e-4, help="the highest learning rate")
    add("--weight-decay", type=float, default=0.05, help="not of biases, norms and positions")
    add("--layer-decay", type=float, help="learning rate of a layer by that of the one above it, such as 0.75")
    add("--sched", default="cosine", help="a scheduler of timm")
    add("--warmup-epochs", type=float, default=1, metavar="N", help="in which the learning rate rises")
    add("--clip-grad", type=float, default=1.0, metavar="NORM", help="largest norm of the gradients; 0 for any")
    add("--ema", type=float, default=0.9998, metavar="DECAY", help="of averaged weights; 0 for none")
    add("--smoothing", type=float, default=0.1, help="of labels")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="such as 0.8")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="such as 1.0")
    add("--scale", type=float, default=0.35, help="smallest share of an image that is cut out")
    add("--hflip", type=float, default=0.5, help="probability that an image is mirrored")
    add("--jitter", type=float, default=0.3, help="of colours")
    add("--aa", metavar="POLICY", help="AutoAugment of timm, such as rand-m9-mstd0.5-inc1")
    add("--reprob", type=float, default=0.0, help="probability that a part is erased")
    add("--crop-pct", type=float, help="side of the middle of an image that is tested, of the whole")
