"""An attentive probe on the tokens of a frozen backbone, trained with nn.MultiheadAttention as it is and fused.

The backbone is a vision transformer of timm's, with pretrained weights where they can be had, else with random ones.
The images are scikit-learn's handwritten digits, or those of a folder with one subfolder for each class. Both probes
start from the same weights and see the same batches; a plot shows where the query looks.
"""

import argparse
import copy
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import tokenfusion
from tokenfusion import measure
from tokenfusion.cli.compare import models

BATCH, HELD_OUT, SHOWN = 32, 4, 6  # images a step; every fourth is held out; so many of them are drawn


class Probe(nn.Module):
    """One learned query that attends to the tokens, and a linear classifier of what it finds."""

    def __init__(self, channels: int, classes: int, num_heads: int):
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, channels))
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        self.classify = nn.Linear(channels, classes)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, N, C] -> scores of the classes [B, K], and attention weights [B, N]."""
        found, weights = self.attention(self.query.expand(len(tokens), -1, -1), tokens, tokens)
        return self.classify(self.norm(found[:, 0])), weights[:, 0]


def labelled_images(folder: Path | None, most: int, transform) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Images as the backbone takes them, their labels, and how many classes there are."""
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pictures = [
            Image.fromarray((255 / 16 * image).astype("uint8")).convert("RGB") for image in digits.images[:most]
        ]
        return torch.stack([transform(each) for each in pictures]), torch.tensor(digits.target[:most]), 10
    dataset = timm.data.ImageDataset(folder, transform=transform)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:most].tolist()
    images, labels = zip(*(dataset[i] for i in chosen), strict=True)
    return torch.stack(images), torch.tensor(labels), len(dataset.reader.class_to_idx)


@torch.no_grad()
def tokens_of(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[B, N, C], computed once: the backbone is frozen."""
    return torch.cat([backbone.forward_features(part) for part in images.split(BATCH)])


def train(probe: Probe, tokens: torch.Tensor, labels: torch.Tensor, epochs: int) -> tuple[float, int]:
    """Steps a second, and the most memory that a step holds beside its batch."""
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(1)

    def step(batch: torch.Tensor, targets: torch.Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(probe(batch)[0], targets).backward()
        optimizer.step()

    steps, start = 0, time.perf_counter()
    for _ in range(epochs):
        for chosen in torch.randperm(len(tokens), generator=order).split(BATCH):
            step(tokens[chosen], labels[chosen])
            steps += 1
    seconds = time.perf_counter() - start
    return steps / seconds, measure.peak_extra_bytes(lambda: step(tokens[:BATCH], labels[:BATCH]))


def draw(path: Path, images: torch.Tensor, weights: torch.Tensor) -> None:
    """Images [B, 3, H, W], and beneath each where its query looks, weights [B, h, w]."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(images), figsize=(1.6 * len(images), 3.4), squeeze=False)
    for column, (image, weight) in enumerate(zip(images, weights, strict=True)):
        low, high = image.min(), image.max()
        axes[0, column].imshow(((image - low) / (high - low)).permute(1, 2, 0))
        axes[1, column].imshow(weight)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].set_title("image", loc="left")
    axes[1, 0].set_title("attention weights", loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="a vision transformer of timm's")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images in one subfolder for each class")
    parser.add_argument("--images", type=int, default=512, help="how many to take at most (default: 512)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("attentive_probe.png"), help="where the plot goes")
    args = parser.parse_args(arguments)

    loaded = models.load(args.model)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded.model))
    images, labels, classes = labelled_images(args.data, args.images, transform)
    print(f"{args.model}, weights {loaded.weights}; {len(images)} images of {classes} classes")
    tokens = tokens_of(loaded.model, images)
    held_out = torch.arange(len(tokens)) % HELD_OUT == 0

    torch.manual_seed(0)
    plain = Probe(tokens.shape[2], classes, args.heads)
    fused = copy.deepcopy(plain)
    tokenfusion.fuse(fused, strict=True)
    print(f"{'':<24}{'accuracy':>10}{'steps/s':>10}{'peak MB':>10}")
    for name, probe in (("nn.MultiheadAttention", plain), ("fused", fused)):
        steps_a_second, peak = train(probe, tokens[~held_out], labels[~held_out], args.epochs)
        with torch.no_grad():
            scores, weights = probe(tokens[held_out])
        accuracy = (scores.argmax(dim=1) == labels[held_out]).float().mean().item()
        print(f"{name:<24}{accuracy:>10.1%}{steps_a_second:>10.1f}{peak / 1e6:>10.1f}")
    patches = weights[:SHOWN, loaded.model.num_prefix_tokens :]
    draw(args.out, images[held_out][:SHOWN], patches.unflatten(1, loaded.model.patch_embed.grid_size))
    print(f"where the fused probe's query looks: {args.out}")


if __name__ == "__main__":
    main()
