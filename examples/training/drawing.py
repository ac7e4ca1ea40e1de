"""Pictures of where a model looks, beside the images that it saw."""

from pathlib import Path

import torch

from tokenfusion.cli.errors import UsageError
from training.checkpoints import replace

_SIDE, _TITLE = 2.2, 0.3  # inches


def draw(path: Path, shown: list[torch.Tensor], titles: list[str], columns: dict[str, list]) -> None:
    """A row for each image [H, W, 3]; a column for each name, whose entries draw themselves onto an axis.

    Raises:
        UsageError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--picture: drawn by matplotlib, which is not installed: pip install matplotlib") from None
    rows = len(shown)
    figure = Figure(figsize=((1 + len(columns)) * _SIDE, rows * (_SIDE + _TITLE) + _TITLE), layout="constrained")
    axes = figure.subplots(rows, 1 + len(columns), squeeze=False)
    for i, (image, title) in enumerate(zip(shown, titles, strict=True)):
        axes[i, 0].imshow(image)
        axes[i, 0].set_title(title, fontsize=9, loc="left")
        for axis, (name, entries) in zip(axes[i, 1:], columns.items(), strict=True):
            entries[i](axis, image)
            if i == 0:
                axis.set_title(name, fontsize=9, loc="left")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    replace(path, lambda partial: figure.savefig(partial, dpi=120))


def over(weights: torch.Tensor, mark: tuple[int, int] | None = None):
    """Weights [h, w] over the image, which pales where they are small; mark is the token (y, x) that they are of."""

    def onto(axis, image: torch.Tensor) -> None:
        height, width = image.shape[:2]
        place = (-0.5, width - 0.5, height - 0.5, -0.5)
        axis.imshow(image.mean(dim=2), cmap="gray", vmin=-0.6, vmax=1.2)
        strength = (weights / weights.max()).clamp(0, 1)
        axis.imshow(strength, cmap="inferno", alpha=0.75 * strength, extent=place, interpolation="nearest")
        if mark is not None:
            from matplotlib.patches import Rectangle

            tall, wide = height / weights.shape[0], width / weights.shape[1]
            corner = (mark[1] * wide - 0.5, mark[0] * tall - 0.5)
            axis.add_patch(Rectangle(corner, wide, tall, fill=False, edgecolor="deepskyblue", linewidth=1.5))

    return onto


def matrix(values: torch.Tensor):
    """A matrix for itself."""

    def onto(axis, image: torch.Tensor) -> None:
        axis.imshow(values, cmap="inferno", vmin=0)
        axis.set_xlabel("target", fontsize=8)
        axis.set_ylabel("source", fontsize=8)

    return onto
