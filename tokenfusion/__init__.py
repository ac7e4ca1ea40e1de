"""Fused kernels for vision models that fuse tokens."""

import importlib

from tokenfusion import kernels
from tokenfusion.kernels.dispatch import backend, backends, set_backend
from tokenfusion.surgery import FuseReport, fuse, unfuse

__version__ = "0.1.0"

__all__ = [
    "FuseReport",
    "backend",
    "backends",
    "create_model",
    "fuse",
    "kernels",
    "list_models",
    "set_backend",
    "unfuse",
]


def __getattr__(name: str):
    """The models come with the first use of their names: they import all of timm."""
    if name in ("create_model", "list_models"):
        return getattr(importlib.import_module("tokenfusion.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
