"""Replacing the modules of an existing model by fused ones, and back; tying its matrices."""

from tokenfusion.surgery.fuse import fuse, unfuse
from tokenfusion.surgery.report import FuseReport, MatrixReport, ModuleReport, TieReport, UntiedReport
from tokenfusion.surgery.rules.few_queries import register_rule

__all__ = [
    "FuseReport",
    "MatrixReport",
    "ModuleReport",
    "TieReport",
    "UntiedReport",
    "fuse",
    "register_rule",
    "unfuse",
]
