"""Trainings that take a second, and images for them."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
CROSSVIT = {
    "img_size": 16,
    "in_chans": 3,
    "img_scale": (1.0, 1.0),
    "patch_size": (4, 8),
    "embed_dim": (16, 24),
    "depth": ((1, 1, 0),),
    "num_heads": (2, 3),
    "mlp_ratio": (2.0, 2.0, 1.0),
}


def painted(folder: Path, each: int = 10) -> Path:
    """Images of one colour and noise, in a subfolder for each colour."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            noise = random.integers(-30, 30, (12, 16, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype("uint8")).save(folder / name / f"{i}.png")
    return folder


def options(folder: Path, out: Path, *more: str, kwargs: tuple[str, ...] = ()) -> list[str]:
    """24 images to train with and 6 to test with; 3 steps an epoch."""
    some = f"--data {folder} --out {out} --model tokenfusion_crossvit_9_240 --no-pretrained --device cpu --workers 0"
    some += " --batch-size 8 --epochs 2 --lr 2e-3"
    return [*some.split(), "--model-kwargs", *(f"{name}={value}" for name, value in CROSSVIT.items()), *kwargs, *more]


def rows(out: Path) -> list[dict[str, str]]:
    """Of the log, without what differs between two runs of one training."""
    with (out / "log.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "images/s"} for row in csv.DictReader(file)]
