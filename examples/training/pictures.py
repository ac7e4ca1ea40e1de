"""Images with labels, of folders or scikit-learn's digits, read and checked before any training begins."""

import os
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
from tokenfusion.cli.errors import UsageError, first_line, printable
from training import digits, log

HELD_OUT = 5  # every fifth image of a class is for testing where there is no folder val
_TEST = ("val", "valid", "validation")


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
    pairs, *rest = [_in_folder(args, folder) for folder in _parts(args)] if args.data else [digits.pictures()]
    test = rest[0] if rest else []
    classes = sorted({name for _, name in pairs})
    unknown = sorted({name for _, name in test} - set(classes))
    if unknown:
        raise UsageError(f"--data: {args.data}: the class {unknown[0]} is to be tested, and not in train")
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


def _parts(args) -> list[Path]:
    """The folder, or train in it and, where there is one, that of the images to test with."""
    parts = [name for name in ("train", *_TEST, "test") if _classes(args.data / name)]
    if not parts:
        return [args.data]
    if parts[0] != "train":
        raise UsageError(f"--data: {args.data}: got the folder {parts[0]}, which has folders, expected train beside it")
    used = ["train", *[name for name in parts if name in _TEST][:1]]
    for name in _classes(args.data):
        if name not in used:
            args.say(f"left out: {args.data / name}: beside train")
    return [args.data / name for name in used]


def _classes(folder: Path) -> list[str]:
    """The names of its subfolders that are not hidden."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


class _Folder(ImageFolder):
    def __init__(self, folder: Path):
        def shown(path: str) -> bool:
            return not any(part.startswith(".") for part in Path(path).relative_to(folder).parts)

        super().__init__(folder, is_valid_file=shown, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        super().find_classes(directory)  # says what is wrong
        names = _classes(Path(directory))
        return names, {name: label for label, name in enumerate(names)}


def _in_folder(args, folder: Path) -> list[tuple[str, str]]:
    """The path and the class of every image; files that are none, and classes without any, are named and left out."""
    try:
        found = _Folder(folder)
    except OSError as error:
        raise UsageError(f"--data: {first_line(error)}") from None
    mine = [path for path, _ in found.samples[args.rank :: args.world_size]]
    args.say(f"reading {len(found.samples)} files of {folder}")
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with ThreadPool(threads) as pool, log.bar(args) as bar:
        tried = bar.track(pool.imap(_problem, mine, chunksize=16), len(mine), description="reading")
        problems = [dict(zip(mine, tried, strict=True))]
        pool.close()
        pool.join()  # what the end of the block would do, to terminate it, can hang
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
    except Exception as error:  # noqa: BLE001  (whatever Pillow raises of a damaged file)
        return f"{printable(path)}: damaged image: {first_line(error)}"
