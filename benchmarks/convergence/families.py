"""A tiny configuration of each family of models, and handwritten digits for it."""

from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import nn

import tokenfusion.models  # noqa: F401  (registers the models)

CLASSES = 10
HELD_OUT = 256  # images whose logits are compared


@dataclass(frozen=True)
class Family:
    """name of the family, model of timm or of this package with its options, the side of its square images, and the
    learning rate: one at which a training does not depend on the order of its sums for as long as it is compared."""

    name: str
    model: str
    size: int
    rate: float
    options: tuple[tuple[str, object], ...]

    def make(self) -> nn.Module:
        """With the same weights each time, as its library has it: not fused."""
        torch.manual_seed(0)
        model = timm.create_model(self.model, img_size=self.size, in_chans=1, num_classes=CLASSES, **dict(self.options))
        tokenfusion.unfuse(model)
        return model


def _family(name: str, model: str, size: int, rate: float, **options) -> Family:
    return Family(name, model, size, rate, tuple(options.items()))


FAMILIES = [
    _family(
        "CrossViT of timm",
        "crossvit_tiny_240",
        48,
        3e-4,
        img_scale=(1.0, 1.0),
        patch_size=(6, 8),
        embed_dim=(48, 96),
        depth=((1, 2, 0), (1, 2, 0)),
        num_heads=(3, 3),
        mlp_ratio=(2.0, 2.0, 1.0),
    ),
    _family(
        "DynaMixer",
        "dynamixer_s",
        32,
        5e-4,
        patch_size=4,
        layers=(2, 2),
        embed_dims=64,
        num_heads=8,
        transitions=(False,),
    ),
    _family("ViT-PE", "vit_pe_small_patch16_224", 32, 3e-4, patch_size=4, embed_dim=96, depth=4, num_heads=3),
    _family(
        "Token Fusion",
        "token_fusion_late",
        32,
        3e-4,
        embed_dim=96,
        depth=4,
        num_heads=3,
        cnn="test_resnet",
        pretrained_cnn=False,
        train_cnn=True,
    ),
]


def digits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1797 digits, [1797, 1, size, size] of mean 0 and deviation 1, in an order of no class; labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate((images - images.mean()) / images.std(), size=(size, size), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(found.target)[order]
