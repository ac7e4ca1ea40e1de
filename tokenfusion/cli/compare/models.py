"""Models of timm's registry by name: pretrained where the weights can be had, random otherwise; and which it was."""

import contextlib
import copy
import difflib
import logging
import os
from dataclasses import dataclass
from typing import Any

import timm
import torch
from huggingface_hub.utils import disable_progress_bars
from timm.models import split_model_name_tag
from torch import nn

import tokenfusion
from tokenfusion.cli.errors import UsageError, first_line
from tokenfusion.models import hub

SEED = 0


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode; weights says in words where they come from.

    own is the package's model where the name is one of its own; model is then its plain form of the same weights. eager
    says what model is.
    """

    model: nn.Module
    own: nn.Module | None
    eager: str
    pretrained: bool
    weights: str


def check_name(name: str) -> None:
    """
    Raises:
        UsageError: timm has no such model, or no such weights of it.
    """
    tokenfusion.list_models()  # registers them
    _, tag = split_model_name_tag(name)
    pretrained = timm.list_models(pretrained=True)
    if timm.is_model(name) and (not tag or name in pretrained):
        return
    close = difflib.get_close_matches(name, timm.list_models() + (pretrained if tag else []), n=4, cutoff=0.5)
    if os.path.exists(name):
        hint = f"an image file comes after the model's name, as in: tokenfusion compare crossvit_15_240 {name}"
    elif close:
        hint = f"close to it: {', '.join(close)}"
    else:
        hint = "timm.list_models() and tokenfusion.list_models() have the names"
    raise UsageError(f"MODEL: got {name!r}, expected the name of a model of timm or tokenfusion; {hint}")


def load(name: str) -> Loaded:
    """The model with pretrained weights if they are cached or can be downloaded, else with seeded random ones.

    Raises:
        UsageError: the model cannot be built.
    """
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    model, why_not = pretrained(name)
    if model is not None:
        return Loaded(
            *_with_own(model.eval()), True, f"pretrained ({timm.get_pretrained_cfg(name).tag or 'the default ones'})"
        )
    torch.manual_seed(SEED)
    try:
        model = timm.create_model(name)
    except (OSError, RuntimeError, ValueError, TypeError, ImportError, AssertionError) as error:
        raise UsageError(f"MODEL: timm cannot build {name}: {first_line(error)}") from None
    return Loaded(*_with_own(model.eval()), False, f"random, seed {SEED}: {why_not}")


def _with_own(model: nn.Module) -> tuple[nn.Module, nn.Module | None, str]:
    """(the plain form, the package's own model or None where this is none of its own, what the plain form is)."""
    name = model.pretrained_cfg["architecture"]
    if name not in tokenfusion.list_models():
        return model, None, "timm's model"
    if hasattr(model, "plain"):
        return model.plain(), model, "the same weights in plain PyTorch, as the paper has it"
    of_timm = name.removeprefix("tokenfusion_")
    if of_timm != name and timm.is_model(of_timm):
        plain = timm.create_model(of_timm)
        plain.load_state_dict(model.state_dict())
        return plain.eval(), model, f"timm's {of_timm} with the same weights"
    plain = copy.deepcopy(model)
    tokenfusion.unfuse(plain)
    return plain, model, "the same model, its modules not fused"


def pretrained(name: str, **options: Any) -> tuple[nn.Module | None, str | None]:
    """(the model, made with these options, None), or (None, why there are no pretrained weights)."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        return None, "timm has no pretrained weights for this model"
    try:
        own = split_model_name_tag(name)[0] in tokenfusion.list_models()  # asks by itself
        with contextlib.nullcontext() if own else hub.asked_once(name, config):
            return timm.create_model(name, pretrained=True, **options), None
    except hub.Unavailable as error:
        return None, str(error)
    except Exception as error:  # noqa: BLE001  (whatever a download raises, random weights still serve)
        return None, f"no pretrained weights: {first_line(error)}"
