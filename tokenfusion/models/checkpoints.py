"""Loading of weights: completely, or with an error that says what is wrong and the model as it was."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.models import load_state_dict
from torch import nn

_NAMED = 6  # names in a message


class CheckedModel(nn.Module):
    """A model whose load_state_dict compares names and shapes before it copies the first tensor.

    PyTorch's copies what fits and raises afterwards.
    """

    def current_name(self, name: str) -> str:
        """The name that a parameter has here, from its name in a checkpoint."""
        return name

    def checkpoint_filter(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A checkpoint's tensors, renamed and resized for this model; the mapping passed in is not touched."""
        return {self.current_name(name): value for name, value in state_dict.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """nn.Module's; a RuntimeError about names or shapes comes before the first tensor is copied."""
        problems = _problems(
            {self.current_name(name): value for name, value in state_dict.items()}, self.state_dict(), strict
        )
        if problems:
            raise RuntimeError(f"{type(self).__name__}: the state_dict does not fit, nothing was loaded: {problems}")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        """Renames, also where the model is part of another one; state_dict is the copy that load_state_dict made."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[prefix + self.current_name(name.removeprefix(prefix))] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def load_checkpoint(model: CheckedModel, path: str | os.PathLike, *, strict: bool = True) -> None:
    """Load a checkpoint file into a model: a .safetensors file, or one of torch.save, read with weights_only=True.

    The tensors may lie under "state_dict" or "model", as timm and most training scripts write them; names of the
    official release and another input resolution are adapted as the model's `checkpoint_filter` says.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: the file cannot be read, or, with strict, a parameter is missing, unknown or of another shape
            (without strict, only of another shape). The model is unchanged.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint: {path}: no such file")
    try:
        state_dict = load_state_dict(path)
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise RuntimeError(f"checkpoint: {path}: cannot be read: {str(error) or type(error).__name__}") from error
    model.load_state_dict(model.checkpoint_filter(state_dict), strict=strict)


def _problems(given: Mapping[str, Any], own: Mapping[str, Any], strict: bool) -> str:
    """What keeps `given` from being loaded in place of `own`, in words."""
    found = []
    if strict:
        found += [
            f"{len(names)} {kind} ({_some(names)})"
            for kind, names in (("missing", own.keys() - given.keys()), ("not known here", given.keys() - own.keys()))
            if names
        ]
    for name in [name for name in own if name in given]:
        expected, got = _shape(own[name]), _shape(given[name])
        if got != expected:
            found.append(f"{name} got {got}, expected {expected}")
    return _some(found, "; ") if found else ""


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _some(names: Iterable[str], separator: str = ", ") -> str:
    names = sorted(names)
    left = len(names) - _NAMED
    return separator.join(names[:_NAMED]) + (f"{separator}{left} more" if left > 0 else "")
