"""Says what a model sees on images, and draws where it looks.

    python examples/predict.py finetuned/best photograph.jpg ...
    python examples/predict.py crossvit_15_240 photograph.jpg ...

The model is a folder that finetune.py wrote, or one of timm or tokenfusion by name. The picture has where its class
token or pooling query looks; of a DynaMixer, from where the token in the middle gets what, along its row and column,
and the matrices that say so for all tokens of that row.
"""

import argparse
from pathlib import Path

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import tokenfusion
from tokenfusion.cli.compare import facts, images, models, tables
from tokenfusion.cli.display import console
from tokenfusion.cli.errors import UsageError
from training import checkpoints, drawing, maps
from training.errors import reported

_DRAWN, _BATCH = 6, 16  # images


def load(name: str) -> tuple[nn.Module, bool]:
    """The model in evaluation mode, and whether it was trained."""
    if Path(name).is_dir():
        return checkpoints.load(Path(name))[0], True
    models.check_name(name)
    loaded = models.load(name)
    return loaded.own or loaded.model, loaded.pretrained


def seen_by(model: nn.Module, names: list[str], top: int) -> tuple[list[dict], torch.Tensor]:
    """The likeliest classes of all images, a few of which are in memory at once; the pixels of those to be drawn."""
    config = resolve_model_data_config(model)
    transform, mode = create_transform(**config), "L" if config["input_size"][0] == 1 else "RGB"
    seen, drawn = [], []
    for start in range(0, max(1, len(names)), _BATCH):
        photographs = images.load(names[start : start + _BATCH])
        pixels = torch.stack([transform(images.middle(each.image).convert(mode)) for each in photographs])
        seen += facts.top(model, photographs, model(pixels), top)
        drawn += pixels[: _DRAWN - len(drawn)]
    return seen, torch.stack(drawn)


def columns(model: nn.Module, pixels: torch.Tensor) -> dict[str, list]:
    """What is drawn beside the images, by name."""
    found = {}
    mixing = list(maps.mixing(model, pixels).items())
    for name, (of_columns, of_rows) in mixing[:: max(1, len(mixing) - 1)]:  # the first block and the last
        y, x = of_rows.shape[1] // 2, of_columns.shape[1] // 2
        along_row, along_column = of_rows[:, y, :, x], of_columns[:, x, :, y]
        cross = torch.zeros(len(pixels), of_rows.shape[1], of_columns.shape[1])
        cross[:, y, :], cross[:, :, x] = along_row, along_column
        cross[:, y, x] = (along_row[:, x] + along_column[:, y]) / 2
        name = name.removesuffix(".attn")
        found[f"{name}:\nwhat the middle gets"] = [drawing.over(each, (y, x)) for each in cross]
        found[f"{name}:\nmixing of its row"] = [drawing.matrix(each) for each in of_rows[:, y]]
    for weights in maps.attention(model, pixels) if not found else ():
        size = " x ".join(map(str, weights.shape[1:]))
        found[f"attention to {size} patches"] = [drawing.over(each) for each in weights]
    return found


def as_seen(pixels: torch.Tensor, config: dict) -> torch.Tensor:
    """[B, H, W, 3] between 0 and 1."""
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (pixels * std + mean).clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def _title(seen: dict, trained: bool) -> str:
    """The likeliest class; the name of the file where there is none, or weights are random."""
    first = next(iter(seen["top"]), None)
    return f"{first['label']}, {first['probability']:.0%}" if first and trained else Path(seen["image"]).name


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder such as finetuned/best, or a name")
    parser.add_argument("images", nargs="*", help="files; without, the two photographs of scikit-learn")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes of each image (default: 3)")
    parser.add_argument("--picture", type=Path, default=Path("predicted.png"), help="(default: predicted.png)")
    args = parser.parse_args(arguments)
    if args.top < 1:
        raise UsageError(f"--top: got {args.top}, expected 1 or more")

    model, trained = load(args.model)
    tokenfusion.fuse(model)
    seen, pixels = seen_by(model, args.images, args.top)
    out = console()
    tables.print_top(out, seen, trained)

    drawn = columns(model, pixels)
    if not drawn:
        out.print("no picture: this model has no class token, pooling query or mixing matrices over a known grid")
        return
    titles = [_title(each, trained) for each in seen[:_DRAWN]]
    drawing.draw(args.picture, list(as_seen(pixels, resolve_model_data_config(model))), titles, drawn)
    out.print(f"where it looks: {args.picture}")


if __name__ == "__main__":
    reported(main)
