"""Fused kernels for vision models that fuse tokens."""

import importlib

from tokenfusion import kernels
from tokenfusion.kernels.dispatch import backend, backends, set_backend
from tokenfusion.surgery import FuseReport, TieReport, fuse, unfuse

__version__ = "0.1.0"

__all__ = [
    "FuseReport",
    "TieReport",
    "backend",
    "backends",
    "create_model",
    "fuse",
    "kernels",
    "list_models",
    "set_backend",
    "tie_weights",
    "unfuse",
]


def __getattr__(name: str):
    """Names that come with their first use: they import timm."""
    if name == "tie_weights":
        return importlib.import_module("tokenfusion.surgery.tie").tie_weights
    if name in ("create_model", "list_models"):
        return getattr(importlib.import_module("tokenfusion.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
