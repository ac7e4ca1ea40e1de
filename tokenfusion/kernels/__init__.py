"""The operators. Each has a folder: reference.py is its definition, op.py its checks, registration and autograd.

attention, linear and mlp are no operators of the package's own but PyTorch's, which fused blocks run in inference.
"""

from tokenfusion.kernels import attention, linear, mlp  # noqa: F401  (registered, for `tokenfusion tune`)
from tokenfusion.kernels.dynamic_mixing.op import dynamic_mixing
from tokenfusion.kernels.gated_sum.op import gated_sum
from tokenfusion.kernels.single_query_attention.op import single_query_attention
from tokenfusion.kernels.tied_ffn.op import tied_ffn
from tokenfusion.kernels.upconv import upconv_add, upconv_concat, upconv_concat_project

__all__ = [
    "dynamic_mixing",
    "gated_sum",
    "single_query_attention",
    "tied_ffn",
    "upconv_add",
    "upconv_concat",
    "upconv_concat_project",
]
