"""Layers around the operators. They hold the parameters of the layers that they replace."""

from tokenfusion.layers.crossvit import CrossAttentionBlock, MultiScaleBlock

__all__ = ["CrossAttentionBlock", "MultiScaleBlock"]
