"""Fused kernels for vision models that fuse tokens."""

from tokenfusion import kernels
from tokenfusion.kernels.dispatch import backend, backends, set_backend

__version__ = "0.1.0"

__all__ = ["backend", "backends", "kernels", "set_backend"]
