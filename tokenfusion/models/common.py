"""What the models share: checks of arguments, initial values, and what their configurations have in common."""

from collections.abc import Collection, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from torch import nn


def check_choice(name: str, value: Any, choices: Collection) -> None:
    if value not in choices:
        one_of = "one of " if len(choices) > 1 else ""
        raise ValueError(f"{name}: got {value!r}, expected {one_of}{', '.join(map(repr, choices))}")


def check_output_fmt(output_fmt: str) -> None:
    """The argument of every `forward_intermediates`."""
    check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))


def check_lengths(expected: int, of_each: str, **arguments: Sequence) -> None:
    for name, values in arguments.items():
        if len(values) != expected:
            raise ValueError(f"{name}: got {values!r}, expected {expected} values, one for each {of_each}")


def init_weights(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> None:
    """For nn.Module.apply: a narrow truncated normal distribution, and biases of zero."""
    if isinstance(module, kinds):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def imagenet_cfg(**settings: Any) -> dict[str, Any]:
    """A configuration for timm's generate_default_cfgs: ImageNet in 224 x 224 pixels, and what `settings` says."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    } | settings
