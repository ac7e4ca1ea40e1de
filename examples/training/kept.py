"""What a training remembers of its options and images, so that it is resumed as the same training."""

import hashlib
import json
import os

from tokenfusion.cli.errors import UsageError

_SAME = ("model", "model_kwargs", "tie", "opt", "weight_decay", "layer_decay", "ema", "batch_size", "seed")
_NAMED = (  # they change numbers, and a training can go on with others
    *("epochs", "lr", "sched", "warmup_epochs", "clip_grad"),
    *("smoothing", "mixup", "cutmix", "scale", "hflip", "jitter", "aa", "reprob", "crop_pct", "img_size"),
    *("amp", "fuse", "compile"),
)


def of(args, classes: list[str], train: list, test: list) -> dict:
    """As JSON has it; train and test are (path or picture, label) pairs."""
    same = {name: getattr(args, name) for name in _SAME} | {"classes": classes}
    same["images"] = f"{len(train)} to train with, {len(test)} to test with, files {_digest(args, train, test)}"
    named = {name: getattr(args, name) for name in _NAMED}
    return json.loads(json.dumps({"same": same, "named": named}))


def differences(was: dict, now: dict, path: os.PathLike) -> str:
    """In words what changes numbers; nothing where all is as it was.

    Raises:
        UsageError: it is another training.
    """
    for name, value in now["same"].items():
        before = was["same"].get(name)
        if before != value:
            raise UsageError(f"--resume: {path} is of a training with another {name}: {before}, here {value}")
    found = [(name, was["named"].get(name), value) for name, value in now["named"].items()]
    return ", ".join(f"--{name.replace('_', '-')} {new} (was {old})" for name, old, new in found if old != new)


def _digest(args, *parts: list) -> str:
    """Of the names of files in their order; pictures that are no files are always the same."""
    digest = hashlib.sha256()
    for part in parts:
        for path, label in part:
            name = os.path.relpath(path, args.data) if isinstance(path, str) else ""
            digest.update(os.fsencode(f"{label} {name}\n"))
        digest.update(b"\n")
    return digest.hexdigest()[:12]
