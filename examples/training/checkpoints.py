"""What finetune.py writes and reads: models in folders, as timm has them, and the state of a training in one file.

Files are written under another name and then take the place of the old ones: whenever a process is killed, there is
the old file or the new one.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import nn

import tokenfusion
from tokenfusion.cli.errors import UsageError

STATE = "training.safetensors"
_USUAL = {"tied": False, "label_names": None, "model_args": {}}  # in config.json
_DAMAGED = (OSError, AssertionError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError)


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Has the file written in one piece.

    Raises:
        UsageError: it cannot be written; the old one is as it was.
    """
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: cannot be written: {_one_line(error)}") from None


def save_config(folder: Path, model: nn.Module, classes: list[str], options: dict, tied: bool) -> None:
    """config.json, from which timm, and `load`, make the model again."""
    more = {"label_names": classes, "tied": tied}
    replace(folder / "config.json", lambda path: save_config_for_hf(model, path, more, options))


def save_model(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    replace(folder / "model.safetensors", lambda path: save_file(_contiguous(weights), path))


def load(folder: Path) -> tuple[nn.Module, dict]:
    """The model in a folder, in evaluation mode, and its config.json.

    Raises:
        UsageError: there is none, or weights of another model.
    """
    tokenfusion.list_models()  # registers them
    try:
        config = _USUAL | json.loads((folder / "config.json").read_text())
        model = timm.create_model(f"local-dir:{folder}")
        if config["tied"]:
            tokenfusion.tie_weights(model)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except _DAMAGED as error:
        raise UsageError(f"{folder}: no model of timm or tokenfusion: {_one_line(error)}") from None
    return model.eval(), config


def save_training(path: Path, parts: dict[str, dict], progress: dict) -> None:
    """Dictionaries of tensors and of what JSON can hold; and where the training is, as JSON can hold it."""
    named = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    values = {name: value for name, value in named.items() if name not in tensors}
    metadata = {"values": json.dumps(values), "progress": json.dumps(progress)}
    replace(path, lambda partial: save_file(_contiguous(tensors), partial, metadata))


def load_training(path: Path) -> tuple[dict[str, dict], dict]:
    """What `save_training` was given.

    Raises:
        UsageError: it is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            values, progress = (json.loads(file.metadata()[name]) for name in ("values", "progress"))
        parts: dict[str, dict] = {}
        for name, value in (load_file(path) | values).items():
            part, _, name = name.partition("/")
            parts.setdefault(part, {})[name] = value
    except _DAMAGED as error:
        raise UsageError(f"{path}: no state of a training: {_one_line(error)}") from None
    return parts, progress


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
