"""Images with labels, of folders or scikit-learn's digits, read and checked before any training begins."""

import random
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.data import create_transform, resolve_model_data_config
from timm.layers import to_2tuple
from torch import nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from tokenfusion.cli.compare import images
from tokenfusion.cli.errors import UsageError, first_line
from training import digits

HELD_OUT = 5  # every fifth image of a class is for testing where there is no folder val


def seed_by(*place: int) -> None:
    """What is random from now on depends on these numbers alone."""
    seed = int(np.random.SeedSequence(place).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    (torch if torch.accelerator.is_available() else torch.default_generator).manual_seed(seed)


class Pictures(Dataset):
    """(path or picture, label) pairs, of which a transform makes tensors; mode is Pillow's, "RGB" or "L"."""

    def __init__(self, pairs: list, mode: str, transform, seed: int):
        self.pairs, self.mode, self.transform, self.seed, self.epoch = pairs, mode, transform, seed, 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int):
        picture, label = self.pairs[index]
        picture = read(picture) if isinstance(picture, str) else picture
        seed_by(self.seed, self.epoch, index)
        return self.transform(picture.convert(self.mode)), label


def read(path: str):
    return images.middle(images.load([path])[0].image)


def split(args) -> tuple[list, list, list[str]]:
    """(picture, label) pairs to train with and to test with, and the names of the classes.

    Raises:
        UsageError: there is nothing to train or to test with.
    """
    train, test = (args.data / "train", args.data / "val") if args.data else (None, None)
    if args.data is None:
        pairs, test = digits.pictures(), []
    elif train.is_dir() and test.is_dir():
        pairs, test = _in_folder(args, train), _in_folder(args, test)
    else:
        pairs, test = _in_folder(args, args.data), []
    classes = sorted({name for _, name in pairs})
    unknown = sorted({name for _, name in test} - set(classes))
    if unknown:
        raise UsageError(f"--data: {args.data}: the class {unknown[0]} is in val, and not in train")
    if len(classes) < 2:
        raise UsageError(f"--data: {args.data}: got the class {classes[0]} alone, expected two or more")
    if not test:
        of_classes = [[pair for pair in pairs if pair[1] == name] for name in classes]
        pairs = [pair for each in of_classes for i, pair in enumerate(each, start=1) if i % HELD_OUT]
        test = [pair for each in of_classes for pair in each[HELD_OUT - 1 :: HELD_OUT]]
    if len(pairs) < args.batch_size:
        raise UsageError(
            f"--batch-size: got {args.batch_size}, expected at most {len(pairs)}, the images to train with"
        )
    if not test:
        raise UsageError(
            f"--data: {args.data}: no class has {HELD_OUT} images, and without val every fifth is held out"
        )
    labels = {name: label for label, name in enumerate(classes)}
    return *([(picture, labels[name]) for picture, name in part] for part in (pairs, test)), classes


def datasets(args, model: nn.Module, options: dict, train: list, test: list) -> tuple[Pictures, Pictures]:
    """Of such pairs as `split` gives, for a model made with these options, whose configuration is told of it."""
    usual, channels = model.pretrained_cfg, options.get("in_chans", 3)
    size = args.img_size or options.get("img_size") or usual["input_size"][1:]
    given = {"input_size": (channels, *to_2tuple(size)), "crop_pct": args.crop_pct}
    if channels == 1:
        given |= {name: [sum(usual[name]) / len(usual[name])] for name in ("mean", "std")}
    config = resolve_model_data_config(model, given)
    model.pretrained_cfg.update(config)
    varied = {"scale": (args.scale, 1.0), "hflip": args.hflip, "color_jitter": args.jitter}
    varied |= {"auto_augment": args.aa, "re_prob": args.reprob}
    mode = "L" if channels == 1 else "RGB"
    return (
        Pictures(train, mode, create_transform(**config, **varied, is_training=True), args.seed),
        Pictures(test, mode, create_transform(**config), args.seed),
    )


def _in_folder(args, folder: Path) -> list[tuple[str, str]]:
    """The path and the class of every image; files that are none, and classes without any, are named and left out."""
    try:
        found = ImageFolder(folder, is_valid_file=lambda path: True, allow_empty=True)
    except OSError as error:
        raise UsageError(f"--data: {first_line(error)}") from None
    mine = [path for path, _ in found.samples[args.rank :: args.world_size]]
    with ThreadPool() as pool:
        problems = [dict(zip(mine, pool.imap(_problem, mine, chunksize=16), strict=True))]
    if args.world_size > 1:
        problems *= args.world_size
        dist.all_gather_object(problems, problems[0])
    reasons = {path: reason for part in problems for path, reason in part.items() if reason}
    pairs = [(path, found.classes[label]) for path, label in found.samples if path not in reasons]
    empty = set(found.classes) - {name for _, name in pairs}
    for line in (*reasons.values(), *(f"{folder / name}: a class without images" for name in sorted(empty))):
        args.say(f"left out: {line}")
    if not pairs:
        raise UsageError(f"--data: {folder}: no images in its subfolders")
    return pairs


def _problem(path: str) -> str | None:
    try:
        read(path)
    except UsageError as error:
        return str(error).removeprefix("IMAGE: ")
