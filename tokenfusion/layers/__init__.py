"""Layers around the operators. They hold the parameters of the layers that they replace."""

from tokenfusion.layers.crossvit import CrossAttentionBlock, MultiScaleBlock
from tokenfusion.layers.dynamixer import DynaMixerBlock, DynaMixerOp
from tokenfusion.layers.probe_grid import ProbeGrid
from tokenfusion.layers.single_query_attention import SingleQueryAttention
from tokenfusion.layers.tied_resnet import TiedBottleneck, TiedStage
from tokenfusion.layers.tied_transformer import TiedAttention, TiedFFN
from tokenfusion.layers.upconv import UpConvAdd, UpConvConcat, UpConvConcatProject, UpCopyAdd, UpCopyConcat

__all__ = [
    "CrossAttentionBlock",
    "DynaMixerBlock",
    "DynaMixerOp",
    "MultiScaleBlock",
    "ProbeGrid",
    "SingleQueryAttention",
    "TiedAttention",
    "TiedBottleneck",
    "TiedFFN",
    "TiedStage",
    "UpConvAdd",
    "UpConvConcat",
    "UpConvConcatProject",
    "UpCopyAdd",
    "UpCopyConcat",
]
