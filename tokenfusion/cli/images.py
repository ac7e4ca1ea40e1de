"""Photographs named on the command line, or scikit-learn's two sample photographs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tokenfusion.cli.errors import UsageError


def load(paths: Sequence[str]) -> list[tuple[str, Image.Image]]:
    """(name, RGB image) of every file, or of the sample photographs where no file is named.

    Raises:
        UsageError: a file that is missing or is no whole image; no file named and no scikit-learn.
    """
    return [(path, _read(path)) for path in paths] or _samples()


def _read(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError:
        raise UsageError(f"IMAGE: {path}: not an image file that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise UsageError(f"IMAGE: {path}: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        system_reason = getattr(error, "strerror", None)  # such as "No such file or directory"
        raise UsageError(f"IMAGE: {path}: {system_reason or f'damaged image: {error}'}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _samples() -> list[tuple[str, Image.Image]]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise UsageError(
            "IMAGE: none given, and the default photographs come with scikit-learn, which is not installed: "
            "name image files, or install tokenfusion[demo]"
        ) from None
    samples = load_sample_images()
    named = zip(samples.filenames, samples.images, strict=True)
    return [(Path(name).name, Image.fromarray(pixels)) for name, pixels in named]
