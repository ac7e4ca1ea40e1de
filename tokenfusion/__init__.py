"""Fused kernels for vision models that fuse tokens."""

import importlib

from tokenfusion import kernels
from tokenfusion.kernels.dispatch import backend, backends, set_backend

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
    "register_rule",
    "set_backend",
    "tie_weights",
    "tune",
    "unfuse",
    "verify",
]


_LATER = {
    "FuseReport": "tokenfusion.surgery",
    "TieReport": "tokenfusion.surgery",
    "fuse": "tokenfusion.surgery",
    "register_rule": "tokenfusion.surgery",
    "unfuse": "tokenfusion.surgery",
    "tie_weights": "tokenfusion.surgery.tie",
    "tune": "tokenfusion.tuning",
    "verify": "tokenfusion.tuning",
    "create_model": "tokenfusion.models",
    "list_models": "tokenfusion.models",
}


def __getattr__(name: str):
    """Names that come with their first use: they import timm."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
