"""Models by name: timm's registry and builder, narrowed to the models of this package."""

import contextlib
import difflib
import fnmatch
import functools
from typing import Any

import timm
from timm.models import build_model_with_cfg, resolve_pretrained_cfg, split_model_name_tag
from torch import nn

from tokenfusion.models import hub
from tokenfusion.models.checkpoints import CheckedModel, load_checkpoint


def list_models(pattern: str = "*") -> list[str]:
    """Names of the package's models that match a pattern of fnmatch, such as "*crossvit*"."""
    return fnmatch.filter(_names(), pattern)


@functools.cache
def _names() -> tuple[str, ...]:
    """All of them in timm's registry, whose more than a thousand names need one walk: this package adds none later."""
    names = timm.list_models(include_tags=False)
    return tuple(name for name in names if timm.model_entrypoint(name).__module__.startswith("tokenfusion.models."))


def create_model(
    name: str, pretrained: bool = False, *, checkpoint_path: str | None = None, **kwargs: Any
) -> nn.Module:
    """A model of this package, as `timm.create_model` makes it.

    Args:
        name: one of `list_models()`, with or without the tag of its weights.
        pretrained: with the weights of timm's hub configuration for the architecture.
        checkpoint_path: a file to load in the end, see `load_checkpoint`.
        kwargs: of the model's constructor (img_size, num_classes, drop_path_rate, ...) or of `timm.create_model`.

    Raises:
        ValueError: an unknown name.
        RuntimeError: no pretrained weights exist, or the hub, which is asked once, cannot be reached and its cache has
            none; or the checkpoint cannot be loaded.
    """
    known = list_models()
    if split_model_name_tag(name)[0] not in known:
        close = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(
            f"name: got {name!r}, expected a model of tokenfusion.list_models(), such as {', '.join(close)}"
        )
    model = timm.create_model(name, pretrained=pretrained, **kwargs)
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model


def build(model_class: type[CheckedModel], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """What a model's entry point returns: timm's build_model_with_cfg, with the model's own filter of checkpoints.

    Weights are asked for once, and for the meta device, which keeps none, not at all.
    """
    pretrained = pretrained and not hub.on_meta(kwargs.get("device"))
    config = {name: kwargs.get(name) for name in ("pretrained_cfg", "pretrained_cfg_overlay")}
    with hub.asked_once(variant, resolve_pretrained_cfg(variant, **config)) if pretrained else contextlib.nullcontext():
        return build_model_with_cfg(
            model_class,
            variant,
            pretrained,
            pretrained_filter_fn=lambda state_dict, model: model.checkpoint_filter(state_dict),
            **kwargs,
        )
