"""Proof and speed of every kernel on the machine at hand, and the file that "auto" follows."""

from tokenfusion.tuning.search import Finding, Tuning, tune, verify

__all__ = ["Finding", "Tuning", "tune", "verify"]
