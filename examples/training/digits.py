"""scikit-learn's handwritten digits, and for each family of models a tiny configuration that learns them in minutes."""

from PIL import Image

from tokenfusion.cli.errors import UsageError

_OPTIONS = {  # of finetune.py
    "epochs": 20,
    "batch_size": 32,
    "lr": 3e-3,
    "warmup_epochs": 2,
    "hflip": 0.0,
    "scale": 0.9,
    "jitter": 0.0,
    "crop_pct": 1.0,
    "workers": 0,
}

_SMALL = {"img_size": 16, "in_chans": 1}
TINY = {  # keyword arguments of the models whose names contain the key
    "crossvit": _SMALL
    | {
        "img_scale": (1.0, 1.0),
        "patch_size": (4, 8),
        "embed_dim": (48, 96),
        "depth": ((1, 2, 0), (1, 2, 0)),
        "num_heads": (3, 3),
        "mlp_ratio": (2.0, 2.0, 1.0),
    },
    "dynamixer": _SMALL
    | {"patch_size": 4, "layers": (2, 2), "embed_dims": 64, "num_heads": 8, "transitions": (False,)},
    "vit_pe": _SMALL | {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, "global_pool": "avg"},
    "token_fusion": {
        "img_size": 32,
        "in_chans": 1,
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "cnn": "test_resnet",
        "pretrained_cnn": False,
        "train_cnn": True,
    },
}


def options(model: str) -> dict:
    """Those of finetune.py that suit the digits; a model that begins with convolutions learns them sooner."""
    return _OPTIONS | ({"epochs": 8} if "token_fusion" in model else {})


def tiny(model: str) -> dict:
    """Keyword arguments that make the model small enough for the digits; none for a family without any."""
    return next((options for family, options in TINY.items() if family in model), {})


def pictures() -> list[tuple[Image.Image, str]]:
    """The 1797 images of 8 x 8 pixels and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "--data: none given, and the digits come with scikit-learn, which is not installed: "
            "name a folder of images, or install tokenfusion[demo]"
        ) from None
    found = load_digits()
    images = [Image.fromarray((255 / 16 * image).astype("uint8")) for image in found.images]
    return [(image, str(label)) for image, label in zip(images, found.target, strict=True)]
