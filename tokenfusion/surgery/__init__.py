"""Replacing the modules of an existing model by fused ones, and back."""

from tokenfusion.surgery.fuse import fuse, unfuse
from tokenfusion.surgery.report import FuseReport, ModuleReport

__all__ = ["FuseReport", "ModuleReport", "fuse", "unfuse"]
