"""Fused kernels for vision models that fuse tokens."""

from tokenfusion import kernels
from tokenfusion.kernels.dispatch import backend, backends, set_backend
from tokenfusion.surgery import FuseReport, fuse, unfuse

__version__ = "0.1.0"

__all__ = ["FuseReport", "backend", "backends", "fuse", "kernels", "set_backend", "unfuse"]
