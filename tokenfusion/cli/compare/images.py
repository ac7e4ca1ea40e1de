"""Photographs named on the command line, or scikit-learn's two sample photographs."""

import os
import stat
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tokenfusion.cli.errors import UsageError, printable

_LONGEST = 16  # times the shorter side, of which a model that takes a square from the middle sees one


@dataclass(frozen=True)
class Photograph:
    """An RGB image; remark says how it was read where the file leaves that open."""

    name: str
    image: Image.Image
    remark: str | None = None


def load(paths: Sequence[str]) -> list[Photograph]:
    """Every file, or the sample photographs where no file is named.

    Raises:
        UsageError: a file that is missing or is no whole image; no file named and no scikit-learn.
    """
    return [_read(path) for path in paths] or _samples()


def middle(image: Image.Image) -> Image.Image:
    """The middle of an image that is many times as long as it is wide, which would be huge once it is resized."""
    width, height = image.size
    longest = _LONGEST * min(width, height)
    cut_x, cut_y = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    if cut_x == cut_y == 0:
        return image
    return image.crop((cut_x, cut_y, width - cut_x, height - cut_y))


def _read(path: str) -> Photograph:
    name = printable(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise UsageError(f"IMAGE: {name}: not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, and of metadata that nothing here reads
            with Image.open(path) as image:
                return Photograph(name, *_rgb(name, ImageOps.exif_transpose(image)))
    except Image.UnidentifiedImageError:
        raise UsageError(f"IMAGE: {name}: not an image file that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise UsageError(f"IMAGE: {name}: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        system_reason = getattr(error, "strerror", None)  # such as "No such file or directory"
        raise UsageError(f"IMAGE: {name}: {system_reason or f'damaged image: {error}'}") from None


def _rgb(name: str, image: Image.Image) -> tuple[Image.Image, str | None]:
    """The image in RGB, and a remark where its white had to be guessed."""
    remark = None
    if image.mode == "F" or image.mode.startswith("I"):  # more than 8 bits of grey, which Pillow's conversion clips
        shades = np.asarray(image)
        certain = image.mode.startswith("I;16") or image.format == "PNG"
        white = 0xFFFF if certain else _white(name, shades)
        remark = None if certain else f"{name}: grey in 32 bits, up to {shades.max():g}; {white} is taken for white."
        image = Image.fromarray((shades * (255 / white)).round().astype(np.uint8))
    return image.convert("RGB"), remark


def _white(name: str, shades: np.ndarray) -> int:
    """The shade that is white: the smallest usual one that no pixel is brighter than."""
    usual = [1, 0xFF, 0xFFFF] if shades.dtype.kind == "f" else [0xFF, 0xFFFF]
    darkest, brightest = shades.min(), shades.max()
    if not (darkest >= 0 and brightest <= usual[-1]):
        raise UsageError(
            f"IMAGE: {name}: shades from {darkest:g} to {brightest:g}, expected 0 to 1, to 255 or to 65535"
        )
    return next(white for white in usual if brightest <= white)


def _samples() -> list[Photograph]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UsageError(
            "IMAGE: none given, and the default photographs come with scikit-learn, which is not installed: "
            "name image files, or install tokenfusion[demo]"
        ) from None
    samples = load_sample_images()
    named = zip(samples.filenames, samples.images, strict=True)
    return [Photograph(Path(name).name, Image.fromarray(pixels)) for name, pixels in named]
